"""The queue by kind: tasks of a kind without a free slot hide no tasks of other kinds"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_tasks_claim", table_name="tasks")
    op.create_index(
        "ix_tasks_claim",
        "tasks",
        ["sponsor", "kind", "due", "sequence"],
        postgresql_where=sa.text("state = 'queued' AND NOT paused"),
        sqlite_where=sa.text("state = 'queued' AND paused = 0"),
    )

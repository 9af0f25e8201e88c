"""Tasks can be retracted with all that rests on them, and a new generation takes their digests"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

FORMER = sa.text("former_digest IS NOT NULL")
HIDDEN = sa.text("retracted_at IS NOT NULL")


def upgrade() -> None:
    op.add_column("tasks", sa.Column("retracted_at", sa.Float(53)))
    op.add_column("tasks", sa.Column("retracted_by", sa.String(200)))
    op.add_column("tasks", sa.Column("retraction_reason", sa.Text()))
    op.add_column("tasks", sa.Column("retracted_with", sa.String(36)))
    op.add_column("tasks", sa.Column("former_digest", sa.String(64)))
    op.create_index("ix_tasks_former", "tasks", ["former_digest"], postgresql_where=FORMER, sqlite_where=FORMER)
    op.create_index("ix_tasks_retracted", "tasks", ["retracted_with"], postgresql_where=FORMER, sqlite_where=FORMER)
    op.add_column("results", sa.Column("retracted_with", sa.String(36)))
    covered = ["retracted_with", "sequence"]
    op.create_index("ix_results_retracted", "results", covered, postgresql_where=HIDDEN, sqlite_where=HIDDEN)

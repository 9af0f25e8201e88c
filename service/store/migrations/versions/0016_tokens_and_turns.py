"""The token that a token was made with; boosted jobs and tasks; tasks that several users need"""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

SHARED = sa.text("state = 'queued' AND NOT paused AND shared")
OPEN = "finished_at IS NULL"
NEEDED_BY_SEVERAL = (
    f"UPDATE tasks SET shared = true WHERE {OPEN} AND id IN (SELECT task_id FROM job_tasks JOIN jobs "
    f'ON jobs.id = job_tasks.job_id WHERE jobs.{OPEN} GROUP BY task_id HAVING count(DISTINCT jobs."user") > 1)'
)


def upgrade() -> None:
    op.add_column("tokens", sa.Column("parent_id", sa.String(length=36)))
    op.create_index("ix_tokens_parent", "tokens", ["parent_id"])
    for table, column in (("jobs", "boosted"), ("tasks", "boosted"), ("tasks", "shared")):
        op.add_column(table, sa.Column(column, sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.execute(NEEDED_BY_SEVERAL)
    op.create_index("ix_tasks_shared", "tasks", ["sponsor"], postgresql_where=SHARED, sqlite_where=SHARED)
    op.drop_column("usage", "served_at")

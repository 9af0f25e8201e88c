"""Fair share, pausing, estimates: a task's place in the queue, what users may use and have used, decisions, timings"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

AGEING_SECONDS = 3600  # as `scheduling` had it then


def upgrade() -> None:
    op.drop_index("ix_tasks_claim", table_name="tasks")
    # SQLite cannot alter a column later, so the statement that adds it gives it a default, for the rows that exist.
    for column in (
        sa.Column("needed_by", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("waiting_since", sa.Float(precision=53), nullable=False, server_default="0"),
        sa.Column("due", sa.Float(precision=53), nullable=False, server_default="0"),
        sa.Column("paused", sa.Boolean(), nullable=False, server_default=sa.false()),
    ):
        op.add_column("tasks", column)
    op.execute(f"UPDATE tasks SET waiting_since = created_at, due = created_at - priority * {AGEING_SECONDS}")
    op.create_index(
        "ix_tasks_claim",
        "tasks",
        ["sponsor", "due", "sequence"],
        postgresql_where=sa.text("state = 'queued' AND NOT paused"),
        sqlite_where=sa.text("state = 'queued' AND paused = 0"),
    )
    op.add_column("attempts", sa.Column("bundle", sa.String(length=200)))
    op.add_column("attempts", sa.Column("device_share", sa.Float(precision=53)))
    op.add_column("attempts", sa.Column("charged_until", sa.Float(precision=53)))
    op.create_index(
        "ix_jobs_unfinished",
        "jobs",
        ["user"],
        postgresql_where=sa.text("finished_at IS NULL"),
        sqlite_where=sa.text("finished_at IS NULL"),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("weight", sa.Float(precision=53), nullable=True),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_gpus", sa.Float(precision=53), nullable=True),
        sa.Column("created_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_users")),
    )
    op.create_table(
        "usage",
        sa.Column("user", sa.String(length=200), nullable=False),
        sa.Column("device_seconds", sa.Float(precision=53), nullable=False),
        sa.Column("as_of", sa.Float(precision=53), nullable=False),
        sa.Column("recent_seconds", sa.Float(precision=53), nullable=False),
        sa.Column("served_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("user", name=op.f("pk_usage")),
    )
    op.create_table(
        "queues",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("changed_by", sa.String(length=200), nullable=False),
        sa.Column("changed_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_queues")),
    )
    op.create_table(
        "decisions",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("seen", sa.LargeBinary(), nullable=False),
        sa.Column("decided", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decisions")),
    )
    op.create_table(
        "timings",
        sa.Column("task_id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("method", sa.String(length=80), nullable=False),
        sa.Column("architecture", sa.String(length=80), nullable=False),
        sa.Column("dataset", sa.String(length=200), nullable=False),
        sa.Column("device", sa.String(length=200), nullable=False),
        sa.Column("device_seconds", sa.Float(precision=53), nullable=False),
        sa.Column("units", sa.Float(precision=53), nullable=False),
        sa.Column("at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name=op.f("fk_timings_task_id")),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_timings")),
    )
    op.create_index("ix_timings_alike", "timings", ["kind", "method", "architecture", "dataset", "at"], unique=False)

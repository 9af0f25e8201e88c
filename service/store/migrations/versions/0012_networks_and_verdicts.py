"""Which weights a result is of, whether its network has one in that cell already, and what its verdict counted"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

SHOWN = sa.text("retracted_at IS NULL")
COVERED = ("robust_accuracy", "clean_accuracy", "masked_fraction", "retracted_at")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("masked_n", sa.Integer()))
    op.add_column("jobs", sa.Column("verdict_counts", sa.JSON(none_as_null=True)))
    op.add_column("results", sa.Column("masked_n", sa.Integer()))
    op.add_column("results", sa.Column("verdict_version", sa.Integer()))
    op.add_column("results", sa.Column("weights_sha256", sa.String(64)))
    op.add_column(
        "results", sa.Column("repeats_network", sa.Boolean(), nullable=False, server_default=sa.text("false"))
    )
    op.execute("UPDATE results SET verdict_version = jobs.verdict_version FROM jobs WHERE jobs.id = results.job_id")
    _fill_weights()
    op.execute(
        "UPDATE results SET repeats_network = true WHERE job_id IN (SELECT job_id FROM (SELECT job_id, "
        "row_number() OVER (PARTITION BY cell_id, weights_sha256 ORDER BY sequence) AS place FROM results) AS placed "
        "WHERE place > 1)"
    )
    op.drop_index("ix_results_cell", table_name="results")
    covered = ["cell_id", "user", "repeats_network", *COVERED]
    op.create_index("ix_results_cell", "results", covered, postgresql_where=SHOWN, sqlite_where=SHOWN)
    op.create_index("ix_results_weights", "results", ["weights_sha256"])


def _fill_weights() -> None:
    """The weights that the attack really used, or, if it did not note them, those that its training left."""
    if op.get_bind().dialect.name == "sqlite":
        used = "json_extract(attempts.provenance, '$.weights_sha256')"
    else:
        used = "attempts.provenance ->> 'weights_sha256'"
    op.execute(
        f"UPDATE results SET weights_sha256 = {used} FROM tasks, attempts WHERE tasks.id = results.attack_task_id "
        "AND attempts.task_id = tasks.id AND attempts.number = tasks.attempt"
    )
    op.execute(
        "UPDATE results SET weights_sha256 = trainings.checkpoint_digest FROM trainings "
        "WHERE trainings.task_id = results.train_task_id AND results.weights_sha256 IS NULL"
    )

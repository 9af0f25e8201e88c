"""Results whose measures or training used other weights than their attack: flagged, without these numbers"""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

OF_TRAINING = "test_accuracy = NULL, train_seconds = NULL"
OF_CLOSED_FORMS = (
    "log_hessian_trace_median = NULL, log_relative_sharpness_median = NULL, log_relative_flatness_median = NULL"
)


def upgrade() -> None:
    op.add_column("results", sa.Column("mixed_weights", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    _fill()


def _fill() -> None:
    """Before 0018, a training that ran again overwrote its weights in place, whatever had been computed on them."""
    json = "json_extract(attempts.provenance, '$.weights_sha256')"
    if op.get_bind().dialect.name != "sqlite":
        json = "attempts.provenance ->> 'weights_sha256'"
    training = (
        "EXISTS (SELECT 1 FROM trainings WHERE trainings.task_id = results.train_task_id "
        "AND trainings.checkpoint_digest <> results.weights_sha256)"
    )
    used_others = (
        "SELECT 1 FROM tasks JOIN attempts ON attempts.task_id = tasks.id AND attempts.number = tasks.attempt "
        f"AND {json} <> results.weights_sha256"
    )
    measures = (
        f"EXISTS ({used_others} JOIN job_tasks ON job_tasks.task_id = tasks.id "
        "WHERE tasks.kind = 'measure' AND job_tasks.job_id = results.job_id)"
    )
    closed_forms = f"EXISTS ({used_others} WHERE tasks.id = results.measure_task_id)"
    op.execute(f"UPDATE results SET mixed_weights = true WHERE {training} OR {measures}")
    op.execute(f"UPDATE results SET {OF_TRAINING} WHERE mixed_weights AND {training}")
    op.execute(f"UPDATE results SET {OF_CLOSED_FORMS} WHERE mixed_weights AND {closed_forms}")

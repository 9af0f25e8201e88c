"""The weights that an attempt has not found; trainings that gave other weights when they ran again"""

import re

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def upgrade() -> None:
    op.add_column("attempts", sa.Column("missing_digest", sa.String(64)))
    op.add_column("trainings", sa.Column("trained_again_as", sa.String(64)))
    op.add_column("results", sa.Column("trained_again", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    _fill()


def _fill() -> None:
    """Until now an attempt's message alone said which weights it had not found."""
    attempts = sa.table(
        "attempts",
        sa.column("task_id", sa.String),
        sa.column("number", sa.Integer),
        sa.column("end", sa.String),
        sa.column("message", sa.Text),
        sa.column("missing_digest", sa.String),
    )
    connection = op.get_bind()
    query = sa.select(attempts.c.task_id, attempts.c.number, attempts.c.message)
    for task_id, number, message in connection.execute(query.where(attempts.c.end == "missing_checkpoint")).all():
        if digest := DIGEST.search(message or ""):
            this = (attempts.c.task_id == task_id) & (attempts.c.number == number)
            connection.execute(sa.update(attempts).where(this).values(missing_digest=digest.group()))

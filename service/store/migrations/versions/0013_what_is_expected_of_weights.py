"""What is expected of registered weights and what was done to them; trainings by the weights that they made"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("expected_clean_accuracy", sa.Float(precision=53)),
        sa.Column("tolerance", sa.Float(precision=53)),
        sa.Column("stripped_prefix", sa.Text()),
        sa.Column("converted_from", sa.JSON(none_as_null=True)),
    ):
        op.add_column("checkpoints", column)
    op.create_index("ix_trainings_checkpoint", "trainings", ["checkpoint_digest"])

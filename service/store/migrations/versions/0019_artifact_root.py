"""The mark by which the artifact root is known"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifact_roots",
        sa.Column("mark", sa.String(length=200), nullable=False),
        sa.Column("adopted_at", sa.Float(precision=53), nullable=False),
        sa.PrimaryKeyConstraint("mark", name=op.f("pk_artifact_roots")),
    )

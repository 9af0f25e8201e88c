"""The token that made a token, so that revoking it revokes what was made with it"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tokens", sa.Column("parent_id", sa.String(length=36)))
    op.create_index("ix_tokens_parent", "tokens", ["parent_id"])

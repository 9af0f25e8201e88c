"""Hidden results are found by their training: a result that is filed later may show the same numbers"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    hidden = sa.text("retracted_at IS NOT NULL")
    op.create_index(
        "ix_results_retracted_training", "results", ["train_task_id"], postgresql_where=hidden, sqlite_where=hidden
    )

"""Results in order within each cell, and sums of them by user"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INDEXED = (
    "clean_accuracy",
    "robust_accuracy",
    "robust_loss",
    "masked_fraction",
    "zero_gradient_fraction",
    "log_hessian_trace_median",
    "log_relative_sharpness_median",
    "log_relative_flatness_median",
)
SHOWN = sa.text("retracted_at IS NULL")


def upgrade() -> None:
    names = {f"ix_results_cell_{name}": ["cell_id", name, "sequence", "user"] for name in INDEXED}
    op.drop_index("ix_results_cell", table_name="results")
    names["ix_results_cell"] = ["cell_id", "user", "repeated", "robust_accuracy", "clean_accuracy", "masked_fraction"]
    names["ix_results_cell_time"] = ["cell_id", "sequence", "user"]
    for name, columns in names.items():
        op.create_index(name, "results", columns, postgresql_where=SHOWN, sqlite_where=SHOWN)

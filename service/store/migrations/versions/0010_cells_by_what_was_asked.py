"""An index with all that filters ask of cells, so that no filter reads the specs: they are most of the table"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    asked = ["architecture", "dataset", "attack", "scale", "norm", "eps", "recipe", "samples"]
    op.create_index("ix_cells_asked", "cells", asked)

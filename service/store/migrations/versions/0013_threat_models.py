"""The threat model of a cell, and which cells differ in their attack's strength only"""

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

STRENGTH = ("eps", "steps", "restarts")


def upgrade() -> None:
    op.add_column("cells", sa.Column("threat_model", sa.String(80)))
    op.add_column("cells", sa.Column("family", sa.String(64), nullable=False, server_default=sa.text("''")))
    _fill()
    op.create_index("ix_cells_family", "cells", ["family"])
    op.drop_index("ix_results_weights", table_name="results")
    op.create_index("ix_results_weights", "results", ["weights_sha256", "cell_id"])


def _fill() -> None:
    cells = sa.table(
        "cells", sa.column("id", sa.Integer), sa.column("spec", sa.JSON), sa.column("threat_model", sa.String),
        sa.column("family", sa.String),
    )  # fmt: skip
    connection = op.get_bind()
    for cell_id, spec in connection.execute(sa.select(cells.c.id, cells.c.spec)).all():
        values = {"threat_model": _ball(spec["attack"]), "family": _family(spec)}
        connection.execute(sa.update(cells).where(cells.c.id == cell_id).values(values))


def _ball(attack: dict[str, Any]) -> str | None:
    ball = attack.get("attack", attack)
    norm, eps = ball.get("norm"), ball.get("eps")
    if norm is None or eps is None or attack.get("kind") == "gaussian":
        return None
    grey_levels = round(255 * eps)
    if 0 < grey_levels < 255 and grey_levels / 255 == eps:
        return f"{norm} {grey_levels}/255"
    return f"{norm} {float(eps)!r}".removesuffix(".0")


def _family(spec: dict[str, Any]) -> str:
    kept = {name: value for name, value in spec.items() if name not in ("recipe", "versions")}
    attack = {name: value for name, value in spec["attack"].items() if name not in STRENGTH}
    if "attack" in attack:
        attack["attack"] = {name: value for name, value in attack["attack"].items() if name not in STRENGTH}
    same = {**kept, "attack": attack, "version": spec["versions"]["attack"]}
    return hashlib.sha256(json.dumps(same, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

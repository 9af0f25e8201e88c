"""The threat model of a cell, which cells differ in their attack's strength only, and the flags that come of it"""

import hashlib
import itertools
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

STRENGTH = ("eps", "steps", "restarts")
MEANS = """
SELECT results.weights_sha256, cells.family, results.cell_id, avg(results.robust_accuracy) AS mean
FROM results JOIN cells ON cells.id = results.cell_id
WHERE results.weights_sha256 IS NOT NULL AND results.robust_accuracy IS NOT NULL
AND results.retracted_at IS NULL AND NOT results.repeated
GROUP BY results.weights_sha256, cells.family, results.cell_id ORDER BY results.weights_sha256, cells.family
"""
MARK = "UPDATE results SET not_monotone = true WHERE weights_sha256 = :network AND cell_id = :cell"


def upgrade() -> None:
    op.add_column("cells", sa.Column("threat_model", sa.String(80)))
    op.add_column("cells", sa.Column("family", sa.String(64), nullable=False, server_default=sa.text("''")))
    _fill()
    op.create_index("ix_cells_family", "cells", ["family"])
    op.drop_index("ix_results_weights", table_name="results")
    op.create_index("ix_results_weights", "results", ["weights_sha256", "cell_id"])
    op.add_column("results", sa.Column("not_monotone", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    _flag()


def _fill() -> None:
    cells = sa.table(
        "cells",
        sa.column("id", sa.Integer),
        sa.column("spec", sa.JSON),
        sa.column("threat_model", sa.String),
        sa.column("family", sa.String),
    )
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


def _flag() -> None:
    """Mark both results of a pair if more of one strength left over max(.02, 3/n) more of the examples robust."""
    cells = sa.table("cells", sa.column("id", sa.Integer), sa.column("spec", sa.JSON), sa.column("family", sa.String))
    connection = op.get_bind()
    several = sa.select(cells.c.family).group_by(cells.c.family).having(sa.func.count() > 1)
    rows = connection.execute(sa.select(cells.c.id, cells.c.spec).where(cells.c.family.in_(several))).all()
    specs = {cell_id: (spec["samples"], _strength(spec["attack"])) for cell_id, spec in rows}
    means = connection.execute(sa.text(MEANS)).all()
    for _, alike in itertools.groupby(means, key=lambda row: (row.weights_sha256, row.family)):
        these = [row for row in alike if row.cell_id in specs]
        for one in these:
            if any(_against(specs[one.cell_id], specs[other.cell_id], one.mean, other.mean) for other in these):
                connection.execute(sa.text(MARK), {"network": one.weights_sha256, "cell": one.cell_id})


def _strength(attack: dict[str, Any]) -> dict[str, Any]:
    found = {name: attack[name] for name in STRENGTH if name in attack}
    inner = _strength(attack["attack"]) if "attack" in attack else {}  # a transfer has an attack inside
    return found | {f"attack.{name}": value for name, value in inner.items()}


def _against(mine: tuple[int, dict[str, Any]], theirs: tuple[int, dict[str, Any]], one: float, other: float) -> bool:
    (n, strength), (_, others) = mine, theirs
    apart = [name for name in strength if strength[name] != others[name]]
    if len(apart) != 1:
        return False
    rise = other - one if strength[apart[0]] < others[apart[0]] else one - other
    return rise > max(0.02, 3 / n) + 1e-9

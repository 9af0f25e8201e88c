"""Row 9: a page of 100 among a million results over HTTP, beside the same rows of one bare typed table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks.generated import INDEXED
from benchmarks.serving import serving
from sqlalchemy import text

from service.store import Database

OTHERS = {
    "seed, metric": {"filter": "seed = 7 and robust_accuracy > 0.5", "sort": "-robust_loss"},
    "verdict, metric": {"filter": "verdict = trusted and clean_loss < 0.0001", "sort": "test_accuracy"},
    "stored number": {"filter": "flip_rate > 0.9999 and architecture = mlp", "sort": "-robust_accuracy"},
    "label, scale": {"filter": "labels.study = other and scale = 5", "sort": "-robust_accuracy"},
    "provenance, scale": {"filter": "provenance.device ~ A100 and scale = 5", "sort": "-robust_accuracy"},
    "reason, scale": {"filter": "verdict_reasons = masked and scale = 5", "sort": "robust_accuracy"},
    "measure, scale": {"filter": "measures = fisher_rao and scale = 5", "sort": "robust_accuracy"},
}
BARE = """
CREATE TABLE bare AS SELECT results.*, cells.architecture, cells.dataset, cells.attack, cells.scale
FROM results JOIN cells ON cells.id = results.cell_id
"""
BARE_INDEX = "CREATE INDEX ix_bare ON bare (architecture, scale, robust_accuracy)"
BARE_PAGE = text(
    "SELECT * FROM bare WHERE architecture = 'resnet18' AND scale = 5 AND robust_accuracy IS NOT NULL "
    "ORDER BY robust_accuracy DESC LIMIT 100"
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_pages(
    table: Any, many_results: Callable[[str], str], tmp_path: Path, pytestconfig: pytest.Config, kind: str
) -> None:
    url = many_results(kind)
    database = Database(url)
    with database.engine.begin() as connection:
        for statement in ("DROP TABLE IF EXISTS bare", BARE, BARE_INDEX):
            connection.execute(text(statement))

    def bare() -> None:
        with database.read() as connection:
            assert len(connection.execute(BARE_PAGE).all()) == 100

    with serving(url, tmp_path) as api:

        def page(asked: dict[str, Any]) -> Callable[[], None]:
            return lambda: api.get("/v1/results", limit=100, **asked)

        of = f"a page of {pytestconfig.getoption('--benchmark-results'):,} results, {kind}"
        calls = {"bare table, architecture, scale": bare, **{name: page(asked) for name, asked in INDEXED.items()}}
        table.latencies("9", of, calls, goals=dict.fromkeys(INDEXED, 0.025), rounds=60)
        others = {name: page(asked) for name, asked in OTHERS.items()}
        table.latencies("9", f"{of}, without an index", others, goals=dict.fromkeys(OTHERS, 2.0), rounds=5)
    database.close()

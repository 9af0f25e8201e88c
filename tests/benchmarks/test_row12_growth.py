"""Row 12: what a job costs from its submission to its result, the more jobs there are in the store."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from benchmarks.generated import fill
from store_lab import Lab

from service.lab.artifacts import Artifacts
from service.store import Database

SIZES = (100, 1_000, 10_000, 100_000)
GRID: dict[str, list[Any]] = {"scale": [0.25, 0.5, 1, 2.5, 5, 10, 50], "attack": ["pgd_l2", "pgd_linf"]}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_growth(table: Any, new_store: Callable[[str], str], artifacts: Artifacts, kind: str) -> None:
    seeds, databases = count(), []

    def cycle(size: int) -> Callable[[], None]:
        database = Database(new_store(kind))
        databases.append(database)
        fill(database, size)
        lab = Lab(database, artifacts)

        def run() -> None:
            lab.submit_sweep({**GRID, "seed": [next(seeds)]})
            lab.finish()

        return run

    calls = {f"{size:,} jobs": cycle(size) for size in SIZES}
    names = list(calls)
    work = f"14 jobs submitted, claimed, recorded and judged, without running them, {kind}"
    table.compare("12", work, calls, reference=names[0], goals=dict.fromkeys(names[1:], 1.2), cost=True)
    for database in databases:
        database.close()

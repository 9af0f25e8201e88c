"""A claim costs the same whether a thousand tasks wait or a million."""

import statistics
import time
from typing import Any

import pytest
from sqlalchemy import text
from store_lab import Lab

from service.model import scheduling
from service.model.scheduling import Cluster, due
from service.store import claiming, quotas
from service.store.listed import insert_rows
from service.store.tables import tasks

ROUNDS = 15


def fill(lab: Any, first: int, last: int) -> None:
    """Queued tasks of three users, nine tenths of them one user's; submitted in between are older and newer ones."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"{n:036d}", "digest": f"{n:064d}", "kind": "attack", "version": 1, "spec": {}, "generation": 1,
            "state": "queued", "train_digest": f"{n // 40:064d}", "priority": n % 3, "sequence": n,
            "sponsor": "ann" if n % 10 else ("bob" if n % 20 else "cyd"), "needed_by": 1, "waiting_since": float(n),
            "due": due(float(n), n % 3, "attack"), "paused": n % 7 == 0, "attempt": 0, "errors": 0, "suspect_losses": 0,
            "not_before": 0.0, "cancel_requested": False, "progress": 0.0, "detail": {}, "created_at": 0.0,
        }
        for n in range(first, last)
    ]  # fmt: skip
    with lab.database.write() as connection:
        insert_rows(connection, tasks, rows)


def claim(lab: Any) -> float:
    """Seconds that a claim of four bundles takes; it is rolled back."""
    started = time.perf_counter()
    with lab.database.engine.connect().execution_options(uncanny_write=True) as connection:
        queue = claiming.waiting(connection, 1e12, 512)
        accounts = quotas.accounts(connection, 1e6, {task.sponsor for task in queue}, 1e6, lab.service.limits)
        decisions = scheduling.choose(queue, accounts, Cluster(4), 1e6)
        granted = claiming.grant(connection, 1e6, "d1", 20.0, [one for of in decisions for one in of.task_ids])
        assert len(decisions) == 4
        assert granted
        connection.rollback()
    return time.perf_counter() - started


def measured(lab: Any) -> float:
    claim(lab)
    return statistics.median(claim(lab) for _ in range(ROUNDS))


@pytest.mark.slow
@pytest.mark.parametrize("many", [1_000_000])
def test_from_a_thousand_to_a_million(database: Any, artifacts: Any, many: int) -> None:
    lab = Lab(database, artifacts)
    fill(lab, 0, 1000)
    few = measured(lab)
    for first in range(1000, many, 100_000):
        fill(lab, first, min(many, first + 100_000))
    if not database.is_sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE tasks"))
    lots = measured(lab)
    print(f"\nclaim of 4 bundles: {1000 * few:.1f} ms of 1,000 queued, {1000 * lots:.1f} ms of {many:,}")
    assert lots < 2 * few + 0.01

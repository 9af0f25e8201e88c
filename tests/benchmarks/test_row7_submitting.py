"""Row 7: a sweep of 10,000 jobs over HTTP, beside as many bare rows as it writes."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from benchmarks.serving import serving
from sqlalchemy import Column, MetaData, String, Table, Text, func, select

from service.store import Database
from service.store.listed import insert_rows
from service.store.tables import events, job_tasks, jobs, task_edges, tasks

JOBS = 10_000
BASE = {"architecture": "resnet18", "dataset": "cifar10"}
GRID = {"scale": [0.25, 0.5, 1, 2.5, 5, 10, 20, 25, 50, 100], "attack": ["pgd_l2", "pgd_linf"]}
SEEDS = JOBS // 20
BARE = Table("bare", MetaData(), Column("id", String(36)), Column("other_id", String(36)), Column("spec", Text))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_sweep(table: Any, new_store: Callable[[str], str], tmp_path: Path, kind: str) -> None:
    url = new_store(kind)
    database, numbers = Database(url), count()
    BARE.create(database.engine)
    with serving(url, tmp_path) as api:
        peaks: list[int] = []

        def post() -> None:
            first = next(numbers) * SEEDS
            grid = {**GRID, "seed": list(range(first, first + SEEDS))}
            answer = api.http.post("/v1/sweeps", json={"name": "large", "base": BASE, "grid": grid})
            assert answer.status_code == 201, answer.text
            assert answer.json()["jobs"] == JOBS

        def submit() -> None:
            peaks.append(api.peak_while(post))

        submit()
        with database.read() as connection:
            every = (jobs, tasks, job_tasks, task_edges, events)
            written = sum(connection.execute(select(func.count()).select_from(one)).scalar_one() for one in every)
        spec = "x" * 300
        rows = [{"id": f"{n:036d}", "other_id": f"{n:036d}", "spec": spec} for n in range(written)]

        def bare() -> None:
            with database.write() as connection:
                insert_rows(connection, BARE, rows)

        work = f"a sweep of {JOBS:,} jobs, {written:,} rows, {kind}"
        calls = {"bare rows, one table": bare, "POST /v1/sweeps": submit}
        table.latencies("7", work, calls, goals={"POST /v1/sweeps": 3.0}, rounds=5, share=0.5)
        table.write(f"memory of the API, at most, MB: {[peak >> 20 for peak in peaks]}")
    database.close()

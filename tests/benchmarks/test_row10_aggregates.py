"""Row 10: aggregates over a million results by two fields, and all of them as Parquet, beside the database alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from benchmarks.serving import Serving, serving
from sqlalchemy import text

from service.store import Database

MB = 1 << 20
# Groups of one cell, each network once, are summed; where cells are mixed, networks are told apart by their weights.
CELL = "architecture,dataset,scale,attack,attack.norm,attack.eps,attack.step_size,attack.steps"
AGGREGATES = {
    "cell": {"by": CELL, "metrics": "robust_accuracy:mean,std,count"},
    "cell, two metrics": {"by": CELL, "metrics": "robust_accuracy:ci95,clean_accuracy:mean"},
    "user, cell, of one data set": {"by": f"user,{CELL}", "metrics": "robust_accuracy:mean", "dataset": "cifar10"},
    "a measure's, shared by jobs": {"by": CELL, "metrics": "log_relative_sharpness_median:mean"},
    "median": {"by": CELL, "metrics": "robust_accuracy:median"},
    "architecture, scale, mixed": {"by": "architecture,scale", "metrics": "robust_accuracy:mean,std,count"},
}
BARE = text(
    "SELECT architecture, scale, avg(robust_accuracy), count(*) FROM results JOIN cells ON cells.id = cell_id "
    "GROUP BY architecture, scale"
)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_aggregates_and_export(
    table: Any, many_results: Callable[[str], str], tmp_path: Path, pytestconfig: pytest.Config, kind: str
) -> None:
    url = many_results(kind)
    database = Database(url)
    of = f"{pytestconfig.getoption('--benchmark-results'):,} results, {kind}"

    def bare() -> None:
        with database.read() as connection:
            assert connection.execute(BARE).all()

    with serving(url, tmp_path) as api:

        def aggregate(asked: dict[str, str]) -> Callable[[], None]:
            return lambda: api.get("/v1/results:aggregate", allow_mixed=True, **asked)

        calls = {"one bare statement, architecture, scale": bare}
        calls |= {name: aggregate(asked) for name, asked in AGGREGATES.items()}
        table.latencies("10", f"aggregate of {of}", calls, goals=dict.fromkeys(AGGREGATES, 2.0), rounds=5, share=0.5)
        path = tmp_path / "results.parquet"
        peaks: list[int] = []
        export = lambda: peaks.append(api.peak_while(lambda: download(api, path)))  # noqa: E731
        with database.read() as connection:
            count = connection.execute(text("SELECT count(*) FROM results")).scalar_one()
        table.latencies("10", f"Parquet of {of}", {"export": export}, goals={"export": 60.0}, rounds=1)
        assert pq.read_metadata(path).num_rows == count
        table.write(
            f"memory of the API: {api.memory_bytes() / MB:.0f} MB after, peaks {[peak // MB for peak in peaks]}"
        )
    database.close()


def download(api: Serving, path: Path) -> None:
    with path.open("wb") as file, api.http.stream("GET", "/v1/results", params={"format": "parquet"}) as answer:
        for piece in answer.raise_for_status().iter_bytes():
            file.write(piece)

"""A store of MLflow's, full of runs: run with MLflow, in an environment of its own, as `mlflow_runs.py URL COUNT`.

They have the parameters, tags and metrics of results that `generated.py` makes, and are written in bulk, in its tables.
"""

import itertools
import random
import sys

from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

ARCHITECTURES = (*(f"architecture_{n}" for n in range(7)), "resnet18")
SCALES = ("0.1", "0.25", "0.5", "1", "2", "2.5", "4", "5", "7.5", "10", "20", "25", "50", "100")
METRICS = (
    "clean_accuracy", "clean_loss", "robust_accuracy", "robust_loss", "masked_fraction", "reverse_fraction",
    "zero_gradient_fraction", "log_hessian_trace_median", "log_relative_sharpness_median", "test_accuracy",
)  # fmt: skip


def fill(url: str, count: int) -> None:
    store = SqlAlchemyStore(url, "file:///nowhere")
    experiment_id = int(store.create_experiment("results"))
    rng = random.Random(0)
    grid = itertools.cycle(itertools.product(ARCHITECTURES, SCALES, range(50)))
    rows: dict[type, list[dict[str, object]]] = {kind: [] for kind in (SqlRun, SqlParam, SqlTag, SqlMetric)}
    for n, (architecture, scale, other) in zip(range(count), grid, strict=False):
        run, at = f"{n:032x}", 1_700_000_000_000 + 1000 * n
        rows[SqlRun].append({
            "run_uuid": run, "name": run, "source_type": "LOCAL", "source_name": "", "entry_point_name": "",
            "user_id": "ada", "status": "FINISHED", "start_time": at, "end_time": at + 60, "source_version": "",
            "lifecycle_stage": "active", "artifact_uri": "", "experiment_id": experiment_id,
        })  # fmt: skip
        params = {"architecture": architecture, "scale": scale, "dataset": f"dataset_{other % 5}",
                  "attack": f"attack_{other // 5}", "seed": str(n // 5600)}  # fmt: skip
        rows[SqlParam] += [{"run_uuid": run, "key": key, "value": value} for key, value in params.items()]
        rows[SqlTag] += [{"run_uuid": run, "key": key, "value": "generated"} for key in ("study", "mlflow.runName")]
        rows[SqlMetric] += [
            {"run_uuid": run, "key": key, "value": rng.random(), "timestamp": at, "step": 0, "is_nan": False}
            for key in METRICS
        ]
    with store.ManagedSessionMaker() as session:
        for kind, made in rows.items():
            session.bulk_insert_mappings(kind, made)
        session.bulk_insert_mappings(SqlLatestMetric, rows[SqlMetric])


if __name__ == "__main__":
    fill(sys.argv[1], int(sys.argv[2]))

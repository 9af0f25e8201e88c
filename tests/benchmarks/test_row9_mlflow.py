"""Row 9: a page of 100 among 20,000 results over HTTP, beside MLflow's server on the same database, in the same run."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.generated import fill
from benchmarks.serving import serving, wait_until_it_answers
from sqlalchemy import make_url

from service.store import Database

HERE = Path(__file__).resolve().parent
COUNT = 20_000
MLFLOW = ("--with", "mlflow==3.17.2", "--with", "psycopg2-binary")
DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg2"}
ASKED = {"architecture": "resnet18", "scale": 5, "sort": "-robust_accuracy", "limit": 100}
ASKED_OF_MLFLOW = {
    "experiment_ids": ["1"],
    "filter": "params.architecture = 'resnet18' and params.scale = '5'",
    "order_by": ["metrics.robust_accuracy DESC"],
    "max_results": 100,
}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_pages_beside_mlflow(table: Any, new_store: Callable[..., str], tmp_path: Path, kind: str) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv makes the environment of MLflow")
    ours, theirs = new_store(kind), make_url(new_store(kind, migrated=False)).set(drivername=DRIVERS[kind])
    database = Database(ours)
    fill(database, COUNT)
    database.close()
    with mlflow(uv, theirs.render_as_string(hide_password=False), tmp_path) as peer, serving(ours, tmp_path) as api:

        def page_of_mlflow() -> None:
            found = peer.post("/api/2.0/mlflow/runs/search", json=ASKED_OF_MLFLOW).raise_for_status().json()
            assert len(found["runs"]) == 100

        def page() -> None:
            assert len(api.get("/v1/results", **ASKED)["items"]) == 100

        calls = {"MLflow 3.17": page_of_mlflow, "ours": page}
        table.compare("9", f"a page of {COUNT:,}, {kind}", calls, reference="MLflow 3.17", goals={"ours": 15.0})


@contextmanager
def mlflow(uv: str, url: str, home: Path) -> Iterator[httpx.Client]:
    """A server of MLflow's on a store of its own, with `COUNT` runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = [uv, "run", "--isolated", "--no-project", *MLFLOW]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    subprocess.run([*run, "python", HERE / "mlflow_runs.py", url, str(COUNT)], check=True, env=environment, cwd=home)
    serve = ["mlflow", "server", "--backend-store-uri", url, "--host", "127.0.0.1", "--port", str(port), "--workers"]
    process = subprocess.Popen([*run, *serve, "1"], env=environment, cwd=home, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wait_until_it_answers(http, "/health", 120)
            yield http
    finally:
        process.terminate()
        process.wait()

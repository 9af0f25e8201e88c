"""`python -m workers.doctor`: looks at Ray and its nodes for `uncanny doctor`, and prints one line of JSON."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from service.errors import ArtifactRootUnusable, UncannyError
from service.lab.artifacts import Artifacts
from service.settings import Settings
from service.store import Database, roots
from workers.head import running, use_driver_environment
from workers.revision import code_digest, installed

# Ray is imported after its environment is prepared, and torch only by functions that need it.

START_SECONDS = 60.0
NODE_SECONDS = 120.0
SMI_SECONDS = 20.0
POLL_INTERVAL_SECONDS = 0.1
DISTRIBUTIONS = ("uncanny-bench", "ray", "torch", "torchvision", "timm")


def main() -> int:
    settings = Settings()
    answer = os.dup(1)
    os.dup2(2, 1)  # standard output is for the answer alone: what libraries print goes to standard error
    try:
        report = look(settings)
    except Exception as error:  # noqa: BLE001 - any failure is the answer
        report = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        out.write(json.dumps(report) + "\n")
    return 0


def look(settings: Settings) -> dict[str, Any]:
    """Join the cluster, or start a local Ray for this examination, and examine each node that runs tasks."""
    if not settings.ray_address:
        with running(cpus=1) as head:
            use_driver_environment(head.home, local=True)
            return _examine(settings.model_copy(update={"ray_port": head.port}), patience_seconds=START_SECONDS)
    use_driver_environment(settings.home, local=False)
    return _examine(settings, patience_seconds=0.0)


def _examine(settings: Settings, patience_seconds: float) -> dict[str, Any]:
    import ray

    from workers.cluster import connect

    started = time.monotonic()
    while True:
        try:
            connect(settings)
            break
        except ConnectionError:
            if time.monotonic() - started >= patience_seconds:
                raise
            time.sleep(POLL_INTERVAL_SECONDS)
    seconds = time.monotonic() - started
    try:
        nodes = _examine_nodes(settings)
    finally:
        ray.shutdown()
    return {
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
        "seconds": seconds,
        "code_digest": code_digest(),
        "versions": versions(),
        "nodes": nodes,
    }


def examine(artifact_root: str, mark: str, data_dir: str, marker: str) -> dict[str, Any]:
    """The report of a node on itself. `marker` is the digest of an artifact that another machine has just written.

    `mark` is the mark of the artifact root; empty if the database has none yet.
    """
    import torch

    from workers.devices import all_described, has_kernels, lacks_for_compile
    from workers.provenance import driver

    devices, trouble = all_described()
    built_for = torch.cuda.get_arch_list()
    local = artifact_root if "://" not in artifact_root else tempfile.gettempdir()
    return {
        "code_digest": code_digest(),
        "versions": versions(),
        "devices": devices,
        "torch_trouble": trouble,
        "listed": [{**gpu, "fits": has_kernels(gpu["capability"], built_for)} for gpu in driver_gpus()],
        "built_for": built_for,
        "cuda": torch.version.cuda,
        "lacks_for_compile": lacks_for_compile("cuda" if devices else "cpu"),
        "driver": driver(),
        "artifacts": _trouble(Artifacts(artifact_root, mark), marker),
        "free_bytes": shutil.disk_usage(_existing(Path(local))).free,
        "data": {name: _compare(files) for name, files in public_files(Path(data_dir)).items()},
    }


def driver_gpus() -> list[dict[str, str]]:
    """The GPUs that `nvidia-smi` lists, also those that torch cannot use: `uuid`, `name`, `capability`, `driver` and
    `compute_mode`, which says who may use it (`Default`: several processes at once). Empty if there is none.
    """
    ask = ["nvidia-smi", "--query-gpu=uuid,name,compute_cap,driver_version,compute_mode", "--format=csv,noheader"]
    try:
        output = subprocess.run(ask, capture_output=True, encoding="utf-8", timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return listed_in(output)


def listed_in(output: str) -> list[dict[str, str]]:
    """Read the lines that `nvidia-smi` prints.

    >>> listed_in("GPU-1b2c, Tesla P100-PCIE-16GB, 6.0, 535.104.05, Exclusive_Process\\n")[0]["compute_mode"]
    'Exclusive_Process'
    """
    names = ("uuid", "name", "capability", "driver", "compute_mode")
    lines = [[part.strip() for part in line.removeprefix("GPU-").split(",")] for line in output.splitlines()]
    whole = [line for line in lines if len(line) == len(names) and re.fullmatch(r"\d+\.\d+", line[2])]
    return [dict(zip(names, line, strict=True)) for line in whole]


def public_files(data_dir: Path) -> dict[str, dict[Path, str]]:
    """The files of each public data set under the data folder, with their MD5."""
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

    from workers.science.datasets.cifar import checksums

    svhn = {data_dir / file: md5 for _, file, md5 in (SVHN.split_list[split] for split in ("train", "test"))}
    return {
        **{
            name: {data_dir / source.base_folder / file: md5 for file, md5 in checksums(source).items()}
            for name, source in (("cifar10", CIFAR10), ("cifar100", CIFAR100))
        },
        "svhn": svhn,
        **{
            name: {data_dir / source.__name__ / "raw" / file: md5 for file, md5 in source.resources}
            for name, source in (("fashion_mnist", FashionMNIST), ("mnist", MNIST))
        },
    }


def versions() -> dict[str, str | None]:
    return {"python": sys.version.split()[0], **{name: installed(name) for name in DISTRIBUTIONS}}


def clock() -> float:
    """Seconds since 1970 by the clock of the node."""
    return time.time()


def _examine_nodes(settings: Settings) -> list[dict[str, Any]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark, marker = _mark(settings), ""
    artifacts = Artifacts(settings.artifacts, mark)
    with suppress(ArtifactRootUnusable):  # reported without the cluster too; each node still reports what it sees
        marker = artifacts.write_chunks("doctor", [secrets.token_bytes(64)]).digest
    reports = []
    try:
        listed: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        for node in listed:
            resources = node["Resources"]
            if not node["Alive"] or not resources.get("CPU"):
                continue
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ask = ray.remote(num_cpus=0, max_retries=0)
            report = {"name": node["NodeManagerHostname"], "cpus": resources["CPU"], "gpus": resources.get("GPU", 0.0)}
            try:
                # One call: then its process ends, and its contexts on the GPUs with it.
                once = ray.remote(num_cpus=0, max_retries=0, max_calls=1)
                examination = once(examine).options(scheduling_strategy=there)
                answer = examination.remote(settings.artifacts, mark, str(settings.data), marker)
                report.update(**ray.get(answer, timeout=NODE_SECONDS))
                before = time.time()
                node_time = ray.get(ask(clock).options(scheduling_strategy=there).remote(), timeout=NODE_SECONDS)
                after = time.time()
                report["skew_seconds"] = max(before - node_time, node_time - after, 0.0)
            except Exception as error:  # noqa: BLE001 - of one node; the others are still examined
                report["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            reports.append(report)
    finally:
        if marker:
            artifacts.delete(marker)
    return reports


def _mark(settings: Settings) -> str:
    """The mark by which the database knows the artifact root; empty if there is none."""
    database = Database(settings.database)
    try:
        database.check_schema()
        with database.read() as connection:
            return roots.mark(connection) or ""
    except UncannyError:  # reported without the cluster too
        return ""
    finally:
        database.close()


def _trouble(artifacts: Artifacts, marker: str) -> str:
    """What keeps this node from sharing the artifact root; empty if nothing does."""
    try:
        artifacts.require_mark()
        with artifacts.local(marker):
            pass
        own = artifacts.write_chunks("doctor", [secrets.token_bytes(64)]).digest
        artifacts.delete(own)
    except Exception as error:  # noqa: BLE001 - a file system or an object store may raise anything
        return f"{type(error).__name__}: {error}"
    return ""


def _compare(files: dict[Path, str]) -> dict[str, Any]:
    from workers.science.datasets.files import checksum

    present = [path for path in files if path.is_file()]
    if not present:
        return {"state": "absent", "files": []}
    wrong = [str(path) for path, md5 in files.items() if path not in present or checksum(path, "md5") != md5]
    return {"state": "damaged" if wrong else "whole", "files": wrong}


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


if __name__ == "__main__":
    sys.exit(main())

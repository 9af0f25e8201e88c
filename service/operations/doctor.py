"""Checks of the whole installation, one a line, each with advice. A child process examines the cluster.

`look_at_cluster` runs `python -m workers.doctor`, which may import Ray and torch. Its report is JSON:
`{"error"}` or `{"token", "seconds", "code_digest", "versions", "nodes": [...]}`. Each node that runs tasks has
`{"name", "cpus", "gpus"}` from Ray, and `{"error"}` or `skew_seconds` and the fields of `workers.doctor.examine`.
"""

import json
import os
import re
import secrets
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from service.errors import (
    ArtifactMissing,
    ArtifactRootUnusable,
    DatabaseAway,
    DatabaseDamaged,
    SchemaOutdated,
    UnfitDatabase,
)
from service.lab import artifact_root
from service.lab.artifacts import Artifacts
from service.model.environment import reported
from service.model.json import JsonObject
from service.settings import Settings
from service.store import Connection, Database, claiming, datasets, reading

State = Literal["ok", "warn", "fail"]
Report = JsonObject
CLUSTER_SECONDS = 180.0
SLOW_SECONDS = 0.25  # of a database's answer
SKEW_SECONDS = 2.0  # leases go by the database's clock, but times in logs and provenance do not
OLD_SECONDS = 3600.0
LOW_BYTES, LEAST_BYTES = 5 << 30, 512 << 20
PINGS = 5
USUAL_FREE = 0.9  # of a GPU's memory, when nobody uses it
LEAST_DRIVERS = {"12": 525, "13": 580}  # by CUDA's major version: NVIDIA's table of minor version compatibility


@dataclass(frozen=True)
class Check:
    """One check: its name, its state, a sentence, and advice (empty if all is well)."""

    name: str
    state: State
    said: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def examine(settings: Settings, look: Callable[[Settings], Report] | None = None) -> Iterator[Check]:
    """All checks, each as soon as it is made. Writes nothing that stays; an absent SQLite file is not made."""
    database = Database(settings.database)
    artifacts = Artifacts(settings.artifacts)
    try:
        reached = list(_database(database))
        yield from reached
        if any(check.name == "schema" and check.state == "ok" for check in reached):
            yield _clock(database)
            yield from _dispatcher(database)
            artifacts = artifact_root.as_known(database, settings.artifacts)
            yield from _registered(database, artifacts)
            yield _artifact_root(artifacts, lambda: artifact_root.check(database, settings.artifacts))
        else:
            yield _artifact_root(artifacts, lambda: None)
        yield from _disks(settings)
        yield from cluster_checks(settings, (look or look_at_cluster)(settings))
    finally:
        database.close()


def look_at_cluster(settings: Settings) -> Report:
    """The report of the child process on Ray, its nodes, their GPUs, clocks, artifacts and data."""
    command = [sys.executable, "-m", "workers.doctor"]
    environment = {**os.environ, **settings.environment()}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=CLUSTER_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"nothing was heard of it for {CLUSTER_SECONDS:g} seconds"}
    try:
        report: Report = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        summary = (done.stderr.strip() or "nothing").splitlines()[-1]
        return {"error": f"`python -m workers.doctor` ended with exit code {done.returncode} and said: {summary}"}
    return report


def _database(database: Database) -> Iterator[Check]:
    where = database.engine.url.render_as_string()
    if (path := database.path) and not path.exists():
        advice = "`uncanny serve` or `uncanny db upgrade` makes it"
        yield Check("database", "warn", f"{path} is not there yet", advice)
        return
    try:
        with database.read() as connection:
            server = " ".join(database.server_version(connection).split()[:2])
            seconds = statistics.median(_timed(database, connection) for _ in range(PINGS))
    except DatabaseDamaged as error:
        yield Check("database", "fail", str(error), "mend its disk first, then restore a backup")
        return
    except DatabaseAway as error:
        yield Check("database", "fail", str(error), "start it, or correct UNCANNY_DATABASE_URL")
        return
    except UnfitDatabase as error:
        yield Check("database", "fail", str(error), "correct UNCANNY_DATABASE_URL, or make another database")
        return
    summary = f"{'SQLite ' if database.is_sqlite else ''}{server} at {where} answers in {seconds * 1000:.1f} ms"
    if database.is_pooled():
        summary += " through a pooler: no statement is prepared, and news are looked for every 0.1 s"
    slow = seconds > SLOW_SECONDS
    yield Check("database", "warn" if slow else "ok", summary, "put the services nearer to it" if slow else "")
    try:
        database.check_schema()
    except SchemaOutdated as error:
        yield Check("schema", "fail", str(error), "uncanny db backup DIR, then uncanny db upgrade")
        return
    yield Check("schema", "ok", f"{database.revision()}, which is this version's")
    yield _writable(database)


def _writable(database: Database) -> Check:
    started = time.monotonic()
    try:
        database.check_room(doubt=True)
    except Exception as error:  # noqa: BLE001 - any error that keeps it from writing is reported
        summary = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        return Check(
            "writing", "fail", summary, "give its user the right to write, make room, or end a writer that hangs"
        )
    return Check("writing", "ok", f"a writer has its turn after {(time.monotonic() - started) * 1000:.1f} ms")


def _timed(database: Database, connection: Connection) -> float:
    started = time.monotonic()
    database.now(connection)
    return time.monotonic() - started


def _clock(database: Database) -> Check:
    with database.read() as connection:
        before = time.time()
        database_now = database.now(connection)
        after = time.time()
    skew = max(0.0, abs(database_now - (before + after) / 2) - (after - before) / 2)
    return _skewed("clock", "this machine", "the database", skew)


def _skewed(name: str, here: str, there: str, skew: float) -> Check:
    summary = f"{there} and {here} differ by {skew:.3f} s"
    if skew > SKEW_SECONDS:
        return Check(name, "warn", summary, "let NTP keep both clocks")
    return Check(name, "ok", summary)


def _dispatcher(database: Database) -> Iterator[Check]:
    with database.read() as connection:
        now = database.now(connection)
        leader = claiming.leader(connection)
        old, oldest = reading.waiting_since(connection, now - OLD_SECONDS)
        held = reading.held_tasks(connection)
    if leader is None or leader.expires_at <= now:
        since_when = f" since {now - leader.expires_at:.0f} s; {leader.holder} did" if leader else ""
        yield Check("dispatcher", "warn", f"nobody leads{since_when}", "start `uncanny serve` or `uncanny dispatch`")
    else:
        ready = bool(leader.status.get("capacity", {}).get("ready"))
        summary = f"{leader.holder} leads, its lease has {leader.expires_at - now:.0f} s left"
        advice = "" if ready else "see its log for what keeps Ray away"
        yield Check("dispatcher", "ok" if ready else "warn", summary + ("" if ready else "; it has no Ray"), advice)
        for fault in reported(leader.status):
            advice = "mend it: it is tried again by itself"
            yield Check(f"{fault.owner.replace('_', ' ')} {fault.name}", "fail", fault.sentence(now), advice)
    if oldest is not None:
        summary = f"{old} tasks wait for more than an hour, the oldest for {(now - oldest) / 3600:.1f} h"
        yield Check("queue", "warn", summary, "`uncanny jobs state=queued`: is the cluster large enough?")
    if held:
        yield Check("held", "warn", f"{held} tasks are held for review", "`uncanny jobs state=held`, then retry")
    if not old and not held:
        yield Check("queue", "ok", "no task waits for more than an hour, none is held for review")


def _registered(database: Database, artifacts: Artifacts) -> Iterator[Check]:
    """A check of each of the lab's own data sets: its bytes are still there, and unchanged."""
    with database.read() as connection:
        rows = datasets.registered(connection)
    for row in rows:
        try:
            for digest in (row.train_sha256, row.test_sha256):
                with artifacts.local(digest):
                    pass
        except (ArtifactMissing, ArtifactRootUnusable) as error:
            yield Check(f"data {row.name}", "fail", str(error), "`uncanny data add` the same folder again")
        else:
            yield Check(f"data {row.name}", "ok", "its files are artifacts with the right SHA-256")


def _artifact_root(artifacts: Artifacts, check: Callable[[], None]) -> Check:
    """`check` raises if the folder is not the artifact root; then nothing is written there."""
    content = secrets.token_bytes(64)
    started = time.monotonic()
    try:
        check()
        ref = artifacts.write_chunks("doctor", [content])
        with artifacts.open(ref.digest) as file:
            same = file.read() == content
        artifacts.delete(ref.digest)
        if not same or artifacts.exists(ref.digest):
            return Check(
                "artifacts", "fail", f"{artifacts.root} does not give back what is written", "use another root"
            )
    except Exception as error:  # noqa: BLE001 - a file system or an object store may say anything
        advice = "mount it, make it writable for this user, or set UNCANNY_ARTIFACT_ROOT"
        return Check("artifacts", "fail", f"{artifacts.root}: {error}", advice)
    milliseconds = (time.monotonic() - started) * 1000
    return Check("artifacts", "ok", f"{artifacts.root}: written, read, renamed and deleted in {milliseconds:.1f} ms")


def _disks(settings: Settings) -> Iterator[Check]:
    folders = {"home": settings.home, "data": settings.data}
    if "://" not in settings.artifacts:
        folders["artifacts"] = Path(settings.artifacts)
    by_disk: dict[int, tuple[list[str], Path]] = {}
    for name, path in folders.items():
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        by_disk.setdefault(existing.stat().st_dev, ([], existing))[0].append(name)
    for names, path in by_disk.values():
        yield room_check(f"room for {', '.join(names)}", shutil.disk_usage(path).free)


def room_check(name: str, free_bytes: int) -> Check:
    summary = f"{free_bytes / (1 << 30):.1f} GiB free"
    state: State = "ok" if free_bytes >= LOW_BYTES else "warn" if free_bytes >= LEAST_BYTES else "fail"
    return Check(name, state, summary, "" if state == "ok" else "`uncanny gc`, or a larger disk")


def cluster_checks(settings: Settings, report: Report) -> Iterator[Check]:
    """The checks that follow from the report of the child process."""
    address = settings.ray_address or "a local Ray"
    if "error" in report:
        advice = "start it (`ray start`), correct RAY_ADDRESS, or look at the token (RAY_AUTH_TOKEN_PATH)"
        yield Check("ray", "fail", f"{address}: {report['error']}", advice)
        return
    nodes: list[Report] = report["nodes"]
    count = f"{len(nodes)} node{'s' * (len(nodes) != 1)}"
    summary = f"{address}: {count} after {report['seconds']:.1f} s, Ray {report['versions']['ray']}"
    yield Check("ray", "ok" if nodes else "fail", summary, "" if nodes else "start a worker: `ray start --address=...`")
    if report["token"]:
        yield Check("ray token", "ok", "asked for, and the right one")
    else:
        advice = "start it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH; until then keep its ports private"
        yield Check("ray token", "warn", "whoever reaches Ray's ports can run code", advice)
    for node in nodes:
        yield from _node(settings, report, node)


def _node(settings: Settings, report: Report, node: Report) -> Iterator[Check]:
    name = f"node {node['name']}"
    if "error" in node:
        yield Check(name, "fail", node["error"], "look at its log under /tmp/ray, or take it out of the cluster")
        return
    yield _same_code(name, report, node)
    yield _gpus(name, node)
    yield from _devices(settings, name, node)
    if lacks := node["lacks_for_compile"]:
        advice = "install that there, or ask for no recipe with `compile: true`"
        yield Check(f"{name} compiler", "warn", f"no {', no '.join(lacks)}: `compile: true` fails there", advice)
    yield _skewed(f"{name} clock", "this machine", "it", node["skew_seconds"])
    if node["artifacts"]:
        advice = "the artifact root must be the same place on every node: a shared folder, or an fsspec URL"
        yield Check(f"{name} artifacts", "fail", node["artifacts"], advice)
    else:
        yield Check(f"{name} artifacts", "ok", "reads what was written here, writes and deletes")
    yield room_check(f"{name} room", node["free_bytes"])
    yield from _data(name, node["data"])


def _same_code(name: str, report: Report, node: Report) -> Check:
    other = [f"{key} {value}" for key, value in node["versions"].items() if value != report["versions"].get(key)]
    if node["code_digest"] != report["code_digest"]:
        advice = "install one version everywhere: until then the dispatcher claims nothing"
        return Check(name, "fail", "its code is not this machine's", advice)
    if other:
        advice = "numbers may differ in their last digits: install the same versions"
        return Check(name, "warn", f"the same code, but {', '.join(other)}", advice)
    return Check(name, "ok", f"the same code and versions, CPUs for tasks: {node['cpus']:g}")


def _gpus(name: str, node: Report) -> Check:
    label, counted, trouble = f"{name} gpus", node["gpus"], node["torch_trouble"]
    seen = [device["name"] for device in node["devices"]]
    if not seen and not counted and not trouble:
        return Check(label, "ok", "none: tasks run on its CPUs")
    summary = f"Ray has {counted:g}, torch sees {len(seen)} ({', '.join(seen)}); {_driver(node) or 'no driver'}"
    if too_old := _too_old(node):
        return Check(label, "fail", f"{summary}: {too_old}", "install a newer driver, or a torch for an older CUDA")
    if trouble or counted > len(seen):
        advice = "install a driver and a torch that fit each other, or the container toolkit"
        return Check(label, "fail", f"{summary}: {trouble}" if trouble else summary, advice)
    if counted < len(seen):
        return Check(label, "warn", summary, f"start Ray there with --num-gpus={len(seen)}")
    return Check(label, "ok", summary)


def _driver(node: Report) -> str:
    return next((f"driver {gpu['driver']}" for gpu in node["listed"]), node["driver"] or "")


def _too_old(node: Report) -> str:
    """A sentence if the node's driver is older than its torch needs; empty if it is not, or if nobody knows."""
    least = LEAST_DRIVERS.get(str(node["cuda"]).partition(".")[0])
    version = re.search(r"\b(\d{3,})\.\d", _driver(node))
    if least is None or version is None or int(version[1]) >= least:
        return ""
    return f"its torch is built with CUDA {node['cuda']}, which needs driver {least} or newer"


def _devices(settings: Settings, name: str, node: Report) -> Iterator[Check]:
    """A check of each GPU: whether it computes, who may use it, and how much of its memory others have.

    If torch can use no GPU, the GPUs that it has no kernels for fail: another driver alone would not help them.
    """
    shared = 0 < settings.gpus_per_task < 1 or any(0 < (each.gpus or 0) < 1 for each in settings.resources.values())
    modes = {gpu["uuid"]: gpu["compute_mode"] for gpu in node["listed"]}
    for index, device in enumerate(node["devices"]):
        label, mode = f"{name} gpu {index}", modes.get(device["uuid"], "Default")
        summary = f"{_kind(device)}, {device['free_bytes'] / (1 << 30):.1f} GiB free"
        if not device["fits"]:
            yield _without_kernels(label, summary, node)
        elif device["trouble"]:
            advice = "install a driver and a torch that fit it, or have it tested; until then it gets no tasks"
            yield Check(label, "fail", f"{summary}: {device['trouble']}", advice)
        elif mode != "Default":  # a worker that is done keeps its context there for the next task
            advice = "let several processes use it: `nvidia-smi --compute-mode=DEFAULT`"
            state: State = "fail" if shared or mode == "Prohibited" else "warn"
            yield Check(label, state, f"{summary}: its compute mode is {mode}", advice)
        elif device["free_bytes"] < USUAL_FREE * device["total_bytes"]:
            advice = "end what else runs there, or start Ray with fewer GPUs"
            yield Check(label, "warn", f"{summary} of {device['total_bytes'] / (1 << 30):.1f}: others use it", advice)
        else:
            yield Check(label, "ok", f"{summary}: it computes")
    if not node["devices"]:
        for index, listed in enumerate(node["listed"]):
            if not listed["fits"]:
                yield _without_kernels(f"{name} gpu {index}", _kind(listed), node)


def _kind(gpu: Report) -> str:
    return f"{gpu['name']}, compute capability {gpu['capability']}"


def _without_kernels(label: str, summary: str, node: Report) -> Check:
    built = ", ".join(node["built_for"]) or "CPUs alone"
    advice = "start Ray there without it, or install a torch that has kernels for it"
    return Check(label, "fail", f"{summary}: torch has no kernels for it, which is built for {built}", advice)


def _data(name: str, data: dict[str, JsonObject]) -> Iterator[Check]:
    whole = [dataset for dataset, status in data.items() if status["state"] == "whole"]
    absent = [dataset for dataset, status in data.items() if status["state"] == "absent"]
    for dataset, status in data.items():
        if status["state"] == "damaged":
            advice = f"put the original of {', '.join(status['files'])} there"
            yield Check(f"{name} data {dataset}", "fail", "files are missing or have other checksums", advice)
    summary = f"{', '.join(whole) or 'no public data set'} with the right checksums"
    yield Check(f"{name} data", "ok", summary + (f"; downloaded when asked for: {', '.join(absent)}" if absent else ""))

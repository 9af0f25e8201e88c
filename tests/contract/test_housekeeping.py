"""What goes and what stays, on both databases; and that nothing goes which somebody is about to refer to."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, update
from store_lab import Lab

from service import private
from service.lab.artifacts import Artifacts
from service.model.events import EventKind
from service.model.executor import ArtifactRef, Grant, Progress
from service.operations.housekeeping import Policy, Report, collect, keep_house
from service.settings import Settings
from service.store import Database, history, tables
from service.store.history import Event

pytestmark = pytest.mark.slow


HOUR = 3600.0
AGED = Policy(age_seconds=HOUR)


def gc(lab: Lab, policy: Policy = AGED, **options: Any) -> Report:
    return collect(lab.database, lab.artifacts, policy, **options)


def write(lab: Lab, content: bytes, kind: str = "arrays") -> ArtifactRef:
    return lab.artifacts.write_chunks(kind, [content])


def age(lab: Lab, *refs: ArtifactRef, hours: float = 2) -> None:
    """As if these had been published so long ago."""
    for ref in refs:
        path = Path(lab.artifacts.root) / ref.digest[:2] / ref.digest
        with suppress(FileNotFoundError):  # collected already
            os.utime(path, (time.time() - hours * HOUR,) * 2)


def age_all(lab: Lab, hours: float = 2) -> None:
    age(lab, *(ArtifactRef(one.digest, one.size_bytes, "") for one in lab.artifacts.stored()), hours=hours)


def checkpoint(lab: Lab, grant: Grant, content: bytes) -> ArtifactRef:
    ref = write(lab, content, "epoch_state")
    lab.record(Progress(grant.task_id, grant.attempt, 0.5, {}, ref))
    return ref


def test_bytes_without_a_row_go_once_they_are_old(lab: Lab) -> None:
    old, young = write(lab, b"old"), write(lab, b"young")
    age(lab, old)
    assert gc(lab, dry_run=True).unreferenced.count == 1
    assert lab.artifacts.exists(old.digest), "a dry run changes nothing"
    report = gc(lab)
    assert (report.unreferenced.count, report.unreferenced.size_bytes) == (1, 3)
    assert (report.kept.count, report.kept.size_bytes) == (1, 5)
    assert not lab.artifacts.exists(old.digest)
    assert lab.artifacts.exists(young.digest)


def test_what_results_rest_on_stays_whatever_the_quota(lab: Lab) -> None:
    lab.submit_sweep()
    lab.finish()
    train, test = write(lab, b"train", "upload"), write(lab, b"test", "upload")
    shape = {"channels": 1, "height": 8, "width": 8, "classes": 10, "train_count": 1, "test_count": 1}
    mine = {"name": "mine", "created_by": "a", "created_at": 0.0}
    images = {**mine, **shape, "train_sha256": train.digest, "test_sha256": test.digest}
    weights = write(lab, b"weights", "checkpoint")
    fitted = {
        **mine, "architecture": "mlp", "dataset": "npz:mine", "uploaded_sha256": "0" * 64, "keys": {}, "mean": [0.0],
        "std": [1.0], "channels": 1, "height": 8, "width": 8, "classes": 10, "weights_sha256": weights.digest,
        "size_bytes": weights.size_bytes, "parameters": 1,
    }  # fmt: skip
    with lab.database.write() as connection:
        connection.execute(insert(tables.datasets).values(images))
        connection.execute(insert(tables.checkpoints).values(fitted))
    age_all(lab)
    before = {one.digest for one in lab.artifacts.stored()}
    report = gc(lab, Policy(HOUR, quota_bytes=0))
    assert {one.digest for one in lab.artifacts.stored()} == before
    assert report.over_quota_bytes == report.kept.size_bytes > 0


def test_epoch_states_that_nothing_would_start_from(lab: Lab) -> None:
    """Of a task that waits or runs they stay, of one that failed until they are old, superseded ones go at once."""
    for seed in range(3):
        lab.submit(seed=seed)
    running, failed, outdated = lab.grant("train")
    kept, useless = checkpoint(lab, running, b"running"), checkpoint(lab, failed, b"failed")
    first = checkpoint(lab, outdated, b"first")
    second = checkpoint(lab, outdated, b"second")
    with lab.database.write() as connection:  # as a dispatcher leaves it that is killed between row and bytes
        row = {"digest": first.digest, "task_id": outdated.task_id, "kind": "epoch_state", "size_bytes": 5}
        connection.execute(insert(tables.artifacts).values(**row, created_at=0.0))
    lab.fail(failed)
    assert gc(lab).epoch_states.count == 1
    assert not lab.artifacts.exists(first.digest)
    assert lab.artifacts.exists(useless.digest)
    with lab.database.write() as connection:
        done = tables.tasks.c.id == failed.task_id
        connection.execute(update(tables.tasks).where(done).values(finished_at=0.0))
    assert gc(lab).epoch_states.count == 1
    assert {one.digest for one in lab.artifacts.stored()} == {kept.digest, second.digest}
    assert lab.task(failed.task_id).resume_digest is None
    assert lab.task(running.task_id).resume_digest == kept.digest


def test_a_quota_takes_epoch_states_of_what_is_over_then_arrays_oldest_first(lab: Lab) -> None:
    lab.submit()
    [train] = lab.grant("train")
    lab.succeed(train)
    checkpoints = sum(one.size_bytes for one in lab.artifacts.stored())
    arrays = []
    for i, grant in enumerate(lab.grant("attack")):
        lab.succeed(grant)
        arrays.append(write(lab, b"array" * 100 + bytes([i])))
        row = {"digest": arrays[-1].digest, "task_id": grant.task_id, "kind": "arrays", "size_bytes": 501}
        with lab.database.write() as connection:
            connection.execute(insert(tables.artifacts).values(**row, created_at=float(i)))
    lab.submit(seed=1)
    [other] = lab.grant("train")
    state = checkpoint(lab, other, b"state" * 100)
    lab.fail(other)
    before = sum(one.size_bytes for one in lab.artifacts.stored())
    fits = gc(lab, Policy(HOUR, quota_bytes=before - 1), dry_run=True)
    assert (fits.epoch_states.count, fits.arrays.count) == (1, 0)
    report = gc(lab, Policy(HOUR, quota_bytes=before - 501))
    assert (report.epoch_states.count, report.arrays.count, report.over_quota_bytes) == (1, 1, 0)
    assert not lab.artifacts.exists(state.digest)
    assert [lab.artifacts.exists(ref.digest) for ref in arrays] == [False, *[True] * (len(arrays) - 1)]
    assert gc(lab, Policy(HOUR, quota_bytes=checkpoints)).arrays.count == len(arrays) - 1


def test_old_events_go_from_the_oldest_on(database: Database, artifacts: Artifacts) -> None:
    lab = Lab(database, artifacts)
    with lab.database.write() as connection:
        now = lab.database.now(connection)
        for days in (9, 8, 3, 7, 1):
            history.append(connection, now - days * 86_400, "ann", [Event(EventKind.SWEEP_SUBMITTED)] * 5)
    assert gc(lab).events.count == 0, "they are the audit log"
    week = Policy(HOUR, event_seconds=5 * 86_400)
    assert gc(lab, week, dry_run=True).events.count == 10
    assert gc(lab, week).events.count == 10
    assert [event.id for event in lab.rows(tables.events)] == list(range(11, 26))
    assert gc(lab, Policy(HOUR, event_seconds=1)).events.count == 14
    with lab.database.write() as connection:
        history.append(connection, now, "ann", [Event(EventKind.SWEEP_SUBMITTED)])
    assert [event.id for event in lab.rows(tables.events)] == [25, 26], "the newest stays, and the next follows it"


def test_leftovers_of_processes_that_are_gone(lab: Lab, tmp_path: Path) -> None:
    write(lab, b"x")
    root, sessions = Path(lab.artifacts.root), tmp_path / "home" / private.SESSIONS
    dead, alive = f"session_2026-01-01_00-00-00_000000_{2**22 + 1}", f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    folders = [root / ".writing-old", root / ".writing-now", sessions / dead, sessions / alive]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "bytes").write_bytes(b"12345")
    for folder in (folders[0], folders[2], folders[3]):
        for path in (folder / "bytes", folder):
            os.utime(path, (0, 0))
    report = gc(lab, home=tmp_path / "home")
    assert (report.leftovers.count, report.leftovers.size_bytes) == (2, 10)
    assert [folder.exists() for folder in folders] == [False, True, False, True]


def test_nothing_goes_that_is_being_referred_to(lab: Lab) -> None:
    """Workers publish new bytes, and old unreferenced ones once more, and rows follow later, while it collects."""
    lab.submit()
    [grant] = lab.grant("train")
    stop = threading.Event()
    wanted: list[str] = []
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(60):
                content = f"{number} {i}".encode()
                if i % 2:
                    age(lab, write(lab, content), hours=2)  # garbage of long ago, the same bytes
                ref = write(lab, content)
                time.sleep(0.002 * (i % 3))
                row = {"digest": ref.digest, "task_id": grant.task_id, "kind": "arrays", "size_bytes": ref.size_bytes}
                with lab.database.write() as connection:
                    connection.execute(insert(tables.artifacts).values(**row, created_at=0.0))
                wanted.append(ref.digest)
        except BaseException as error:  # noqa: BLE001 - looked at below
            problems.append(error)

    def garbage() -> None:
        number = 0
        while not stop.is_set():
            try:
                number += 1
                age(lab, write(lab, b"garbage %d" % number))
                gc(lab)
            except BaseException as error:  # noqa: BLE001 - looked at below
                problems.append(error)
                return

    workers = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    collector = threading.Thread(target=garbage)
    for thread in (*workers, collector):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    collector.join()
    gc(lab)
    assert problems == []
    assert len(wanted) == 180
    assert [digest for digest in wanted if not lab.artifacts.exists(digest)] == []
    assert {one.digest for one in lab.artifacts.stored()} == set(wanted)


def test_an_object_store_is_collected_too(lab: Lab) -> None:
    store = Artifacts("memory://lab/artifacts")
    ref = store.write_chunks("arrays", [b"bytes"])
    assert collect(lab.database, store, AGED).unreferenced.count == 0
    assert collect(lab.database, store, Policy(age_seconds=-HOUR)).unreferenced.count == 1
    assert not store.exists(ref.digest)


def test_what_an_object_store_has_got_anew_since_it_was_listed_stays() -> None:
    store = Artifacts(f"memory://{uuid4().hex}")
    ref = store.write_chunks("arrays", [b"bytes"])
    listed = next(store.stored()).modified_at
    store.write_chunks("arrays", [b"bytes"])
    assert not store.discard(ref.digest, older_than=listed + 1e-6)
    assert store.exists(ref.digest)
    assert store.discard(ref.digest, older_than=time.time() + HOUR)
    assert not store.discard(ref.digest, older_than=time.time() + HOUR), "another collector was faster"


def test_only_who_leads_keeps_house(lab: Lab, tmp_path: Path) -> None:
    age(lab, write(lab, b"old"))
    settings = Settings(home=tmp_path, gc_every_seconds=0.01)
    stop = threading.Event()
    asked = iter([False, True])

    def leads() -> bool:
        leading = next(asked, None)
        if leading is None:
            stop.set()
        return bool(leading)

    before = gc(lab, dry_run=True).unreferenced.count
    age_all(lab, hours=48)
    keep_house(lab.database, lab.artifacts, settings, leads, stop)
    assert (before, list(lab.artifacts.stored())) == (1, [])
    keep_house(lab.database, lab.artifacts, Settings(home=tmp_path), pytest.fail, threading.Event())

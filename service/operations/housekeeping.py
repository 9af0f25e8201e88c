"""Collects garbage: bytes that nothing refers to, useless epoch states, old events, leftovers of killed processes.

At any quota, these stay: checkpoints, uploads and data sets, the epoch state of any task that is not over,
and every number, bit and curve (those are rows, not artifacts). These go, in this order:

1. artifacts without a row that names them, once they are older than `age_seconds`: a worker publishes bytes first, and
   the row follows when its dispatcher has recorded the outcome, which may take as long as the database is away;
2. epoch states that no attempt would resume from: their task succeeded, or a later state has taken their place; and
   those of tasks that failed or were cancelled more than `age_seconds` ago (a retry then starts from the first epoch);
3. over `quota_bytes`: the epoch states of all other tasks that are over, then arrays (whole trajectories, kept for
   another look; their summaries are rows), oldest first, until what is left fits;
4. events older than `event_seconds`, from the oldest on, so that the ids of those that stay have no gap. They are the
   audit log: without that setting, all stay. The newest one always stays;
5. `.writing-*` folders under the root and sessions of a local Ray under home, of processes that are gone.

It is safe beside dispatchers and running workers: rows go in one writing transaction that checks them again, and bytes
are renamed first, which is undone if they were published again meanwhile.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from service import private
from service.errors import UncannyError
from service.lab.artifacts import Artifacts, Stored
from service.model.json import JsonObject
from service.settings import Settings
from service.store import Condition, Database, artifact_index, history

log = logging.getLogger("uncanny.housekeeping")
BATCH = 500
EVENT_BATCH = 10_000


@dataclass(frozen=True)
class Policy:
    """How long and how much; None is no limit."""

    age_seconds: float
    quota_bytes: int | None = None
    event_seconds: float | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        days = settings.event_days
        return cls(settings.gc_age_seconds, settings.artifact_quota_bytes, None if days is None else days * 86_400)


@dataclass
class Tally:
    """A number of artifacts, files or events, and their bytes."""

    count: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        self.count += 1
        self.size_bytes += size_bytes


@dataclass
class Report:
    """What was deleted, or would be. `kept` stays under the root; no rule deletes the `over_quota_bytes`."""

    dry_run: bool
    unreferenced: Tally = field(default_factory=Tally)
    epoch_states: Tally = field(default_factory=Tally)
    arrays: Tally = field(default_factory=Tally)
    events: Tally = field(default_factory=Tally)
    leftovers: Tally = field(default_factory=Tally)
    kept: Tally = field(default_factory=Tally)
    over_quota_bytes: int = 0

    def as_json(self) -> JsonObject:
        return asdict(self)


def collect(
    database: Database, artifacts: Artifacts, policy: Policy, *, home: Path | None = None, dry_run: bool = False
) -> Report:
    """Delete all that the policy allows. Raises `DatabaseAway` and errors of the file system; it can be run again then.

    If the folder is not the artifact root, it raises `ArtifactRootUnusable` and deletes nothing.
    """
    artifacts.require_mark()
    report = Report(dry_run)
    with database.read() as connection:
        now = database.now(connection)
    # Listed first, so that no artifact that is recorded from now on counts as old.
    stored = {artifact.digest: artifact for artifact in artifacts.stored()}
    gone: set[str] = set()

    def discard(digests: Iterable[str], tally: Tally, older_than: float) -> None:
        for digest in digests:
            artifact = stored.get(digest)
            if artifact is not None and digest not in gone and (dry_run or artifacts.discard(digest, older_than)):
                gone.add(digest)
                tally.add(artifact.size_bytes)

    before = now - policy.age_seconds
    old = [artifact.digest for artifact in stored.values() if artifact.modified_at < before]
    discard(_unnamed(database, old), report.unreferenced, before)
    useless = artifact_index.useless_epoch_states(before)
    discard(_forget(database, useless, dry_run), report.epoch_states, math.inf)
    if policy.quota_bytes is not None:
        over = _total(stored, gone) - policy.quota_bytes
        for kind, tally in (("epoch_state", report.epoch_states), ("arrays", report.arrays)):
            if over > 0:
                with database.read() as connection:
                    chosen = artifact_index.oldest_of_ended_tasks(connection, kind, over, gone)
                evicted = artifact_index.of_ended_tasks(kind, chosen)
                discard(_forget(database, evicted, dry_run), tally, math.inf)
                over = _total(stored, gone) - policy.quota_bytes
        report.over_quota_bytes = max(0, over)
    report.events.count = _forget_events(database, now, policy.event_seconds, dry_run)
    _sweep_leftovers(artifacts, home, before, report.leftovers, dry_run)
    report.kept = Tally(len(stored) - len(gone), _total(stored, gone))
    return report


def _unnamed(database: Database, digests: Sequence[str]) -> Iterator[str]:
    """The digests that no row names. Each batch is looked up right before it is used."""
    for first in range(0, len(digests), BATCH):
        batch = digests[first : first + BATCH]
        with database.read() as connection:
            referenced = artifact_index.named_among(connection, batch)
        yield from (digest for digest in batch if digest not in referenced)


def _total(stored: dict[str, Stored], gone: set[str]) -> int:
    return sum(artifact.size_bytes for artifact in stored.values() if artifact.digest not in gone)


def _forget(database: Database, which: Condition, dry_run: bool) -> list[str]:
    """Delete these rows of the index; returns the digests that no row refers to any more."""
    if dry_run:
        with database.read() as connection:
            return artifact_index.digests_where(connection, which)
    with database.write() as connection:
        return artifact_index.forget(connection, which)


def _forget_events(database: Database, now: float, seconds: float | None, dry_run: bool) -> int:
    if seconds is None:
        return 0
    with database.read() as connection:
        first, end = history.older_than(connection, now - seconds)
    if dry_run or first == end:
        return end - first
    for before in [*range(first + EVENT_BATCH, end, EVENT_BATCH), end]:
        with database.write() as connection:
            history.forget(connection, before)
    return end - first


def _sweep_leftovers(artifacts: Artifacts, home: Path | None, before: float, tally: Tally, dry_run: bool) -> None:
    for path in [*artifacts.leftovers(before), *(_dead_sessions(home / private.SESSIONS, before) if home else [])]:
        size = sum(file.lstat().st_size for file in (path, *path.rglob("*")) if file.is_file())
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        tally.add(size)


def _dead_sessions(folder: Path, before: float) -> list[Path]:
    """Sessions of a local Ray, `session_DATE_TIME_MICROSECONDS_PID`, whose process is gone."""
    sessions = [path for path in folder.glob("session_*_*_*_*") if path.is_dir() and not path.is_symlink()]
    dead = [path for path in sessions if not psutil.pid_exists(int(path.name.rpartition("_")[2] or 0))]
    return [path for path in dead if path.stat().st_mtime < before]


def keep_house(
    database: Database, artifacts: Artifacts, settings: Settings, leads: Callable[[], bool], stop: threading.Event
) -> None:
    """Collect every `gc_every_seconds` while `leads()`, until `stop` is set; never if it is 0."""
    while settings.gc_every_seconds and not stop.wait(settings.gc_every_seconds):
        if not leads():
            continue
        try:
            report = collect(database, artifacts, Policy.of(settings), home=settings.home)
        except (UncannyError, OSError) as error:
            log.warning("garbage was not collected: %s", error)
        except Exception:
            log.exception("garbage was not collected")
        else:
            log.info("garbage collected: %s", report.as_json())

"""What can go: bytes that nothing refers to, epoch states that are of no use, old events, leftovers of what was killed.

What stays, whatever a quota says: checkpoints, uploads and data sets, the epoch state of any task that is not over,
and every number, bit and curve (those are rows, not artifacts). In the order in which things go:

1. artifacts without a row that names them, once they are older than `age_seconds`: a worker publishes bytes first, and
   the row follows when its dispatcher has recorded the outcome, which may take as long as the database is away;
2. epoch states that no resumption would start from: their task succeeded, or a later one has taken their place; and
   those of tasks that failed or were cancelled more than `age_seconds` ago (a retry then starts from the first epoch);
3. over `quota_bytes`: the epoch states of all other tasks that are over, then arrays (whole trajectories, kept for
   another look; their summaries are rows), oldest first, until what is left fits;
4. events older than `event_seconds`, from the oldest on, so that the ids of those that stay have no gap. They are the
   audit log: without that setting, all stay. The newest one always stays;
5. `.writing-*` folders under the root and sessions of a local Ray under home, of processes that are gone.

It is safe beside dispatchers and running workers: rows go in one writing transaction that looks again, and bytes are
taken away by a rename that is undone where they turn out to have just been published once more.
"""

import logging
import math
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select, union, update

from service import private
from service.errors import UncannyError
from service.lab.artifacts import Artifacts, Stored
from service.model.jobs import ENDED_TASK, TaskState
from service.settings import Settings
from service.store import Database
from service.store.listed import listed
from service.store.tables import NAMES_BYTES, events, tasks
from service.store.tables import artifacts as rows

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
class Pile:
    """So many things, of so many bytes."""

    count: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        self.count += 1
        self.size_bytes += size_bytes


@dataclass
class Report:
    """What went, or would go; `kept` is what is left under the root, `over_quota_bytes` what no rule lets go."""

    dry_run: bool
    unreferenced: Pile = field(default_factory=Pile)
    epoch_states: Pile = field(default_factory=Pile)
    arrays: Pile = field(default_factory=Pile)
    events: Pile = field(default_factory=Pile)
    leftovers: Pile = field(default_factory=Pile)
    kept: Pile = field(default_factory=Pile)
    over_quota_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(
    database: Database, artifacts: Artifacts, policy: Policy, *, home: Path | None = None, dry_run: bool = False
) -> Report:
    """Let go what the policy lets go. Raises `DatabaseAway` and what the file system says; may be run again then.

    Nothing goes where the folder is not the artifact root: raises `ArtifactRootUnusable`.
    """
    artifacts.require_mark()
    report = Report(dry_run)
    with database.read() as connection:
        now = database.now(connection)
    # Listed first: whatever is recorded from here on is newer than what is old now.
    stored = {one.digest: one for one in artifacts.stored()}
    gone: set[str] = set()

    def discard(digests: Iterable[str], pile: Pile, older_than: float) -> None:
        for digest in digests:
            one = stored.get(digest)
            if one is not None and digest not in gone and (dry_run or artifacts.discard(digest, older_than)):
                gone.add(digest)
                pile.add(one.size_bytes)

    old = [one.digest for one in stored.values() if one.modified_at < now - policy.age_seconds]
    for first in range(0, len(old), BATCH):
        with database.read() as connection:
            named = _named(connection, old[first : first + BATCH])
        unnamed = [digest for digest in old[first : first + BATCH] if digest not in named]
        discard(unnamed, report.unreferenced, now - policy.age_seconds)
    discard(_forget(database, _useless(now - policy.age_seconds), dry_run), report.epoch_states, math.inf)
    if policy.quota_bytes is not None:
        over = _total(stored, gone) - policy.quota_bytes
        which = tasks.c.state.in_(ENDED_TASK)
        for kind, pile in (("epoch_state", report.epoch_states), ("arrays", report.arrays)):
            if over > 0:
                chosen = _oldest(database, kind, which, over, gone)
                evicted = and_(which, rows.c.kind == kind, rows.c.digest.in_(listed(chosen)))
                discard(_forget(database, evicted, dry_run), pile, math.inf)
                over = _total(stored, gone) - policy.quota_bytes
        report.over_quota_bytes = max(0, over)
    report.events.count = _forget_events(database, now, policy.event_seconds, dry_run)
    _sweep_leftovers(artifacts, home, now - policy.age_seconds, report.leftovers, dry_run)
    report.kept = Pile(len(stored) - len(gone), _total(stored, gone))
    return report


def _total(stored: dict[str, Stored], gone: set[str]) -> int:
    return sum(one.size_bytes for one in stored.values() if one.digest not in gone)


def _named(connection: Connection, digests: list[str]) -> set[str]:
    """Those of these digests that some row refers to."""
    found = union(*(select(column.label("digest")).where(column.in_(digests)) for column in NAMES_BYTES))
    return set(connection.scalars(found))


def _useless(before: float) -> ColumnElement[bool]:
    """Of artifacts joined to their tasks: epoch states that nothing will start from."""
    outdated = or_(tasks.c.resume_digest.is_(None), tasks.c.resume_digest != rows.c.digest)
    over = tasks.c.state.in_([TaskState.FAILED, TaskState.CANCELLED])
    useless = or_(tasks.c.state == TaskState.SUCCEEDED, outdated, and_(over, tasks.c.finished_at < before))
    return and_(rows.c.kind == "epoch_state", useless)


def _oldest(database: Database, kind: str, which: ColumnElement[bool], size_bytes: int, gone: set[str]) -> list[str]:
    """Digests of that kind, from the oldest on, that are together at least so large, or all there are."""
    query = select(rows.c.digest, rows.c.size_bytes).join(tasks, tasks.c.id == rows.c.task_id)
    chosen: dict[str, int] = {}
    with database.read() as connection:
        for digest, size in connection.execute(query.where(rows.c.kind == kind, which).order_by(rows.c.created_at)):
            if sum(chosen.values()) >= size_bytes:
                break
            if digest not in gone:
                chosen[digest] = size
    return list(chosen)


def _forget(database: Database, which: ColumnElement[bool], dry_run: bool) -> list[str]:
    """Drop these rows, and what would resume from them; returns those digests that nothing refers to any more."""
    query = select(rows.c.digest, rows.c.task_id).join(tasks, tasks.c.id == rows.c.task_id).where(which)
    if dry_run:
        with database.read() as connection:
            return [digest for digest, _ in connection.execute(query)]
    with database.write() as connection:
        found = connection.execute(query).all()
        pairs = [f"{row.digest}:{row.task_id}" for row in found]
        connection.execute(delete(rows).where((rows.c.digest + ":" + rows.c.task_id).in_(listed(pairs))))
        resumed = (tasks.c.resume_digest + ":" + tasks.c.id).in_(listed(pairs))
        connection.execute(update(tasks).where(resumed).values(resume_digest=None, resume_bytes=None))
        digests = [row.digest for row in found]
        named: set[str] = set()
        for first in range(0, len(digests), BATCH):
            named |= _named(connection, digests[first : first + BATCH])
    return [digest for digest in dict.fromkeys(digests) if digest not in named]


def _forget_events(database: Database, now: float, seconds: float | None, dry_run: bool) -> int:
    if seconds is None:
        return 0
    in_order = select(events.c.id).order_by(events.c.id).limit(1)
    with database.read() as connection:
        first = connection.execute(in_order).scalar_one_or_none()
        kept = connection.execute(in_order.where(events.c.at >= now - seconds)).scalar_one_or_none()
        newest = connection.execute(select(func.max(events.c.id))).scalar_one()
    end = newest if kept is None else kept
    if first is None or dry_run:
        return 0 if first is None else int(end - first)
    for before in [*range(first + EVENT_BATCH, end, EVENT_BATCH), end]:
        with database.write() as connection:
            connection.execute(delete(events).where(events.c.id < before))
    return int(end - first)


def _sweep_leftovers(artifacts: Artifacts, home: Path | None, before: float, pile: Pile, dry_run: bool) -> None:
    for path in [*artifacts.leftovers(before), *(_dead_sessions(home / private.SESSIONS, before) if home else [])]:
        size = sum(one.lstat().st_size for one in (path, *path.rglob("*")) if one.is_file())
        if not dry_run:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        pile.add(size)


def _dead_sessions(folder: Path, before: float) -> list[Path]:
    """Sessions of a local Ray, `session_DATE_TIME_MICROSECONDS_PID`, whose process is gone."""
    found = [path for path in folder.glob("session_*_*_*_*") if path.is_dir() and not path.is_symlink()]
    dead = [path for path in found if not psutil.pid_exists(int(path.name.rpartition("_")[2] or 0))]
    return [path for path in dead if path.stat().st_mtime < before]


def keep_house(
    database: Database, artifacts: Artifacts, settings: Settings, leads: Callable[[], bool], stop: threading.Event
) -> None:
    """Collect every `gc_every_seconds` while `leads()`, until `stop` is set. Not at all where that is 0."""
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

"""The index of artifacts: which rows name which bytes, and which rows may be dropped."""

from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, or_, select, union, update

from service.model.jobs import ENDED_TASK, TaskState
from service.store.listed import listed
from service.store.tables import NAMES_BYTES, artifacts, tasks

AT_ONCE = 500
UPLOADED = ""  # in place of a task's id


def keep_uploads(connection: Connection, now: float, kind: str, sizes: Mapping[str, int]) -> None:
    """Index uploads that a registration names, like artifacts of a task; `sizes` has their sizes in bytes by digest."""
    for digest, size_bytes in sizes.items():
        present = (artifacts.c.digest == digest) & (artifacts.c.task_id == UPLOADED)
        if connection.execute(select(artifacts.c.digest).where(present)).one_or_none() is None:
            row = {"digest": digest, "task_id": UPLOADED, "kind": kind, "size_bytes": size_bytes, "created_at": now}
            connection.execute(insert(artifacts).values(row))


def named_digests(connection: Connection) -> list[str]:
    """The digests of all bytes that some row refers to."""
    every = union(*(select(column).where(column.is_not(None)) for column in NAMES_BYTES))
    return sorted(set(connection.scalars(every)))


def named_among(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Those of these digests that some row refers to."""
    referenced: set[str] = set()
    for first in range(0, len(digests), AT_ONCE):
        batch = digests[first : first + AT_ONCE]
        queries = (select(column).where(column.in_(batch)) for column in NAMES_BYTES)
        referenced |= set(connection.scalars(union(*queries)))
    return referenced


def useless_epoch_states(before: float) -> ColumnElement[bool]:
    """Epoch states from which no training will start again.

    The task succeeded, or it failed or was cancelled earlier than `before`, or a later epoch has replaced the state.
    """
    outdated = or_(tasks.c.resume_digest.is_(None), tasks.c.resume_digest != artifacts.c.digest)
    over = tasks.c.state.in_([TaskState.FAILED, TaskState.CANCELLED])
    useless = or_(tasks.c.state == TaskState.SUCCEEDED, outdated, and_(over, tasks.c.finished_at < before))
    return and_(artifacts.c.kind == "epoch_state", useless)


def of_ended_tasks(kind: str, digests: Collection[str]) -> ColumnElement[bool]:
    """Those of these artifacts whose tasks have ended."""
    return and_(tasks.c.state.in_(ENDED_TASK), artifacts.c.kind == kind, artifacts.c.digest.in_(listed(digests)))


def oldest_of_ended_tasks(connection: Connection, kind: str, size_bytes: int, without: Collection[str]) -> list[str]:
    """Digests of that kind, from the oldest on, that are together at least `size_bytes` large, or all of them."""
    query = select(artifacts.c.digest, artifacts.c.size_bytes).join(tasks, tasks.c.id == artifacts.c.task_id)
    query = query.where(artifacts.c.kind == kind, tasks.c.state.in_(ENDED_TASK)).order_by(artifacts.c.created_at)
    chosen: dict[str, int] = {}
    for digest, size in connection.execute(query):
        if sum(chosen.values()) >= size_bytes:
            break
        if digest not in without:
            chosen[digest] = size
    return list(chosen)


def digests_where(connection: Connection, which: ColumnElement[bool]) -> list[str]:
    """The digests of the rows that `forget` would drop, also those that another row refers to."""
    return [digest for digest, _ in _of_tasks(connection, which)]


def forget(connection: Connection, which: ColumnElement[bool]) -> list[str]:
    """Drop these rows, and resume no task from them; returns the digests that no row refers to any more."""
    artifacts_of_tasks = _of_tasks(connection, which)
    pairs = [f"{digest}:{task_id}" for digest, task_id in artifacts_of_tasks]
    connection.execute(delete(artifacts).where((artifacts.c.digest + ":" + artifacts.c.task_id).in_(listed(pairs))))
    resumed = (tasks.c.resume_digest + ":" + tasks.c.id).in_(listed(pairs))
    connection.execute(update(tasks).where(resumed).values(resume_digest=None, resume_bytes=None))
    digests = list(dict.fromkeys(digest for digest, _ in artifacts_of_tasks))
    referenced = named_among(connection, digests)
    return [digest for digest in digests if digest not in referenced]


def _of_tasks(connection: Connection, which: ColumnElement[bool]) -> list[tuple[str, str]]:
    """`(digest, task id)` of each row."""
    query = select(artifacts.c.digest, artifacts.c.task_id).join(tasks, tasks.c.id == artifacts.c.task_id)
    return [(digest, task_id) for digest, task_id in connection.execute(query.where(which))]

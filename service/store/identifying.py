"""Ids by a prefix that nothing else begins with: jobs together with sweeps, tasks by id or digest, tokens."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, func, select, true

from service.errors import AmbiguousId
from service.store.tables import jobs, sweeps, tasks, tokens

Kind = Literal["job", "sweep", "task", "token"]
LEAST = 8  # characters of a prefix
PREFIX = re.compile(f"[0-9a-f]{{{LEAST}}}[0-9a-f-]{{0,55}}")
HEXADECIMAL = re.compile(f"[0-9a-f-]{{{LEAST},64}}")
UNDASHED = re.compile("[0-9a-f]{32}")
WHOLE = (36, 64)  # characters of an id, and of a digest
SHOWN = 4  # candidates that a refusal names

# Where ids of a kind are, the kind's own first. A command that takes a job or a sweep must not take the wrong one.
PLACES: dict[Kind, dict[str, Column[str]]] = {
    "job": {"job": jobs.c.id, "sweep": sweeps.c.id},
    "sweep": {"sweep": sweeps.c.id, "job": jobs.c.id},
    "task": {"task": tasks.c.id, "task with the digest": tasks.c.digest},
    "token": {"token": tokens.c.id},
}


def canonical(given: str) -> str:
    """An id, a digest or a prefix of one in small letters without blanks around; anything else as it is."""
    small = given.strip().lower()
    return small if HEXADECIMAL.fullmatch(small) else given


def dashed(given: str) -> str:
    """An id with its dashes where only these are missing; anything else as it is."""
    return str(UUID(given)) if UNDASHED.fullmatch(given) else given


def is_prefix(given: str) -> bool:
    return len(given) not in WHOLE and PREFIX.fullmatch(given.lower()) is not None


def whole(connection: Connection, kind: Kind, given: str, *, user: str | None = None) -> str:
    """The id that begins so; what begins none, or that of another kind, comes back as it is.

    Capitals, blanks around and missing dashes of a whole id change nothing.

    `user`: whose tokens are looked at, all of them without. Raises `AmbiguousId` with the candidates.
    """
    given = prefix = canonical(given)
    if not is_prefix(given):
        return given
    mine = tokens.c.user == user if kind == "token" and user is not None else true()
    found = [
        (noun, ident)
        for noun, column in PLACES[kind].items()
        for ident in connection.scalars(
            select(column).where(begins(column, prefix), mine).order_by(column).limit(SHOWN + 1)
        )
    ]
    match found:
        case [(noun, ident)]:
            return ident if kind in ("task", "token") or noun == kind else given
        case []:
            return dashed(given)
    named = ", ".join(f"{noun} {ident}" for noun, ident in found[:SHOWN])
    more = ", ..." if len(found) > SHOWN else ""
    raise AmbiguousId(f"more than one id begins with {given}: {named}{more}; give more of it")


def shortest(connection: Connection, idents: Sequence[str]) -> dict[str, str]:
    """For each of these ids of jobs and sweeps its shortest prefix that no other has now, of `LEAST` at the least."""
    return {ident: _shortest(connection, ident) for ident in idents}


def _shortest(connection: Connection, ident: str) -> str:
    """As much as it has in common with its neighbours in the order of ids, and one character more."""
    near = [
        select(edge).where(side).scalar_subquery()
        for column in PLACES["job"].values()
        for edge, side in ((func.max(column), column < ident), (func.min(column), column > ident))
    ]
    neighbours = connection.execute(select(*near)).one()
    common = max(_in_common(ident, other or "") for other in neighbours)
    return ident[: max(LEAST, common + 1)]


def _in_common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def begins(column: Column[str], prefix: str) -> ColumnElement[bool]:
    """As a range, for the index on it. Its bounds are of hexadecimal digits, which every collation puts in order."""
    kept = prefix.rstrip("-f")
    if not kept:
        return column >= prefix
    after = kept[:-1] + {"9": "a"}.get(kept[-1], chr(ord(kept[-1]) + 1))
    return (column >= prefix) & (column < after)

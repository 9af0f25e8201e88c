"""Ids by a unique prefix: of jobs together with sweeps, of tasks by id or digest, of tokens."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Literal
from uuid import UUID

from sqlalchemy import Column, ColumnElement, Connection, func, select, true

from service.errors import AmbiguousId
from service.store.tables import jobs, sweeps, tasks, tokens

Kind = Literal["job", "sweep", "task", "token"]
LEAST = 8  # characters that a prefix must have
PREFIX = re.compile(f"[0-9a-f]{{{LEAST}}}[0-9a-f-]{{0,55}}")
HEXADECIMAL = re.compile(f"[0-9a-f-]{{{LEAST},64}}")
UNDASHED = re.compile("[0-9a-f]{32}")
WHOLE = (36, 64)  # characters of an id, and of a digest
SHOWN = 4  # the most candidates that an error names

# The columns in which a prefix is looked up, those of the kind itself first. Jobs and sweeps are looked up together, so
# that a prefix of both is ambiguous and no command takes the wrong one.
ID_COLUMNS: dict[Kind, dict[str, Column[str]]] = {
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
    """An id with its dashes if only these are missing; anything else as it is."""
    return str(UUID(given)) if UNDASHED.fullmatch(given) else given


def is_prefix(given: str) -> bool:
    return len(given) not in WHOLE and PREFIX.fullmatch(given.lower()) is not None


def whole(connection: Connection, kind: Kind, given: str, *, user: str | None = None) -> str:
    """The only id that begins with `given`. If there is none, or it is of another kind, `given` comes back as it is.

    Capitals, surrounding blanks and missing dashes of a whole id change nothing.

    With `user`, only the tokens of this user are looked at. Raises `AmbiguousId` with the candidates.
    """
    given = prefix = canonical(given)
    if not is_prefix(given):
        return given
    allowed = tokens.c.user == user if kind == "token" and user is not None else true()
    matches = [
        (noun, ident)
        for noun, column in ID_COLUMNS[kind].items()
        for ident in connection.scalars(
            select(column).where(begins(column, prefix), allowed).order_by(column).limit(SHOWN + 1)
        )
    ]
    match matches:
        case [(noun, ident)]:
            return ident if kind in ("task", "token") or noun == kind else given
        case []:
            return dashed(given)
    candidates = ", ".join(f"{noun} {ident}" for noun, ident in matches[:SHOWN])
    more = ", ..." if len(matches) > SHOWN else ""
    raise AmbiguousId(f"more than one id begins with {given}: {candidates}{more}; give more of it")


def shortest(connection: Connection, idents: Sequence[str]) -> dict[str, str]:
    """The shortest prefix of each of these ids of jobs and sweeps that is unique now, of `LEAST` characters or more."""
    return {ident: _shortest(connection, ident) for ident in idents}


def _shortest(connection: Connection, ident: str) -> str:
    """One character more than the id has in common with either neighbour in the order of ids."""
    near = [
        select(edge).where(side).scalar_subquery()
        for column in ID_COLUMNS["job"].values()
        for edge, side in ((func.max(column), column < ident), (func.min(column), column > ident))
    ]
    neighbours = connection.execute(select(*near)).one()
    common = max(_common_length(ident, other or "") for other in neighbours)
    return ident[: max(LEAST, common + 1)]


def _common_length(first: str, second: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def begins(column: Column[str], prefix: str) -> ColumnElement[bool]:
    """A range, for an index on the column. Its bounds end in hexadecimal digits: every collation orders these."""
    kept = prefix.rstrip("-f")
    if not kept:
        return column >= prefix
    after = kept[:-1] + {"9": "a"}.get(kept[-1], chr(ord(kept[-1]) + 1))
    return (column >= prefix) & (column < after)

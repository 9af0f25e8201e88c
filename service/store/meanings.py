"""Values of closed lists, and names of rows: what a text stands for in `=`, `!=`, `in`, `not in`, if it is known.

A value that no row can have would give an answer that looks right: no rows, or with `not` all of them.
"""

import re
from collections.abc import Callable, Collection, Iterable

from sqlalchemy import Column, Connection, select, union

from service.dotted import near, or_rather
from service.errors import InvalidQuery
from service.specs import catalog
from service.specs.base import shorten
from service.store import identifying
from service.store.tables import datasets, jobs, sweeps, users

Meaning = Callable[[Connection, str, str], Collection[str]]
"""The stored values that a text of the field of that name stands for. Raises `ValueError` where it is unknown."""

UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
PREFIX = re.compile("[0-9a-f-]{8,36}")  # of a sweep's id
LOOKED_AT = 1000  # names that an unknown one is compared with, the newest
MANY = 5  # ids that a prefix of several names


def one_of(texts: Collection[str]) -> Meaning:
    """The meaning of texts that stand for themselves, where only these are known."""
    known = tuple(texts)

    def itself(_: Connection, name: str, text: str) -> Collection[str]:
        if text not in known:
            raise ValueError(f"unknown {name} {shorten(text)}{or_rather(text[:100], known)}")
        return (text,)

    return itself


def dataset(connection: Connection, name: str, text: str) -> Collection[str]:
    """A known data set, or a registered one as `npz:NAME`."""
    if text in catalog.DATASETS:
        return (text,)
    registered = [f"npz:{own}" for own in connection.scalars(select(datasets.c.name).order_by(datasets.c.name))]
    return one_of((*catalog.DATASETS, *registered))(connection, name, text)


def user(connection: Connection, name: str, text: str) -> Collection[str]:
    """Who has submitted a job or a sweep, or is registered."""
    named = (select(users.c.name), select(jobs.c.user), select(sweeps.c.user))
    queries = (query.where(query.selected_columns[0] == text).limit(1) for query in named)
    if any(connection.execute(query).first() for query in queries):
        return (text,)
    newest = select(jobs.c.user).order_by(jobs.c.sequence.desc()).limit(LOOKED_AT).subquery()
    registered = select(users.c.name).limit(LOOKED_AT).subquery()
    others = connection.scalars(union(select(newest.c.user), select(registered.c.name)))
    raise ValueError(f"unknown {name} {shorten(text)}: nobody of this name has submitted a job{_rather(text, others)}")


def sweep(connection: Connection, name: str, text: str) -> Collection[str]:
    """The ids of the sweep with this id, else of all with this name, else of the one whose id begins like this."""
    exact = select(sweeps.c.id).where((sweeps.c.id == text) | (sweeps.c.name == text)).order_by(sweeps.c.id)
    ids = list(connection.scalars(exact))
    if text in ids:
        return (text,)
    if not ids and PREFIX.fullmatch(text):
        begins = select(sweeps.c.id).where(sweeps.c.id.startswith(text)).order_by(sweeps.c.id)
        ids = list(connection.scalars(begins.limit(MANY + 1)))
        if len(ids) > 1:
            listed = ", ".join(ids[:MANY]) + (" and more" if len(ids) > MANY else "")
            raise ValueError(f"the ids of several sweeps begin with {shorten(text)}: {listed}")
    if not ids:
        newest = select(sweeps.c.name).order_by(sweeps.c.id.desc()).limit(LOOKED_AT)
        meant = _rather(text, connection.scalars(newest))
        raise ValueError(f"there is no {name} with the id or the name {shorten(text)}{meant}")
    return ids


def beginning_of(noun: str, *columns: Column[str]) -> Meaning:
    """An id or a digest as it is, or the only one in these columns that begins so, by 8 characters or more."""

    def whole(connection: Connection, name: str, text: str) -> Collection[str]:
        if not identifying.is_prefix(text):
            return (text,)
        prefix = text.lower()
        begin = union(*(select(column).where(identifying.begins(column, prefix)) for column in columns))
        ids = sorted(connection.scalars(begin.limit(MANY + 1)))
        if not ids:
            raise ValueError(f"there is no {noun} whose {name} begins with {shorten(text)}")
        if len(ids) > 1:
            listed = ", ".join(ids[:MANY]) + (" and more" if len(ids) > MANY else "")
            raise ValueError(f"the {name} of more than one {noun} begins with {shorten(text)}: {listed}")
        return ids

    return whole


def checked(connection: Connection, meaning: Meaning, parameter: str, text: str) -> Collection[str]:
    """What the value of a query parameter stands for. Raises `InvalidQuery`."""
    try:
        return meaning(connection, parameter, storable(text))
    except ValueError as error:
        raise InvalidQuery(parameter, str(error)) from None


def storable(text: str) -> str:
    """The same text. Raises `ValueError` for one that no database keeps."""
    if bad := UNSTORABLE.search(text):
        raise ValueError(f"a text has the control character {bad[0]!r}")
    return text


def _rather(text: str, names: Iterable[str]) -> str:
    found = near(text[:100], dict.fromkeys(names))
    return f"; did you mean {' or '.join(found)}?" if found else ""

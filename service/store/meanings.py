"""What a text in a comparison stands for: a value of a closed list, the name of a row, an id or a digest.

A text that no row can have is refused. Its answer would look right: no rows, or with `not` all of them.
"""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import Column, ColumnElement, Connection, select, union

from service.errors import InvalidQuery
from service.model.dotted import near, or_rather
from service.model.names import DIGEST, ID, OWN_DATASET, UNSTORABLE
from service.model.threat_model import ball_of
from service.specs import catalog
from service.specs.base import number, shorten
from service.specs.parameters import closed_lists
from service.store.identifying import begins, canonical, dashed, is_prefix
from service.store.result_tables import cells, results
from service.store.tables import checkpoints, datasets, jobs, sweeps, users
from service.store.typed import contains


@dataclass(frozen=True)
class Meaning:
    """For a field that has only certain texts. Both functions take its name and a text, and raise `ValueError`.

    `whole`: the stored values that the text stands for. `check_part`: that a value of the field can contain the text.
    """

    whole: Callable[[Connection, str, str], Collection[str]]
    check_part: Callable[[Connection, str, str], None]


PREFIX = re.compile("[0-9a-f-]{8,36}")  # the beginning of a sweep's id
AN_ID = "01a22e44-9123-71d6-aad1-a6e470f2988b"  # as an example
NORMS = closed_lists()["attack.norm"]
LOOKED_AT = 1000  # an unknown name is compared with so many names, the newest
MANY = 5  # the most ids that the error for an ambiguous prefix names


def one_of(texts: Iterable[str]) -> Meaning:
    """The meaning of texts that stand for themselves, if they are one of these."""
    options = tuple(texts)
    return among(lambda _: options)


def among(known: Callable[[Connection], Collection[str]]) -> Meaning:
    """The same, with the known texts read from the store."""

    def itself(connection: Connection, name: str, text: str) -> Collection[str]:
        texts = tuple(known(connection))
        if text not in texts:
            raise ValueError(f"unknown {name} {shorten(text)}{or_rather(text[:100], texts)}")
        return (text,)

    def check_part(connection: Connection, name: str, text: str) -> None:
        texts = tuple(known(connection))
        if not any(text in option for option in texts):
            raise ValueError(f"no {name} contains {shorten(text)}{or_rather(text[:100], texts)}")

    return Meaning(itself, check_part)


def _datasets(connection: Connection) -> Collection[str]:
    """The data sets of the catalogue, and the registered ones as `npz:NAME`."""
    registered = connection.scalars(select(datasets.c.name).order_by(datasets.c.name))
    return (*catalog.DATASETS, *(OWN_DATASET + name for name in registered))


def _balls(connection: Connection) -> list[str]:
    """The threat models of all results."""
    query = select(cells.c.threat_model).where(cells.c.threat_model.is_not(None)).distinct()
    return list(connection.scalars(query.order_by(cells.c.threat_model)))


def _ball(connection: Connection, name: str, text: str) -> Collection[str]:
    """A norm and an eps, however the eps is spelled. It must be that of a result, unless no result has one."""
    norm, _, eps = text.partition(" ")
    balls = _balls(connection)
    hint = f" (known are: {', '.join(balls) or 'none'})"
    try:
        ball = ball_of(norm, number(eps)) if norm in NORMS and number(eps) > 0 else None
    except ValueError:
        ball = None
    if ball is None:
        raise ValueError(f"{shorten(text)} is no {name} such as 'linf 8/255' or 'l2 0.5'{hint}")
    if balls and ball not in balls:
        raise ValueError(f"no result has the {name} {shorten(ball)}{hint}")
    return (ball,)


def _part_of_a_ball(connection: Connection, name: str, text: str) -> None:
    if balls := _balls(connection):
        among(lambda _: balls).check_part(connection, name, text)


def _people(*columns: Column[str]) -> Meaning:
    """Users that one of these columns names, that have submitted a job or a sweep, or that are registered."""
    name_columns = (users.c.name, jobs.c.user, sweeps.c.user, *columns)

    def there_is(connection: Connection, test: Callable[[Column[str]], ColumnElement[bool]]) -> bool:
        queries = (select(column).where(test(column)).limit(1) for column in name_columns)
        return any(connection.execute(query).first() for query in queries)

    def rather(connection: Connection, text: str) -> str:
        newest = select(jobs.c.user).order_by(jobs.c.sequence.desc()).limit(LOOKED_AT).subquery()
        registered = select(users.c.name).limit(LOOKED_AT).subquery()
        return _rather(text, connection.scalars(union(select(newest.c.user), select(registered.c.name))))

    def itself(connection: Connection, name: str, text: str) -> Collection[str]:
        if there_is(connection, lambda column: column == text):
            return (text,)
        meant = rather(connection, text)
        raise ValueError(f"unknown {name} {shorten(text)}: nobody of this name has submitted a job{meant}")

    def check_part(connection: Connection, name: str, text: str) -> None:
        if not there_is(connection, lambda column: contains(column, text)):
            raise ValueError(f"the name of no {name} contains {shorten(text)}{rather(connection, text)}")

    return Meaning(itself, check_part)


def _sweep(connection: Connection, name: str, text: str) -> Collection[str]:
    """The ids of the sweep with this id, else of all with this name, else of the one whose id begins like this."""
    exact = select(sweeps.c.id).where((sweeps.c.id == text) | (sweeps.c.name == text)).order_by(sweeps.c.id)
    ids = list(connection.scalars(exact))
    if text in ids:
        return (text,)
    if not ids and PREFIX.fullmatch(small := dashed(canonical(text))):
        begins = select(sweeps.c.id).where(sweeps.c.id.startswith(small)).order_by(sweeps.c.id)
        ids = list(connection.scalars(begins.limit(MANY + 1)))
        if len(ids) > 1:
            listed = ", ".join(ids[:MANY]) + (" and more" if len(ids) > MANY else "")
            raise ValueError(f"the ids of several sweeps begin with {shorten(text)}: {listed}")
    if not ids:
        newest = select(sweeps.c.name).order_by(sweeps.c.id.desc()).limit(LOOKED_AT)
        meant = _rather(text, connection.scalars(newest))
        raise ValueError(f"there is no {name} with the id or the name {shorten(text)}{meant}")
    return ids


def _beginning_of(noun: str, shape: re.Pattern[str], what: str, *columns: Column[str]) -> Meaning:
    """Texts of this shape, or the only one in these columns that begins with 8 or more given characters."""

    def whole(connection: Connection, name: str, text: str) -> Collection[str]:
        if shape.fullmatch(small := dashed(canonical(text))):
            return (small,)
        if not is_prefix(small):
            raise ValueError(f"{shorten(text)} is no {name}, which is {what}, nor its first 8 characters or more")
        begin = union(*(select(column).where(begins(column, small)) for column in columns))
        ids = sorted(connection.scalars(begin.limit(MANY + 1)))
        if not ids:
            raise ValueError(f"there is no {noun} whose {name} begins with {shorten(text)}")
        if len(ids) > 1:
            listed = ", ".join(ids[:MANY]) + (" and more" if len(ids) > MANY else "")
            raise ValueError(f"the {name} of more than one {noun} begins with {shorten(text)}: {listed}")
        return ids

    return Meaning(whole, _part_of_shape(what))


def id_of(noun: str, *columns: Column[str]) -> Meaning:
    """An id, or its beginning if no other id in these columns has it."""
    return _beginning_of(noun, ID, f"an id such as {AN_ID}", *columns)


def digest_of_task(*columns: Column[str]) -> Meaning:
    """The digest of a task, or its beginning if no other digest in these columns has it."""
    return _beginning_of("task", DIGEST, A_DIGEST, *columns)


def _checkpoint(connection: Connection, name: str, text: str) -> Collection[str]:
    """The name of a registered checkpoint, or the SHA-256 of weights."""
    query = select(checkpoints.c.name).order_by(checkpoints.c.name)
    if DIGEST.fullmatch(text):
        return (text,)
    return among(lambda _: list(connection.scalars(query))).whole(connection, name, text)


def _shaped(shape: re.Pattern[str], what: str) -> Meaning:
    """Texts of this shape, of hexadecimal digits and `-`: each stands for itself in small letters."""

    def itself(_: Connection, name: str, text: str) -> Collection[str]:
        if not shape.fullmatch(small := dashed(canonical(text))):
            raise ValueError(f"{shorten(text)} is no {name}, which is {what}")
        return (small,)

    return Meaning(itself, _part_of_shape(what))


def _part_of_shape(what: str) -> Callable[[Connection, str, str], None]:
    def check_part(_: Connection, name: str, text: str) -> None:
        if not re.fullmatch("[0-9a-f-]*", text):
            raise ValueError(f"{shorten(text)} is no part of a {name}, which is {what}")

    return check_part


def checked(connection: Connection, meaning: Meaning, parameter: str, text: str) -> Collection[str]:
    """The stored values that the value of a query parameter stands for. Raises `InvalidQuery`."""
    try:
        return meaning.whole(connection, parameter, storable(text))
    except ValueError as error:
        raise InvalidQuery(parameter, str(error)) from None


def storable(text: str) -> str:
    """The same text. Raises `ValueError` if it has a character that no database keeps."""
    if bad := UNSTORABLE.search(text):
        raise ValueError(f"a text has the control character {bad[0]!r}")
    return text


def _rather(text: str, names: Iterable[str]) -> str:
    similar = near(text[:100], dict.fromkeys(names))
    return f"; did you mean {' or '.join(similar)}?" if similar else ""


A_DIGEST = "a SHA-256 of 64 hexadecimal digits (`~` takes a part of one)"
dataset, user, retracted_by = among(_datasets), _people(), _people(results.c.retracted_by)
threat_model = Meaning(_ball, _part_of_a_ball)
sweep = Meaning(_sweep, _part_of_shape(f"compared by its id, such as {AN_ID}: name it whole with `=`"))
digest = _shaped(DIGEST, A_DIGEST)
checkpoint = Meaning(_checkpoint, lambda *_: None)

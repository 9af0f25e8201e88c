"""Strict reading of JSON bodies: duplicate keys, NaN and all else without a single meaning are refused."""

import json
from itertools import accumulate

from anyio import CapacityLimiter, to_thread
from fastapi import Request

from api.http.limits import is_of_sweeps
from service.errors import InvalidSpec
from service.model.json import JsonObject
from service.model.pointers import pointer_to
from service.specs.base import TOO_SMALL, shorten, underflows

LARGE_BYTES = 64 << 10  # a larger body is parsed in a thread, not on the event loop
PARSERS = CapacityLimiter(2)  # threads that parse large bodies
MAX_FIELDS = 1000  # of one object
MAX_NAME = 1000  # characters of a field's name
MAX_DEPTH = 1000
MAX_VALUES, MAX_SWEEP_VALUES = 20_000, 1_500_000  # of a body as a whole
SENT_AS = "the body must be JSON in UTF-8, sent with `Content-Type: application/json`"


class NotJson(InvalidSpec):
    """The body cannot be read as JSON with one meaning."""


class NotSentAsJson(InvalidSpec):
    """The `Content-Type` of the body is another one than JSON's."""


def check_sent(error: JsonObject) -> None:
    """Raises `NotSentAsJson` or `NotJson` for an error of pydantic which says that there was no JSON in the body.

    It is checked so late because the caller has to be known before anything is said about the body.
    """
    if isinstance(error.get("input"), bytes):
        raise NotSentAsJson([("", SENT_AS)])
    if (error["type"], tuple(error["loc"])) == ("missing", ("body",)):
        raise NotJson([("", f"the body is empty: {SENT_AS}")])


class StrictRequest(Request):
    """A request whose JSON is read by `read`."""

    async def json(self) -> object:
        if not hasattr(self, "_json"):
            body = await self.body()
            _check_values(body, MAX_SWEEP_VALUES if is_of_sweeps(self.scope["path"]) else MAX_VALUES)
            if len(body) <= LARGE_BYTES:
                self._json = read(body)
            else:
                self._json = await to_thread.run_sync(read, body, limiter=PARSERS)
        return self._json


def _check_values(body: bytes, most: int) -> None:
    """Raises before anything is parsed: a body of a few megabytes can have more values than fit in memory."""
    if (values := sum(body.count(mark) for mark in (b",", b"[", b"{"))) > most:
        if _is_deep(body[:LARGE_BYTES]):
            raise NotJson([("", "the body is nested too deep")])
        raise InvalidSpec([("", f"the body has {values:,} values or more, at most {most:,} are taken")])


def _is_deep(body: bytes) -> bool:
    """Whether brackets are nested too deep for any parser. Brackets in strings count too."""
    depths = accumulate(1 if byte in b"[{" else -1 for byte in body if byte in b"[]{}")
    return max(depths, default=0) > MAX_DEPTH


class _Constant(str):
    """`NaN`, `Infinity` or `-Infinity`: Python's parser accepts them, but JSON does not have them."""


class _TooSmall(float):
    """0.0 for a number that is not 0, such as 1e-400."""


def read(body: bytes) -> object:
    """The JSON value of a body. Raises `NotJson`, or `InvalidSpec` for a number beyond Python's int or float64."""
    constants: list[_Constant] = []
    too_small: list[_TooSmall] = []

    def constant(text: str) -> _Constant:
        constants.append(_Constant(text))
        return constants[-1]

    def decimal(text: str) -> float:
        if not underflows(text):
            return float(text)
        too_small.append(_TooSmall())
        return too_small[-1]

    try:
        value = json.loads(body.decode(), object_pairs_hook=_each_once, parse_constant=constant, parse_float=decimal)
    except UnicodeDecodeError:
        raise NotJson([("", SENT_AS)]) from None
    except json.JSONDecodeError as error:
        raise NotJson([("", f"the body is not JSON: {error.msg} at position {error.pos}")]) from None
    except RecursionError:
        raise NotJson([("", "the body is nested too deep")]) from None
    except ValueError as error:  # int() takes no more digits
        raise InvalidSpec([("", shorten(str(error).partition(":")[0]))]) from None
    if constants:
        pointer = _pointer(value, constants[0]) or ""
        raise NotJson([(pointer, f"{constants[0]} is no number in JSON, and no field takes it")])
    if too_small:
        raise InvalidSpec([(_pointer(value, too_small[0]) or "", f"the number {TOO_SMALL}")])
    return value


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these fields. Python, like most parsers, would silently take the last of two equal keys."""
    if len(pairs) > MAX_FIELDS:
        raise InvalidSpec([("", f"an object of the body has {len(pairs):,} fields, at most {MAX_FIELDS:,} are taken")])
    fields = dict(pairs)
    if fields and len(longest := max(fields, key=len)) > MAX_NAME:
        raise InvalidSpec([("", f"{shorten(longest)} is too long for the name of a field")])
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise NotJson([("", f"{shorten(twice)} is there more than once in one object: say it once")])
    return fields


def _pointer(value: object, wanted: _Constant | _TooSmall) -> str | None:
    """The JSON pointer to this very object in `value`."""
    if value is wanted:
        return ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        inner_pointer = _pointer(inner, wanted)
        if inner_pointer is not None:
            return pointer_to(name) + inner_pointer
    return None

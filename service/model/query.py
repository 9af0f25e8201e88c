"""The filter grammar: a text becomes a tree of frozen values, which `service/store/conditions.py` turns into SQL.

    architecture = resnet18 and attack.eps <= 8/255 and not (verdict in (suspect, invalid) or robust_loss is null)

A part of a field's name may stand in quotes, as in `labels."my key"`. A value is a bare word or stands in quotes; its
field decides on its meaning: a text, a number or a fraction, true or false, a time in ISO 8601. `~` asks whether a text
contains the value; upper and lower case differ.

A date alone is that day in UTC, and a time the millisecond that is shown: `= 2026-01-31` is within the day, `<=` up to
its end, `>` behind it. Fields that can be some texts only, such as verdicts, states, threat models, users, ids and
digests, take no others, `~` no text that none of them contains, and they have no order. `sweep` takes an id, 8 or more
of its first characters, or a name, which stands for all sweeps that have it.

A comparison with a missing value is never true, not with `!=` and `not in` either; `not` turns that around: the rows
of `not x = 1` include those without x, the rows of `x != 1` do not.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, assert_never, cast

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError

from service.errors import InvalidQuery

MAX_LENGTH = 20_000
MAX_COMPARISONS = 200
MAX_DEPTH = 20  # of nested `not` and brackets; SQLite's parser has a small stack
FILTER = "filter"
LABEL = "label"
NAME = re.compile(r'(?:[^,"]|"[^"]*"?)+')
QUOTED_PART = re.compile(r'\."([^"\\]+)"')

GRAMMAR = r"""
?start: either
?either: both (_OR both)*
?both: term (_AND term)*
?term: _NOT term                        -> negation
     | "(" either ")"
     | FIELD OPERATOR value             -> comparison
     | FIELD _IN values                 -> is_in
     | FIELD _NOT _IN values            -> is_not_in
     | FIELD _IS _NULL                  -> is_null
     | FIELD _IS _NOT _NULL             -> is_not_null
values: "(" value ("," value)* ")"
value: WORD | QUOTED
OPERATOR: "!=" | "<=" | ">=" | "=" | "<" | ">" | "~"
_OR.2: /or\b(?![.\w-])/i
_AND.2: /and\b(?![.\w-])/i
_NOT.2: /not\b(?![.\w-])/i
_IN.2: /in\b(?![.\w-])/i
_IS.2: /is\b(?![.\w-])/i
_NULL.2: /null\b(?![.\w-])/i
FIELD: /(?!(?:and|or|not|in|is|null)(?![.\w-]))[A-Za-z_][A-Za-z0-9_]*(?:\.(?:[A-Za-z0-9_:+-]+|"[^"\\]+"))*/i
WORD: /(?!(?:and|or|not|in|is|null)(?![.\w\/:+-]))[\w.\/:+@%*-]+/i
QUOTED: /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/s
%ignore /\s+/
"""
EXPECTED = {
    "FIELD": "a field",
    "OPERATOR": "an operator (= != < <= > >= ~ in, is null)",
    "WORD": "a value",
    "QUOTED": "a value in quotes",
    "_OR": "`or`",
    "_AND": "`and`",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "COMMA": "`,`",
    "_NULL": "`null`",
    "_NOT": "`not`",
    "$END": "the end",
}

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "~", "in", "not in", "is null", "is not null"]


@dataclass(frozen=True)
class Value:
    """A value as it was written, and where: the position in the text, None for one that came without a text."""

    text: str
    position: int | None = dataclasses.field(default=None, compare=False)


@dataclass(frozen=True)
class Comparison:
    """One field compared; `parameter` is the query parameter that asked for it."""

    field: str
    operator: Operator
    values: tuple[Value, ...] = ()
    position: int | None = dataclasses.field(default=None, compare=False)
    parameter: str = dataclasses.field(default=FILTER, compare=False)


@dataclass(frozen=True)
class Not:
    inner: "Node"


@dataclass(frozen=True)
class And:
    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Or:
    parts: tuple["Node", ...]


Node = Comparison | Not | And | Or


def fields_of(nodes: Iterable[Node]) -> set[str]:
    """The names of all fields that these compare."""
    names: set[str] = set()
    for node in nodes:
        match node:
            case Comparison():
                names.add(node.field)
            case Not():
                names |= fields_of([node.inner])
            case And() | Or():
                names |= fields_of(node.parts)
            case _:
                assert_never(node)
    return names


def parse(text: str) -> Node:
    """The tree of a filter. Raises `InvalidQuery` with the position of an error and what could stand there."""
    if len(text) > MAX_LENGTH:
        raise InvalidQuery(FILTER, f"it has {len(text):,} characters; {MAX_LENGTH:,} are allowed")
    try:
        node, _ = cast("tuple[Node, int]", _parser().parse(text))
    except UnexpectedInput as error:
        raise _syntax(error, text) from None
    except VisitError as error:
        if isinstance(error.orig_exc, InvalidQuery):
            raise error.orig_exc from None
        raise
    check_size([node])
    return node


def check_size(nodes: Sequence[Node]) -> None:
    """Raises `InvalidQuery` for more comparisons, of a filter and simple filters together, than a database takes."""
    if sum(len(comparisons(node)) for node in nodes) > MAX_COMPARISONS:
        raise InvalidQuery(FILTER, f"it has more than {MAX_COMPARISONS} comparisons; use `in (...)` for many values")


def names_of(text: str) -> tuple[str, ...]:
    """Names by comma, each once: `scale, labels."my, key"` are `scale` and `labels.my, key`."""
    names = (plain(part.strip()) for part in NAME.findall(text))
    return tuple(dict.fromkeys(name for name in names if name))


def plain(name: str) -> str:
    """A field's name without the quotes that its parts may stand in."""
    return QUOTED_PART.sub(r".\1", name)


def from_parameters(filters: Mapping[str, Sequence[str]]) -> list[Node]:
    """The simple filters: any of the values of a field, and all of the labels (`label=key:value`)."""
    nodes: list[Node] = []
    for name, values in filters.items():
        if name == LABEL:
            nodes += [_label(value) for value in values]
        else:
            nodes.append(Comparison(name, "in", tuple(map(Value, values)), parameter=name))
    return nodes


def comparisons(node: Node) -> "list[Comparison]":
    """All comparisons of a tree, from left to right."""
    match node:
        case Comparison():
            return [node]
        case Not(inner):
            return comparisons(inner)
        case And(parts) | Or(parts):
            return [comparison for part in parts for comparison in comparisons(part)]


def _label(value: str) -> Node:
    quoted = re.match(r'"([^"]+)":', value)
    key, colon, wanted = (quoted[1], ":", value[quoted.end() :]) if quoted else value.partition(":")
    if not key or not colon:
        raise InvalidQuery(LABEL, f'{value!r} is not of the form key:value, or "key":value')
    return Comparison(f"labels.{key}", "=", (Value(wanted),), parameter=LABEL)


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", transformer=_Tree())


Deep = tuple[Node, int]  # a tree and how deep it is nested


@v_args(inline=True)
class _Tree(Transformer[Token, Deep]):
    def either(self, *parts: Deep) -> Deep:
        return Or(tuple(node for node, _ in parts)), _deeper(parts)

    def both(self, *parts: Deep) -> Deep:
        return And(tuple(node for node, _ in parts)), _deeper(parts)

    def negation(self, inner: Deep) -> Deep:
        return Not(inner[0]), _deeper((inner,))

    def value(self, token: Token) -> Value:
        text = str(token)
        if token.type == "QUOTED":
            text = _unquoted(text[1:-1])
        if bad := next((sign for sign in text if ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000), None):
            raise InvalidQuery(FILTER, f"a value has the control character {bad!r}", token.start_pos)
        return Value(text, token.start_pos)

    def values(self, *values: Value) -> tuple[Value, ...]:
        return values

    def comparison(self, name: Token, operator: Token, value: Value) -> Deep:
        return Comparison(plain(name), cast(Operator, str(operator)), (value,), name.start_pos), 1

    def is_in(self, name: Token, values: tuple[Value, ...]) -> Deep:
        return Comparison(plain(name), "in", values, name.start_pos), 1

    def is_not_in(self, name: Token, values: tuple[Value, ...]) -> Deep:
        return Comparison(plain(name), "not in", values, name.start_pos), 1

    def is_null(self, name: Token) -> Deep:
        return Comparison(plain(name), "is null", (), name.start_pos), 1

    def is_not_null(self, name: Token) -> Deep:
        return Comparison(plain(name), "is not null", (), name.start_pos), 1


def _deeper(parts: Sequence[Deep]) -> int:
    depth = 1 + max(depth for _, depth in parts)
    if depth > MAX_DEPTH:
        raise InvalidQuery(FILTER, f"it is nested more than {MAX_DEPTH} deep")
    return depth


def _unquoted(text: str) -> str:
    out, escaped = [], False
    for sign in text:
        if sign == "\\" and not escaped:
            escaped = True
        else:
            out.append(sign)
            escaped = False
    return "".join(out)


def _syntax(error: UnexpectedInput, text: str) -> InvalidQuery:
    position = error.pos_in_stream
    expected: Iterable[str] = ()
    if isinstance(error, UnexpectedToken):
        expected = error.accepts or error.expected
    elif isinstance(error, UnexpectedCharacters):
        expected = error.allowed or ()
    seen = text[position : position + 20] if position is not None and position >= 0 else ""
    at_end = not seen.strip() or (isinstance(error, UnexpectedToken) and error.token.type == "$END")
    position = len(text) if at_end else position
    wanted = ", ".join(sorted(EXPECTED[name] for name in expected if name in EXPECTED)) or "something else"
    where = "it ends" if at_end else f"{seen!r} stands"
    return InvalidQuery(FILTER, f"{where} where there could be {wanted}", position)

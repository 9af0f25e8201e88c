"""Files that people write: JSON or YAML 1.2, read as strictly as the body of a request."""

import json
import math
import re
from collections.abc import Iterable

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.resolver import VersionedResolver

from service.specs.base import TOO_SMALL, shorten, underflows

MAX_UNFOLDED = 100_000  # values that all aliases of a document stand for


class _Json(SafeConstructor):
    """Values that JSON has. Dates, and numbers of YAML 1.1 only (1_0, 0b1), are the text that was written."""

    def as_text(self, node: ScalarNode) -> str:
        return str(node.value)

    def whole(self, node: ScalarNode) -> int | str:
        if re.search("_|^[-+]?0b", node.value):
            return str(node.value)
        try:
            return int(self.construct_yaml_int(node))
        except ValueError:  # more digits than Python's int() takes
            sentence = f"a number has {len(node.value):,} digits, and no field takes so many"
            raise ConstructorError(None, None, sentence, node.start_mark) from None

    def decimal(self, node: ScalarNode) -> float | str:
        if "_" in node.value:
            return str(node.value)
        value = float(self.construct_yaml_float(node))
        if value == 0 and underflows(node.value):
            raise ConstructorError(None, None, f"{shorten(node.value)} {TOO_SMALL}", node.start_mark)
        return value


class _Yaml(YAML):
    """YAML 1.2, even if the document declares another version: `no` is a text."""

    @property
    def version(self) -> tuple[int, int]:
        return 1, 2

    @version.setter
    def version(self, _: object) -> None:
        pass


class _Resolver(VersionedResolver):
    @property
    def processing_version(self) -> tuple[int, int]:
        return 1, 2


class _Composer(Composer):
    """Refuses tags, and aliases that unfold to too many nodes."""

    def __init__(self, loader: object = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self._sizes: dict[int, int] = {}  # by id of a node, how many nodes it has with itself, aliases unfolded
        self._unfolded = 0

    def compose_node(self, parent: Node | None, index: object) -> Node:
        event = self.parser.peek_event()
        if isinstance(event, AliasEvent):
            return self._aliased(super().compose_node(parent, index), event)
        if (tag := getattr(event, "tag", None)) is not None:
            raise ComposerError(None, None, f"it has a tag, {shorten(tag)}, and JSON has none", event.start_mark)
        node: Node = super().compose_node(parent, index)
        self._sizes[id(node)] = 1 + sum(self._sizes[id(inner)] for inner in _inside(node))
        return node

    def _aliased(self, node: Node, event: AliasEvent) -> Node:
        if id(node) not in self._sizes:
            raise ComposerError(None, None, f"the alias {event.anchor!r} is within itself", event.start_mark)
        self._unfolded += self._sizes[id(node)]
        if self._unfolded > MAX_UNFOLDED:
            sentence = f"the aliases up to here unfold to more than {MAX_UNFOLDED:,} values"
            raise ComposerError(None, None, sentence, event.start_mark)
        return node


def _inside(node: Node) -> Iterable[Node]:
    """The nodes in a node."""
    match node:
        case MappingNode():
            return (inner for pair in node.value for inner in pair)
        case SequenceNode():
            return list(node.value)
    return ()


for tag in ("timestamp", "value", "merge"):  # a date, `=`, and `<<` if it is no key
    _Json.add_constructor(f"tag:yaml.org,2002:{tag}", _Json.as_text)
_Json.add_constructor("tag:yaml.org,2002:int", _Json.whole)
_Json.add_constructor("tag:yaml.org,2002:float", _Json.decimal)


def read(text: str) -> object:
    """The one document of `text` as plain JSON values: `010` is 10, `1e-3` a number, `no`, `=` and a date are texts.

    Beyond YAML 1.2, the key `<<` merges a mapping into the one around it, whose own fields win.

    Raises `ValueError` with the line, or with the place in the document: for text that is neither YAML nor JSON,
    duplicate keys, a second document, tags, aliases that unfold to too much, NaN, infinity, lone surrogates, and keys
    that are no texts.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_once, parse_float=_decimal)
    except (ValueError, RecursionError):  # it is YAML or malformed, and the YAML parser knows the line
        value = _yaml(text)
    try:
        _check(value, "")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def _decimal(text: str) -> float:
    if underflows(text):
        raise ValueError(f"{shorten(text)} {TOO_SMALL}")
    return float(text)


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _yaml(text: str) -> object:
    yaml = _Yaml(typ="safe", pure=True)
    yaml.Constructor, yaml.Composer, yaml.Resolver = _Json, _Composer, _Resolver
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"neither YAML nor JSON: {line}{_in_a_line(error.problem or error.context)}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"neither YAML nor JSON: {_in_a_line(error)}") from None


def _in_a_line(message: object) -> str:
    return " ".join(str(message).split())[:200]


def _check(value: object, where: str) -> None:
    """`where` is the JSON pointer of `value`."""
    match value:
        case dict():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"the key {key!r} of {where or 'the document'} is no text: write it in quotes")
                _check(key, where)
                _check(inner, f"{where}/{key}")
        case list():
            for place, inner in enumerate(value):
                _check(inner, f"{where}/{place}")
        case float() if not math.isfinite(value):
            raise ValueError(f"{where or 'it'} is {value}, and a number must be finite")
        case str() if any("\ud800" <= sign <= "\udfff" for sign in value):
            raise ValueError(f"{where or 'it'} has half of a surrogate pair, which is no character")
        case None | bool() | int() | float() | str():
            pass
        case _:
            raise ValueError(f"{where or 'it'} is a {type(value).__name__}, which no job and no sweep has")

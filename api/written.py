"""Files that people write: JSON or YAML 1.2, read as strictly as a request's body is."""

import json
import math
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode

from service.specs.base import TOO_SMALL, shorten, underflows


class _Json(SafeConstructor):
    """Only what JSON has: a date is the text that was written, and so is a number of YAML 1.1 only (1_0, 0b1)."""

    def timestamp_as_text(self, node: ScalarNode) -> str:
        return str(node.value)

    def whole(self, node: ScalarNode) -> int | str:
        return str(node.value) if re.search("_|^[-+]?0b", node.value) else int(self.construct_yaml_int(node))

    def decimal(self, node: ScalarNode) -> float | str:
        if "_" in node.value:
            return str(node.value)
        found = float(self.construct_yaml_float(node))
        if found == 0 and underflows(node.value):
            raise ConstructorError(None, None, f"{shorten(node.value)} {TOO_SMALL}", node.start_mark)
        return found


_Json.add_constructor("tag:yaml.org,2002:timestamp", _Json.timestamp_as_text)
_Json.add_constructor("tag:yaml.org,2002:int", _Json.whole)
_Json.add_constructor("tag:yaml.org,2002:float", _Json.decimal)


def read(text: str) -> Any:
    """The one document of `text` as plain JSON values: `010` is 10, `1e-3` a number, `no` and a date are texts.

    Raises `ValueError` with the line, or with where in the document it is: for what is neither, a key that is there
    twice, a second document, a tag, NaN, infinity, half a character, and keys that are no texts.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_once, parse_float=_decimal)
    except (ValueError, RecursionError):  # then it is YAML, or wrong, and YAML's reader knows the line
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


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _yaml(text: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Json
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"neither YAML nor JSON: {line}{_in_a_line(error.problem or error.context)}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"neither YAML nor JSON: {_in_a_line(error)}") from None


def _in_a_line(said: object) -> str:
    return " ".join(str(said).split())[:200]


def _check(value: Any, where: str) -> None:
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

"""The meaning of an axis's value, however it is spelled: `"8/255"` is 0.03137..., a preset is its parameters.

Two values mean the same if a job would be the same with either. `true` is not 1, though they are equal in Python.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from service.specs.attacks import Source, SourceAttack
from service.specs.base import number
from service.specs.job import JobAttack, JobMeasures
from service.specs.names import NamedRecipe
from service.specs.parameters import parameters

WHOLE: Mapping[str, TypeAdapter[Any]] = {  # Any: each has a type of its own
    "attack": TypeAdapter(JobAttack),
    "attack.attack": TypeAdapter(SourceAttack),
    "attack.source": TypeAdapter(Source),
    "attack.source.recipe": TypeAdapter(NamedRecipe),
    "recipe": TypeAdapter(NamedRecipe),
    "measures": TypeAdapter(JobMeasures),
}
"""The fields of a job that have parts."""


def meaning(axis: str, value: object) -> Hashable:
    """A key that is equal for values of `axis` (a JobSpec field or a dotted one) with the same meaning."""
    if axis in WHOLE:
        try:
            parsed = WHOLE[axis].validate_python(value)
        except ValidationError:  # a part of the value may stand on an axis of its own
            pass
        else:
            value = frozenset(parsed) if axis == "measures" else parsed
    plain: Hashable = value
    match value:
        case bool():
            return bool, value
        case str() if parameters().get(axis) in ("number", "integer"):
            return _number(value)
        case dict():
            return frozenset((name, meaning(f"{axis}.{name}", inner)) for name, inner in value.items())
        case list():
            return tuple(meaning(axis, inner) for inner in value)
    return plain


def _number(text: str) -> float | str:
    try:
        return number(text)
    except ValueError:
        return text

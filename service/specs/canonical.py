"""From a spec to its digest, in steps that can be looked at (docs/architecture.md, "The nouns").

1. `fields(spec)`    every field, presets expanded, except those equal to the default frozen for that `version`
2. `canonical(spec)` these fields as JSON: keys sorted, numbers as the shortest float64, no spaces
3. `digest(spec)`    SHA-256 of the canonical JSON, in hex
"""

import hashlib
import json
from functools import cache

from pydantic import BaseModel

from service.model.json import JsonObject

# Fields that name the kind of a spec. They are always written, so that no digest depends on their defaults.
IDENTIFYING = frozenset({"kind", "version", "type", "name"})


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def fields(spec: BaseModel) -> JsonObject:
    """The fields that identify this spec. A new option that is left at its default changes nothing here."""
    out: JsonObject = {}
    for name, always, default in _fields_of(type(spec)):
        value = getattr(spec, name)
        if always or value != default:
            out[name] = _plain(value)
    return out


def canonical(spec: BaseModel) -> str:
    return _ENCODER.encode(fields(spec))


def digest(spec: BaseModel) -> str:
    return hashlib.sha256(canonical(spec).encode()).hexdigest()


@cache
def _fields_of(kind: type[BaseModel]) -> tuple[tuple[str, bool, object], ...]:
    """`(name, always written, default)` of each field."""
    return tuple(
        (name, name in IDENTIFYING or field.is_required(), field.get_default(call_default_factory=True))
        for name, field in kind.model_fields.items()
    )


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return fields(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value

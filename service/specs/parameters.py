"""The parameters of a job by their dotted names, as in `attack.eps`, of whichever attack or recipe has them."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from service.dotted import or_rather
from service.specs.job import JobSpec

JOB_FIELDS = tuple(JobSpec.model_fields)
SCALARS = ("string", "number", "integer", "boolean")


@cache
def parameters() -> dict[str, str]:
    """Every scalar of a job and its type in JSON schema's words, also of a transfer's own attack."""
    return scalars(JobSpec.model_json_schema(mode="serialization"))


def scalars(schema: Mapping[str, Any]) -> dict[str, str]:
    """The scalars of a model's JSON schema by their dotted names, each with its type."""
    return dict(_scalars(schema, schema.get("$defs", {})))


def no_such_field(path: Sequence[str], names: Sequence[str] = JOB_FIELDS) -> str:
    """That the body has no field at `path`, and what may have been meant; `names` are the ones of its top level."""
    *outer, name = path
    parent = ".".join(outer)
    if outer:
        names = [one.rpartition(".")[2] for one in parameters() if one.rpartition(".")[0] == parent]
    if name in names:
        return f"this kind of {outer[-1]} has no {name!r}"
    return f"there is no field {name!r}{or_rather(name, names)}" if names else f"there is no field {name!r}"


def _scalars(schema: Mapping[str, Any], models: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, of in schema.get("properties", {}).items():
        for choice in _choices(of):
            if "$ref" in choice:
                yield from _scalars(models[choice["$ref"].rpartition("/")[2]], models, f"{prefix}{name}.")
            elif choice.get("type") in SCALARS:
                yield prefix + name, choice["type"]


def _choices(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be, one of several or only this."""
    several = schema.get("anyOf", schema.get("oneOf"))
    return [schema] if several is None else [choice for one in several for choice in _choices(one)]

"""The parameters of a job by their dotted names, as in `attack.eps`, of whichever attack or recipe has them."""

from collections.abc import Iterator, Sequence
from functools import cache

from service.model.dotted import or_rather
from service.model.json import JsonMapping, JsonObject
from service.specs import catalog
from service.specs.job import JobSpec

JOB_FIELDS = tuple(JobSpec.model_fields)
SCALARS = ("string", "number", "integer", "boolean")


@cache
def parameters() -> dict[str, str]:
    """Every scalar of a job and its type in JSON schema's words, also of a transfer's own attack."""
    return scalars(_schema())


def scalars(schema: JsonMapping) -> dict[str, str]:
    """The scalars of a model's JSON schema by their dotted names, each with its type."""
    return {name: choice["type"] for name, choice in _scalars(schema, schema.get("$defs", {}))}


@cache
def closed_lists() -> dict[str, tuple[str, ...]]:
    """The texts that a scalar of a job can be, by its dotted name, for scalars with a closed list of texts."""
    texts_by_name: dict[str, dict[str, None] | None] = {}
    architectures = dict.fromkeys(catalog.ARCHITECTURES)
    for name, choice in _scalars(_schema(), _schema()["$defs"]):
        texts = texts_by_name.setdefault(name, {})
        if name.rpartition(".")[2] == "architecture":
            texts_by_name[name] = architectures
        elif choice["type"] != "string" or not choice.keys() & {"enum", "const"}:
            texts_by_name[name] = None
        elif texts is not None:
            texts |= dict.fromkeys(choice.get("enum", [choice.get("const")]))
    return {name: tuple(texts) for name, texts in texts_by_name.items() if texts is not None}


@cache
def _schema() -> JsonObject:
    return JobSpec.model_json_schema(mode="serialization")


def no_such_field(path: Sequence[str], names: Sequence[str] = JOB_FIELDS) -> str:
    """The message that the body has no field at `path`, with suggestions; `names` are the fields of its top level."""
    *outer, name = path
    parent = ".".join(outer)
    if outer:
        names = [parameter.rpartition(".")[2] for parameter in parameters() if parameter.rpartition(".")[0] == parent]
    if name in names:
        return f"this kind of {outer[-1]} has no {name!r}"
    return f"there is no field {name!r}{or_rather(name, names)}" if names else f"there is no field {name!r}"


def _scalars(schema: JsonMapping, models: JsonMapping, prefix: str = "") -> Iterator[tuple[str, JsonMapping]]:
    for name, value in schema.get("properties", {}).items():
        for choice in _choices(value):
            if "$ref" in choice:
                yield from _scalars(models[choice["$ref"].rpartition("/")[2]], models, f"{prefix}{name}.")
            elif choice.get("type") in SCALARS:
                yield prefix + name, choice


def _choices(schema: JsonMapping) -> list[JsonMapping]:
    """The schemas that a value may have: one of several, or only this one."""
    several = schema.get("anyOf", schema.get("oneOf"))
    return [schema] if several is None else [choice for alternative in several for choice in _choices(alternative)]

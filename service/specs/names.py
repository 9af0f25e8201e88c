"""Fields that name something known: an unknown name is refused with the list of known names."""

from collections.abc import Collection
from typing import Annotated

from pydantic import BeforeValidator, Field

from service.specs import catalog
from service.specs.base import shorten
from service.specs.recipes import KNOWN, PRESETS, AnyRecipe


def check_known(noun: str, name: object, names: Collection[str], *hints: str) -> None:
    """Raises `ValueError` with all `names` if `name` is none of them."""
    if name not in list(names):
        raise ValueError(f"unknown {noun} {shorten(name)}; known are: {', '.join([*sorted(names), *hints])}")


def _architecture(value: object) -> object:
    check_known("architecture", value, catalog.ARCHITECTURES)
    return value


def _recipe(value: object) -> object:
    if isinstance(value, str):
        check_known("recipe", value, [*KNOWN, *PRESETS])
        return PRESETS.get(value, {"name": value})
    if isinstance(value, dict):
        value = {"name": "standard", **value}
        check_known("recipe", value["name"], KNOWN)
    return value


Architecture = Annotated[str, BeforeValidator(_architecture), Field(examples=["resnet18"])]
NamedRecipe = Annotated[AnyRecipe, BeforeValidator(_recipe, json_schema_input_type=AnyRecipe | str)]

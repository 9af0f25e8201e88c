"""The version of each kind and type of task: bumped by hand where a default changes or a number gets another meaning.

A bump changes the digest of that type of task alone, so nothing else is computed again. What a version changed stands
beside it. A queued task of an older version is planned again (`service/replanning.py`), a succeeded one stays as it is.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

VERSIONS: Mapping[str, int] = MappingProxyType({})
"""By `kind/type`, as in `measure/sam_sharpness` or `attack/square`; a type that is not here has version 1."""


def version_of(kind: str, name: str = "") -> int:
    """The version of a kind of task (`train`, `measure`, `attack`, `control`): of its recipe, measure or attack `name`.

    >>> version_of("attack", "pgd")
    1
    """
    return VERSIONS.get(f"{kind}/{name}" if name else kind, 1)


def version_of_spec(spec: Mapping[str, Any]) -> int:
    """The version that a task of this stored spec would have if it were planned now."""
    match spec["kind"]:
        case "train":
            return version_of("train", spec["recipe"]["name"])
        case "measure":
            return version_of("measure", spec["measure"]["type"])
        case "attack":
            return version_of_attack(spec["attack"])
        case kind:
            return version_of(kind)


def version_of_attack(attack: Mapping[str, Any]) -> int:
    """A transfer's numbers change with its own version and with that of the attack that makes its examples."""
    own = version_of("attack", attack["type"])
    return own if "attack" not in attack else own + version_of_attack(attack["attack"]) - 1

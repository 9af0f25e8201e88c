"""The differences between the kinds of tasks that are not SQL. `service/store/task_kinds.py` has those in SQL."""

from collections.abc import Mapping

from service.model.json import JsonMapping

METHODS: Mapping[str, tuple[str, str] | None] = {
    "train": ("recipe", "name"),
    "measure": ("measure", "type"),
    "attack": ("attack", "type"),
    "control": None,
}
"""Where a spec names the method of its task: the recipe, the measure or the attack. All controls are one panel."""


def method_of(spec: JsonMapping) -> str:
    """The method that a stored spec names, which its version and its estimate depend on; empty for a control.

    >>> method_of({"kind": "train", "recipe": {"name": "standard", "epochs": 100}})
    'standard'
    """
    path = METHODS[spec["kind"]]
    return "" if path is None else str(spec[path[0]][path[1]])

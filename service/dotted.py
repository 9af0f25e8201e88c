"""Dotted names: `attack.norm` for `{"attack": {"norm": ...}}`, as in CSV columns, filters and `fields`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FAMILIES = ("provenance", "labels", "verdict_checks", "versions")


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested row as `("attack.norm", "linf")` and so on; lists joined by `;`."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, ";".join(map(str, item)) if isinstance(item, list) else item


def chosen(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields asked for, nested as they are; a dotted name reaches inside, and a missing one is null.

    What is behind the first dot of `FAMILIES` is one key, and what is shown whole has its parts in it already.
    """
    out: dict[str, Any] = {}
    for name in names:
        first, dot, _ = name.partition(".")
        if dot and first in names:
            continue
        source: Any = row
        target = out
        *path, last = name.split(".", 1) if first in FAMILIES else name.split(".")
        for part in path:
            source = source.get(part) if isinstance(source, Mapping) else None
            target = target.setdefault(part, {})
        target[last] = source.get(last) if isinstance(source, Mapping) else None
    return out

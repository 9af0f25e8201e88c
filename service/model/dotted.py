"""Dotted names: `attack.norm` for `{"attack": {"norm": ...}}`, as in CSV columns, filters and `fields`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from service.model.json import JsonMapping, JsonObject

NEAR = 3  # suggestions for an unknown name, at most
FEW = 20  # known names, at most, that are listed beside suggestions
FAMILIES = ("provenance", "labels", "measures_failed", "verdict_checks", "verdict_counts", "versions")


def flat(value: JsonMapping, prefix: str = "") -> Iterator[tuple[str, Any]]:  # Any: a value of JSON
    """A nested row as `("attack.norm", "linf")` and so on; lists joined by `;`."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, ";".join(map(str, item)) if isinstance(item, list) else item


def chosen(row: JsonMapping, names: Sequence[str]) -> JsonObject:
    """The named fields of a row, nested as in the row. A dotted name reaches inside; a missing field is null.

    For a name of `FAMILIES`, everything after the first dot is one key: `labels.a.b` is the label `a.b`. If a whole
    field is named, the names of its parts add nothing.
    """
    out: JsonObject = {}
    for name in names:
        first, dot, _ = name.partition(".")
        if dot and first in names:
            continue
        source: object = row
        target = out
        *path, last = name.split(".", 1) if first in FAMILIES else name.split(".")
        for part in path:
            source = source.get(part) if isinstance(source, Mapping) else None
            target = target.setdefault(part, {})
        target[last] = source.get(last) if isinstance(source, Mapping) else None
    return out


def near(name: str, known: Iterable[str]) -> list[str]:
    """Suggestions for an unknown name, the nearest first.

    These are known names that begin with it or resemble it, as a whole or in their last part (`attack.eps` for `epss`).
    """
    names = list(known)
    last = {candidate: candidate.rpartition(".")[2] for candidate in names}
    matches = [candidate for candidate in names if name and candidate.startswith(name)][:NEAR]
    matches += get_close_matches(name, names, NEAR)
    parts = set(get_close_matches(name.rpartition(".")[2], set(last.values()), NEAR))
    matches += sorted((candidate for candidate in names if last[candidate] in parts), key=len)
    return list(dict.fromkeys(matches))[:NEAR]


def or_rather(name: str, known: Sequence[str], others: Iterable[str] = ()) -> str:
    """The end of a message that refuses an unknown name: suggestions, and the `known` names unless they are many.

    `others` are too many to be listed, so they only serve as suggestions.
    """
    matches = near(name, [*known, *others])
    meant = f"; did you mean {' or '.join(matches)}?" if matches else ""
    return meant + ("" if matches and len(known) > FEW else f" (known are: {', '.join(known) or 'none'})")

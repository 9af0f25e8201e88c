"""Dotted names: `attack.norm` for `{"attack": {"norm": ...}}`, as in CSV columns, filters and `fields`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from service.model.results import JsonMapping, JsonObject

NEAR = 3  # names that may have been meant
FEW = 20  # names that are listed beside those
FAMILIES = ("provenance", "labels", "measures_failed", "verdict_checks", "verdict_counts", "versions")


def flat(value: JsonMapping, prefix: str = "") -> Iterator[tuple[str, Any]]:  # Any: a value of JSON
    """A nested row as `("attack.norm", "linf")` and so on; lists joined by `;`."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{name}.")
        else:
            yield prefix + name, ";".join(map(str, item)) if isinstance(item, list) else item


def chosen(row: JsonMapping, names: Sequence[str]) -> JsonObject:
    """The fields asked for, nested as they are; a dotted name reaches inside, and a missing one is null.

    What is behind the first dot of `FAMILIES` is one key, and what is shown whole has its parts in it already.
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
    """The names that may have been meant by one that there is not: those that begin with it or look like it, whole or
    in their last part, as `attack.eps` for `epss`, the nearest first."""
    names = list(known)
    last = {candidate: candidate.rpartition(".")[2] for candidate in names}
    matches = [candidate for candidate in names if name and candidate.startswith(name)][:NEAR]
    matches += get_close_matches(name, names, NEAR)
    parts = set(get_close_matches(name.rpartition(".")[2], set(last.values()), NEAR))
    matches += sorted((candidate for candidate in names if last[candidate] in parts), key=len)
    return list(dict.fromkeys(matches))[:NEAR]


def or_rather(name: str, known: Sequence[str], others: Iterable[str] = ()) -> str:
    """The end of a sentence that refuses a name: what may have been meant, or else what there is; of `others`, which
    are too many to be listed, only what may have been meant."""
    matches = near(name, [*known, *others])
    meant = f"; did you mean {' or '.join(matches)}?" if matches else ""
    return meant + ("" if matches and len(known) > FEW else f" (known are: {', '.join(known) or 'none'})")

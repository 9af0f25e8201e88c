"""A report of results in Markdown: a table per attack, the reasons of verdicts, and the versions that computed them.

The statistics are the service's own, over trained networks. It refuses to mix unequal protocols.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from api.client import Client
from api.client.render import Columns, number, percent, percents
from api.client.transport import Json
from service.errors import UncannyError
from service.model.dotted import flat

GROUP = ("dataset", "samples", "attack.type", "attack.norm", "attack.eps", "architecture", "recipe.name", "scale")
SPEC = ("dataset", "samples", "order", "architecture", "scale", "scale_bias", "attack", "recipe")
MADE_BY = ("code_version", "code_revision", "code_dirty", "torch", "device")
METRICS = (
    "robust_accuracy:mean,ci95,count",
    "clean_accuracy:mean,ci95",
    "zero_gradient_fraction:mean",
    "masked_fraction:mean",
    "log_relative_sharpness_median:mean",
)
UNGROUPED = "attack.source.recipe."  # no fields to group by; if they differ, the service refuses
MEANING = {
    "zero_gradient": "the attack's first gradient is exactly zero on correctly classified images: it is blind",
    "masked": "examples count as robust here that the same attack, or its margin twin, breaks at s = 1",
    "weak_loss": "another loss breaks in the same ball what the attack does not: its own loss is too weak",
    "weaker_than": "this control breaks what the attack does not",
    "not_converged": "PGD with four times the steps breaks what the attack does not",
    "nothing_correct": "the network is right no more often than the most frequent label: there is nothing to attack",
    "non_finite": "a logit or a gradient is NaN or infinite; such an image is never robust",
    "outside_ball": "iterates leave the ball or the box",
    "eps_zero": "with eps = 0 the attack changes something",
    "train_mode": "the network's answer depends on the other images in the batch",
    "random_forward": "the network answers differently when asked twice",
}
FLAGS = {
    "not_monotone": "more steps, restarts or a larger eps left more images robust: one of the two attacks is too weak",
    "trained_again": "its network's weights were lost, and the training gave others when it ran again",
    "mixed_weights": "a measure or the training is of other weights than the attack: their numbers are left out",
}
Key = tuple[object, ...]


class NothingToReport(UncannyError):
    """No result matches."""


@dataclass(frozen=True)
class Report:
    """`groups` has the statistics, each with its `verdicts`. The other fields count distinct computations.

    `most` has, for each of the `reasons` that count images, the largest fraction: `[images, of how many]`.
    """

    asked: Json
    groups: list[Json]
    reasons: dict[str, int]
    made_by: list[Json]
    computations: int
    retracted: int = 0
    flags: dict[str, int] = field(default_factory=dict)
    most: dict[str, list[int]] = field(default_factory=dict)

    def as_json(self) -> Json:
        return dict(vars(self))

    def as_markdown(self) -> str:
        """Tables as GitHub and pandoc read them."""
        chosen = {name: value for name, value in self.asked.items() if value}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = ["# Robustness report", "", f"{self.computations} computations, {now}. Asked for: `{chosen or 'all'}`"]
        sections: dict[str, list[Json]] = defaultdict(list)
        for group in self.groups:
            sections[_title(group)].append(group)
        for title, groups in sections.items():
            lines += ["", f"## {title}", "", *_table(list(COLUMNS), map(_row, groups))]
        lines += [
            "",
            "Means over `n` trained networks, with Student's 95 % interval; of their `results`, repeats of a network,",
            "such as other attack seeds, are averaged first. An interval of images is Wilson's for the images:",
            "a single network, or several without a spread, tell nothing of other networks.",
            "",
            "Scaling the last layer changes no prediction:",
        ]
        lines += ["where robust accuracy rises with the scale, the attack has gone blind, and the verdict says so."]
        if self.reasons:
            reasons = [
                [f"`{reason}`", str(n), images(self.most.get(reason)) or "–", meaning(reason)]
                for reason, n in self.reasons.items()
            ]
            columns = ("reason", "computations", "at most", "meaning")
            lines += ["", "## What the verdicts found", "", *_table(columns, reasons)]
        if self.flags:
            flags = [[f"`{flag}`", str(n), FLAGS[flag]] for flag, n in self.flags.items()]
            lines += [
                "",
                "## What other results say against it",
                "",
                *_table(("flag", "computations", "meaning"), flags),
            ]
        made_by = [[str(version[name]) for name in (*MADE_BY, "computations")] for version in self.made_by]
        if self.retracted:
            lines += ["", f"{self.retracted} retracted results are left out."]
        lines += ["", "## What computed it", "", *_table((*MADE_BY, "computations"), made_by)]
        return "\n".join(lines) + "\n"


def report(client: Client, filter: str | None = None, **filters: Any) -> Report:  # Any: as `Client.results`
    """The report of all results that match and are not retracted. Raises `NothingToReport`, `ApiError`."""
    fields = [*SPEC, "spec_digest", "verdict", "verdict_reasons", "verdict_counts", "flags"]
    fields += [f"provenance.{name}" for name in MADE_BY]
    results = client.results(filter, sort="created_at", fields=fields, limit=1000, **filters)
    rows = list({row["spec_digest"]: row for row in results}.values())
    if not rows:
        raise NothingToReport("no result matches: there is nothing to report")
    specs = [dict(flat({name: row[name] for name in SPEC})) for row in rows]
    by = [*GROUP, *_varying(specs)]
    verdicts: dict[Key, Counter[str]] = defaultdict(Counter)
    for row, spec in zip(rows, specs, strict=True):
        verdicts[_key(spec, by)][row["verdict"] or "not judged"] += 1
    statistics = client.aggregate(by, METRICS, filter, **filters)
    groups = statistics.items
    for group in groups:
        group["verdicts"] = dict(verdicts[_key(group, by)].most_common())
    made_by = Counter(tuple(row["provenance"][name] for name in MADE_BY) for row in rows)
    return Report(
        {"filter": filter, **filters},
        groups,
        dict(Counter(reason for row in rows for reason in row["verdict_reasons"] or []).most_common()),
        [dict(zip(MADE_BY, made, strict=True)) | {"computations": n} for made, n in made_by.most_common()],
        len(rows),
        statistics.retracted,
        dict(Counter(flag for row in rows for flag in row["flags"]).most_common()),
        _most(rows),
    )


def meaning(reason: str) -> str:
    """The meaning of a reason of a verdict, such as `masked` or `weaker_than:square`."""
    return MEANING[reason.partition(":")[0]]


def images(counts: Sequence[int] | None) -> str:
    """`[40, 100]` as `40 of 100 images`; empty for a reason that counts none."""
    return f"{counts[0]} of {counts[1]} images" if counts else ""


def _most(rows: Sequence[Json]) -> dict[str, list[int]]:
    most: dict[str, list[int]] = {}
    for row in rows:
        for reason in row["verdict_reasons"] or []:
            counts = (row["verdict_counts"] or {}).get(reason)
            if counts and counts[1] and counts[0] / counts[1] > _fraction(most.get(reason)):
                most[reason] = counts
    return most


def _fraction(counts: Sequence[int] | None) -> float:
    return counts[0] / counts[1] if counts else -1.0


def _varying(specs: Sequence[Json]) -> list[str]:
    """The fields, other than those of `GROUP`, in which these specs differ."""
    names = dict.fromkeys(name for spec in specs for name in spec if not name.startswith(UNGROUPED))
    return [name for name in names if name not in GROUP and len({spec.get(name) for spec in specs}) > 1]


def _key(spec: Json, by: Sequence[str]) -> Key:
    return tuple(spec.get(name) for name in by)


def _title(group: Json) -> str:
    """The title of a group's table: data set, attack, samples, and options of the attack."""
    attack = [str(group["attack.type"]), group["attack.norm"], group["attack.eps"]]
    rest = {
        name: value
        for name, value in group.items()
        if value is not None and name not in GROUP and name.startswith(("attack.", "scale_bias", "order"))
    }
    more = [f"{name.removeprefix('attack.')} {number(value)}" for name, value in rest.items()]
    name = ", ".join([" ".join(number(part) for part in attack if part is not None), *more])
    return f"{group['dataset']}, {name}, {group['samples']} samples"


def _recipe(group: Json) -> str:
    apart = [f"{name.removeprefix('recipe.')} {number(group[name])}" for name in group if _tells_recipes_apart(name)]
    return ", ".join([group["recipe.name"], *apart])


def _verdicts(group: Json) -> str:
    counts = group["verdicts"]
    return ", ".join(name if len(counts) == 1 else f"{n} {name}" for name, n in counts.items())


COLUMNS: Columns = {
    "architecture": lambda group: group["architecture"],
    "recipe": _recipe,
    "scale": lambda group: number(group["scale"]),
    "n": lambda group: str(group["robust_accuracy"]["count"]),
    "results": lambda group: str(group["results"]),
    "clean": lambda group: percent(group["clean_accuracy"]["mean"]),
    "clean 95 %": lambda group: _interval(group["clean_accuracy"]),
    "robust": lambda group: percent(group["robust_accuracy"]["mean"]),
    "95 %": lambda group: _interval(group["robust_accuracy"]),
    "zero gradient": lambda group: percent(group["zero_gradient_fraction"]["mean"]),
    "masked": lambda group: percent(group["masked_fraction"]["mean"]),
    "log sharpness": lambda group: number(group["log_relative_sharpness_median"]["mean"]),
    "verdict": _verdicts,
}


def _row(group: Json) -> list[str]:
    return [cell(group) for cell in COLUMNS.values()]


def _interval(share: Json) -> str:
    return percents(share["ci95_low"], share["ci95_high"]) + (" of images" if share["ci95_of"] == "images" else "")


def _tells_recipes_apart(name: str) -> bool:
    return name.startswith("recipe.") and name not in GROUP


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]

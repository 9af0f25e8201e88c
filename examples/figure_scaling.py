"""Draw what scaling the last layer does to an attack, from the results of a running service.

    uv run uncanny demo --keep                                     # in one terminal
    uv run python examples/figure_scaling.py scaling.png           # in another
    uv run python examples/figure_scaling.py scaling.png sweep=ID dataset=cifar10 seed=1

One column per network and attack: each point is one trained network, and the band the 95 % interval of its images.
Above, what the attack reports and how much of it is its own blindness; below, the sharpness at the clean images.
Further arguments filter the results, as in `uncanny results`: those of a column may differ in the scale only.
"""

import sys
from collections import defaultdict
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from api.client import Client
from service.errors import UncannyError
from service.model.dotted import flat

USAGE = f"usage: {sys.argv[0]} FILE.png [FIELD=VALUE ...]"
SHARES = {
    "robust_accuracy": ("reported robust accuracy", "tab:red", "-"),
    "masked_fraction": ("masked", "tab:orange", "--"),
    "zero_gradient_fraction": ("zero gradient (of clean-correct)", "tab:gray", ":"),
    "clean_accuracy": ("clean accuracy", "tab:blue", "-."),
}
VERDICTS = {"trusted": "tab:green", "suspect": "gold", "invalid": "black", "not_checked": "tab:gray"}
SPEC = ("attack", "attack_seed", "recipe", "seed", "samples", "order", "scale_bias", "replicate", "versions")
Column = tuple[str, str, str]  # architecture, data set, attack


def columns_of(rows: list[dict[str, Any]]) -> dict[Column, dict[float, dict[str, Any]]]:
    """The rows by network and attack, then by scale. Raises `UncannyError` where they differ in anything else."""
    columns: dict[Column, dict[float, dict[str, Any]]] = defaultdict(dict)
    values: dict[tuple[Column, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        attack = row["attack"]
        loss = attack.get("loss", "").removesuffix("cross_entropy").rstrip("_")
        name = " ".join(part for part in (attack["type"], attack.get("norm"), loss) if part)
        column = (row["architecture"], row["dataset"], name)
        columns[column][row["scale"]] = row
        for field, value in flat({name: row[name] for name in SPEC}):
            values[column, field][str(value)] = None
    mixed = {field: list(seen) for (_, field), seen in values.items() if len(seen) > 1}
    if mixed:
        said = "; ".join(f"{field} ({', '.join(seen)})" for field, seen in mixed.items())
        field, (one, *_) = next(iter(mixed.items()))
        raise UncannyError(f"a curve would mix results of different {said}: choose some, as {field}={one}")
    return columns


def draw(path: str, rows: list[dict[str, Any]]) -> None:
    """A PNG (or PDF, SVG) at `path`; `rows` are results of at least one network at several scales."""
    columns = columns_of(rows)
    wide = len(columns)
    figure, axes = plt.subplots(2, wide, figsize=(3.6 * wide, 6), sharex=True, sharey="row", squeeze=False)
    for place, (title, cells) in enumerate(sorted(columns.items())):
        above, below = axes[0][place], axes[1][place]
        scales = sorted(cells)
        for field, (label, colour, line) in SHARES.items():
            above.plot(scales, [cells[s][field] for s in scales], line, color=colour, label=label)
        bounds = [[cells[s][f"robust_accuracy_ci95_{bound}"] for s in scales] for bound in ("low", "high")]
        above.fill_between(scales, *bounds, color="tab:red", alpha=0.15, linewidth=0, label="95 % (Wilson, images)")
        for s in scales:
            above.plot(s, cells[s]["robust_accuracy"], "o", color=VERDICTS[cells[s]["verdict"]], zorder=3)
        above.set(title="{} on {}\n{}".format(*title), xscale="log", ylim=(-0.03, 1.03))
        below.plot(scales, [cells[s]["log_relative_sharpness_median"] for s in scales], "s-", color="tab:purple")
        below.set(xlabel="scale s of the last layer")
    axes[0][0].set_ylabel("share of the images")
    axes[1][0].set_ylabel("log relative sharpness, median")
    for verdict, colour in VERDICTS.items():
        axes[0][0].plot([], [], "o", color=colour, label=f"verdict: {verdict}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(
        "No prediction changes with s, so the true robust accuracy is flat: what rises is the attack's blindness"
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> int:
    """The exit code: 0, 1 where there is nothing to draw, 2 for bad usage."""
    path, *filters = arguments or [""]
    if not path or path.startswith("-") or not all("=" in one for one in filters):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        with Client() as client:
            rows = list(client.results(**dict(one.split("=", 1) for one in filters)))
        if not rows:
            raise UncannyError("no results match: run `uncanny demo --keep` first, or ask for less")
        draw(path, rows)
    except (UncannyError, OSError, ValueError) as error:  # the last is what a file name with an unknown ending is
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(rows)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

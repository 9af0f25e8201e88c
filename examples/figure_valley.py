"""Draw the uncanny valley: sharpness along an attack, from the stored trajectory of one result.

    uv run uncanny demo --keep                              # in one terminal
    uv run uncanny results attack=pgd_linf scale=1          # in another: choose a job
    uv run python examples/figure_valley.py valley.png JOB_ID

Left, by step; right, each image's own steps counted from the one at which its prediction flips. Lines are medians over
the images that were classified correctly, bands reach from the first to the third quartile.
"""

import sys
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from api.client import Client
from service.errors import UncannyError

AROUND = 12  # steps before and after the flip
FEWEST = 20  # images of which a median is drawn
MEASURES = {"log_relative_sharpness": ("log relative sharpness", "tab:purple"), "loss": ("cross-entropy", "tab:red")}


def draw(path: str, title: str, curves: dict[str, Any]) -> None:
    """A PNG (or PDF, SVG) at `path`; `curves` are those of an attack, as `GET /v1/results/{job_id}/trajectory` has."""
    flips = curves["aligned_offset"]
    shown = [
        i for i, offset in enumerate(flips) if abs(offset) <= AROUND and curves["aligned_n"][i] >= FEWEST
    ]  # fmt: skip
    sides = [("", "_clean_correct", curves["step"], range(len(curves["step"])), "step of the attack")]
    sides += [("aligned_", "", flips, shown, "steps after the prediction flips")]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col", sharey="row")
    for column, (before, after, places, chosen, label) in enumerate(sides):
        x = [places[i] for i in chosen]
        for row, (measure, (name, colour)) in enumerate(MEASURES.items()):
            low, middle, high = (
                [curves[f"{before}{measure}_{what}{after}"][i] for i in chosen] for what in ("q25", "median", "q75")
            )
            axes[row][column].fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes[row][column].plot(x, middle, color=colour)
            axes[row][0].set_ylabel(name)
        axes[1][column].set_xlabel(label)
        axes[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 1]:
        axis.axvline(0, color="black", linestyle=":", linewidth=1)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    """The exit code: 0, 1 where there is nothing to draw, 2 for bad usage."""
    if len(arguments) != 2:
        print(f"usage: {sys.argv[0]} FILE.png JOB_ID", file=sys.stderr)
        return 2
    path, job_id = arguments
    try:
        with Client() as client:
            result, curves = client.result(job_id), client.trajectory(job_id)
        found = curves.get("attack", {}).get("trajectory")
        if found is None:
            raise UncannyError(f"job {job_id} has no trajectory: its attack cannot be followed")
        attack = result["attack"]
        ball = f" {attack['norm']} (eps {attack['eps']:.3g})" if "norm" in attack else ""
        said = f"{result['architecture']} on {result['dataset']}, s = {result['scale']:g}, {attack['type']}{ball}, "
        draw(path, f"{said}{attack.get('steps', 1)} steps, {result['n']} images: medians and quartiles", found)
    except (UncannyError, OSError, ValueError) as error:  # the last is what a file name with an unknown ending is
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

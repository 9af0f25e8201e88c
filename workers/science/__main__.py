"""`python -m workers.science`: train, measure and attack from the shell, without the service, Ray or a database.

    python -m workers.science list
    python -m workers.science train --architecture mlp --dataset digits --epochs 5 --out weights.safetensors
    python -m workers.science measure --architecture mlp --dataset digits --weights weights.safetensors --scale 5
    python -m workers.science attack --architecture mlp --dataset digits --weights weights.safetensors --attack pgd_linf

Prints one JSON object. What cannot be computed is one sentence on standard error and exit status 2.
"""

import argparse
import json
import math
import re
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from workers.science.architectures import ARCHITECTURES, build
from workers.science.attacks import ATTACKS, WITH_TRAJECTORY
from workers.science.datasets import DATASETS, ImageData, read_npz, sample_indices, to_unit
from workers.science.datasets.npz import PREFIX
from workers.science.errors import ScienceError
from workers.science.evaluation import evaluate_attack
from workers.science.heads import linear_head, scale_head
from workers.science.imported import as_saved
from workers.science.recipes import RECIPES
from workers.science.seeding import deterministic
from workers.science.sharpness import MEASURES, MeasureInput
from workers.science.summaries import merged
from workers.science.training import EpochReport, train
from workers.science.trajectory import Recorder, analyse
from workers.science.weights import load_weights, save_weights

Report = dict[str, Any]
DEFAULT_SAMPLES = 1000
# How numbers and presets are written is so in `service/specs` too: `tests/contract/test_catalog.py` compares them.
DECIMAL = r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]+)?|\.[0-9]+)"
FRACTION = re.compile(r" *(-?(?:0|[1-9][0-9]*)) */ *(-?(?:0|[1-9][0-9]*)) *")
NUMBER = re.compile(rf" *({DECIMAL})([eE][+-]?[0-9]+)? *")

PRESETS: dict[str, dict[str, Any]] = {
    "pgd_l2": {"norm": "l2", "eps": 0.025, "step_size": 0.001, "steps": 25},
    "pgd_l2_strong": {"norm": "l2", "eps": 0.5, "step_size": 0.01, "steps": 50},
    "pgd_linf": {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 10},
    "pgd_linf_strong": {"norm": "linf", "eps": 0.1, "step_size": 2 / 255, "steps": 30},
    "pgd_linf_fine": {"norm": "linf", "eps": 8 / 255, "step_size": 0.25 / 255, "steps": 80},
}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what cannot be computed."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        report: Report = options.run(options)
    except (ScienceError, ValueError, TypeError, OSError) as error:
        print(f"workers.science: {error}", file=sys.stderr)
        return 2
    if options.run is not _list:
        report |= {"seconds": time.perf_counter() - started, "device": str(options.device), "torch": torch.__version__}
    print(json.dumps(report, indent=2, allow_nan=False))
    return 0


def _list(_options: argparse.Namespace) -> Report:
    tables: dict[str, dict[str, Any]] = {"architectures": ARCHITECTURES, "datasets": DATASETS, "recipes": RECIPES}
    summaries = {name: {key: entry.summary for key, entry in table.items()} for name, table in tables.items()}
    return {**summaries, "attacks": [*PRESETS, *ATTACKS], "measures": list(MEASURES)}


def _train(options: argparse.Namespace) -> Report:
    def on_epoch(epoch: EpochReport, _state: object) -> None:
        if sys.stderr.isatty():
            print(f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.loss:.4f}", file=sys.stderr)

    if not options.out.parent.is_dir():
        raise ScienceError(f"there is no folder {options.out.parent} to write the weights to")
    data = _data(options)
    model = build(options.architecture, data.shape, data.n_classes, options.seed)
    done = train(
        model,
        data,
        recipe=options.recipe,
        recipe_params=dict(options.option),
        epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        seed=options.seed,
        train_samples=options.train_samples,
        device=options.device,
        precision=options.precision,
        on_epoch=on_epoch,
    )
    save_weights(options.out, model)
    numbers = {name: value for name, value in vars(done).items() if name not in {"epochs", "seconds"}}
    return {"weights": str(options.out), "numbers": numbers, "curves": {"epochs": [vars(e) for e in done.epochs]}}


def _measure(options: argparse.Namespace) -> Report:
    data, model = _scaled(options)
    train_split, test_split = (
        (to_unit(x[index]).to(options.device), y[index].to(options.device))
        for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y))
        for index in [_samples(len(y), options.samples)]
    )
    params = {"scale": options.scale} if options.measure == "closed_forms" else {}
    params |= dict(options.option)
    of_input = {name: params.pop(name) for name in ("seed", "batch_size") if name in params}
    with deterministic(options.device):
        measured = MEASURES[options.measure](model, MeasureInput(*train_split, *test_split, **of_input), **params)
    return {"numbers": measured.numbers, "curves": measured.curves}


def _attack(options: argparse.Namespace) -> Report:
    data, model = _scaled(options)
    name = "pgd" if options.attack in PRESETS else options.attack
    given = {key: getattr(options, key) for key in ("norm", "eps", "step_size", "steps")}
    params = PRESETS.get(options.attack, {}) | {key: value for key, value in given.items() if value is not None}
    params |= dict(options.option)
    norm = params.get("norm", "l2" if name == "cw" else "linf")
    for distance in ("eps", "step_size"):
        if norm == "linf" and (value := params.get(distance, 0)) > 1:
            raise ScienceError(f'{distance} {value:g} is more than 1, and pixels are in [0, 1]: "{value:g}/255"?')
    index = _samples(len(data.test_y), options.samples)
    head = linear_head(model)
    recorder = Recorder(head.weight, head.bias) if options.trajectory and name in WITH_TRAJECTORY else None
    with deterministic(options.device):
        attacked = evaluate_attack(
            model,
            data.test_x[index],
            data.test_y[index],
            index,
            attack=name,
            params=params,
            scale=options.scale,
            attack_seed=options.attack_seed,
            device=options.device,
            observer_factory=recorder,
        )
    report: Report = {"attack": name, "parameters": params, "scale": options.scale, "numbers": attacked.numbers}
    if recorder is not None:
        along, report["curves"] = analyse(recorder.trajectory(attacked.bits["non_finite"]), norm)
        report["numbers"] = merged(attacked.numbers, along)
    return report


def _data(options: argparse.Namespace) -> ImageData:
    if options.dataset.startswith(PREFIX):
        return read_npz(Path(options.dataset.removeprefix(PREFIX)))
    if options.dataset not in DATASETS:
        raise ScienceError(f"unknown data set {options.dataset!r}; there are {', '.join(DATASETS)} and {PREFIX}FOLDER")
    return DATASETS[options.dataset].read(options.data_dir)


def _scaled(options: argparse.Namespace) -> tuple[ImageData, nn.Module]:
    data = _data(options)
    model = as_saved(build(options.architecture, data.shape, data.n_classes, seed=0), options.weights)
    load_weights(model, options.weights)
    model.to(options.device).eval()
    return data, scale_head(model, options.scale, scale_bias=not options.keep_bias)


def _samples(n_total: int, samples: int | None) -> Tensor:
    return torch.from_numpy(sample_indices(n_total, min(DEFAULT_SAMPLES, n_total) if samples is None else samples))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="workers.science", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="list | train | measure | attack")
    commands.add_parser("list", help="what can be named").set_defaults(run=_list)
    common, trained = _common_options(), _options_of_trained()
    _add_training_options(commands.add_parser("train", parents=[common], help="train a network and write its weights"))

    measuring = commands.add_parser("measure", parents=[common, trained], help="measure sharpness")
    measuring.set_defaults(run=_measure)
    measuring.add_argument("--measure", choices=MEASURES, default="closed_forms")

    _add_attack_options(commands.add_parser("attack", parents=[common, trained], help="attack"))
    return parser


def _common_options() -> _Parser:
    """What every command takes that computes something."""
    common = _Parser(add_help=False)
    common.add_argument("--architecture", required=True, choices=ARCHITECTURES, metavar="NAME")
    common.add_argument("--dataset", required=True, help="a name, or npz:FOLDER with train.npz and test.npz")
    common.add_argument("--data-dir", type=Path, default=Path("data"), help="where data sets lie, or are downloaded to")
    common.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    help_of_option = "a parameter of the recipe, the measure or the attack"
    common.add_argument(
        "-o", "--option", type=_option, action="append", default=[], metavar="NAME=VALUE", help=help_of_option
    )
    return common


def _options_of_trained() -> _Parser:
    """What `measure` and `attack` take: the trained network and the test images."""
    trained = _Parser(add_help=False)
    trained.add_argument("--weights", type=Path, required=True, help="safetensors file that `train` wrote")
    trained.add_argument("--scale", type=_number, default=1.0, help="the head becomes s W, s b")
    trained.add_argument("--keep-bias", action="store_true", help="scale W alone")
    trained.add_argument("--samples", type=int, help="the first so many of the fixed permutation; 1,000 when left out")
    return trained


def _add_training_options(training: argparse.ArgumentParser) -> None:
    training.set_defaults(run=_train)
    training.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    training.add_argument("--recipe", choices=RECIPES, default="standard")
    training.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="float32")
    training.add_argument("--epochs", type=int, default=100)
    training.add_argument("--batch-size", type=int, default=128)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--train-samples", type=int)
    training.add_argument("--lr", type=_number, default=0.1)
    training.add_argument("--momentum", type=_number, default=0.9)
    training.add_argument("--weight-decay", type=_number, default=1e-4)


def _add_attack_options(attacking: argparse.ArgumentParser) -> None:
    attacking.set_defaults(run=_attack)
    attacking.add_argument("--attack", choices=[*PRESETS, *ATTACKS], default="pgd_linf", metavar="NAME")
    attacking.add_argument("--norm", choices=["linf", "l2"])
    attacking.add_argument("--eps", type=_number, help='a number or a fraction such as "8/255"')
    attacking.add_argument("--step-size", type=_number)
    attacking.add_argument("--steps", type=int)
    attacking.add_argument("--attack-seed", type=int, default=0)
    attacking.add_argument("--trajectory", action="store_true", help="also what happens along the way, and its curves")


def _number(text: str) -> float:
    """A decimal or a fraction, by the rule of `service/specs/base.py`, which the science must not import."""
    decimal, fraction = NUMBER.fullmatch(text), FRACTION.fullmatch(text)
    try:
        if fraction is not None:
            top, value = fraction[1], float(Fraction(int(fraction[1]), int(fraction[2])))
        elif decimal is not None:
            top, value = decimal[1], float(decimal[1] + (decimal[2] or ""))
        else:
            raise ValueError
        if not math.isfinite(value) or (value == 0 and Fraction(top) != 0):
            raise ValueError
    except (ValueError, OverflowError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text!r} is not a number or a fraction such as "8/255"') from None
    return value + 0.0  # minus zero is zero


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"there is no device {text!r} here ({reason})") from None


def _option(text: str) -> tuple[str, Any]:
    """`name=value`: true, false, a whole number, a number, a fraction, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if value in {"true", "false"}:
        return name, value == "true"
    if re.fullmatch("-?[0-9]+", value, re.ASCII):
        return name, int(value)
    try:
        return name, _number(value)
    except argparse.ArgumentTypeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())

"""The science from the shell, where nothing of the service is installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.specs.attacks import PRESETS, Pgd
from workers.science import __main__ as cli

# What a GPU machine need not have; importing any of it fails here.
ABSENT = ("ray", "pydantic", "pydantic_settings", "sqlalchemy", "alembic", "fastapi", "fsspec", "service", "api")
BLOCKED = f"""
import runpy, sys
for name in {ABSENT!r}:
    sys.modules[name] = None
runpy.run_module("workers.science", run_name="__main__", alter_sys=True)
"""


def shell(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(list(arguments)) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "weights.safetensors"
    train = ["train", "--architecture", "mlp", "--dataset", "digits", "--epochs", "3", "--device", "cpu"]
    assert cli.main([*train, "--out", str(path)]) == 0
    return path


def of(weights: Path) -> list[str]:
    network = ["--architecture", "mlp", "--dataset", "digits", "--device", "cpu"]
    return [*network, "--weights", str(weights), "--samples", "64"]


@pytest.mark.slow
def test_a_training_runs_without_the_service(tmp_path: Path) -> None:
    network = ["--architecture", "mlp", "--dataset", "digits", "--device", "cpu"]
    done = shell("train", *network, "--epochs", "1", "--out", "weights.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights.safetensors").is_file()


@pytest.mark.slow
def test_a_measure_runs_without_the_service(weights: Path) -> None:
    done = shell("measure", *of(weights), "--scale", "5", cwd=weights.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["numbers"]


def test_an_attack_runs_without_the_service(weights: Path) -> None:
    asked = ["--attack", "pgd", "--norm", "linf", "--eps", "8/255", "--step-size", "2/255", "--steps", "10"]
    done = shell("attack", *of(weights), *asked, "--scale", "5", cwd=weights.parent)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"] == {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 10}
    assert report["numbers"]["n"] == 64
    assert report["numbers"]["robust_accuracy"] <= report["numbers"]["clean_accuracy"]


def test_a_preset_its_trajectory_and_options(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = printed(capsys, "attack", *of(weights), "--attack", "pgd_linf", "--trajectory", "-o", "loss=margin")
    assert report["parameters"]["loss"] == "margin"
    assert len(report["curves"]["loss_median"]) == 11
    assert "valley_n" in report["numbers"]


def test_widths_are_in_the_attacks_own_norm_also_where_it_is_not_said(
    weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--attack", "pgd", "--eps", ".1", "--step-size", ".02", "--steps", "10", "--trajectory"]
    said, left_out = (
        printed(capsys, "attack", *of(weights), *asked, *norm)["numbers"] for norm in (["--norm", "linf"], [])
    )
    assert said["basin_width_e01_median"] == left_out["basin_width_e01_median"] is not None


def test_measures(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at_1 = printed(capsys, "measure", *of(weights))
    at_5 = printed(capsys, "measure", *of(weights), "--scale", "5")
    assert at_5["numbers"]["weight_norm"] == pytest.approx(5 * at_1["numbers"]["weight_norm"])
    trace = printed(capsys, "measure", *of(weights), "--measure", "hessian_trace_network", "-o", "probes=2")
    assert trace["numbers"]["hessian_trace_network"] != 0


def test_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pgd_linf" in printed(capsys, "list")["attacks"]


def test_presets_are_those_of_the_service() -> None:
    for name, parameters in cli.PRESETS.items():
        assert Pgd(**parameters) == PRESETS[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--dataset", "cifar11"], "cifar11"),
        (["--dataset", "npz:nowhere"], "train.npz"),
        (["--architecture", "simple_cnn"], "another network"),
        (["--architecture", "resnet9000"], "resnet9000"),
        (["--eps", "1/0"], "1/0"),
        (["--eps", "1e-400"], "1e-400"),
        (["--eps", "1_0"], "1_0"),
        (["--eps", "\u0661"], "\u0661"),
        (["--eps", "inf"], "inf"),
        (["--eps", "8"], '"8/255"'),
        (["--attack", "pgd", "--eps", ".1", "--step-size", "2"], '"2/255"'),
        (["--device", "cuda:99"], "cuda:99"),
        (["--samples", "100000"], "500"),
        (["-o", "wurst=1"], "wurst"),
        (["-o", "wurst"], "NAME=VALUE"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence(
    change: list[str], says: str, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main(["attack", *of(weights), *change])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_training_that_could_not_be_saved_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "nowhere" / "weights.safetensors")
    assert cli.main(["train", "--architecture", "mlp", "--dataset", "digits", "--out", out]) == 2
    assert "no folder" in capsys.readouterr().err

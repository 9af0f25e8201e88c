"""No step of an attack or of a training waits for a GPU, and a measure waits a fixed number of times.

On a pretended GPU, which notes what the host would have waited for; `tests/gpu` asks a real one.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from pretend_gpu import DEVICE, PretendGpu
from torch import Tensor, nn

from workers.science import training, training_reports
from workers.science.architectures import build
from workers.science.attacks import ATTACKS, AttackInput
from workers.science.attacks.losses import LOSSES
from workers.science.attacks.norms import NORMS
from workers.science.augmentation import Augmentation
from workers.science.closed_forms import ClosedForms
from workers.science.datasets import digits
from workers.science.heads import linear_head
from workers.science.recipes import RECIPES
from workers.science.sharpness import MeasureInput
from workers.science.sharpness.closed_forms import closed_forms

SEE = 2
"""Looks with which an attack notes what one restart has broken, after its last step."""


@pytest.fixture
def gpu() -> Iterator[PretendGpu]:
    with PretendGpu() as gpu:
        yield gpu


def attacked(gpu: PretendGpu, net: Any, attack: str, **params: Any) -> list[int]:
    """Waits so far after each step. The same images are broken as on the CPU."""
    right = net.model(net.x).argmax(1) == net.y
    x, y, index = (of[right][:24] for of in (net.x, net.y, net.index))
    model = copy.deepcopy(net.model).to(DEVICE)
    waits: list[int] = []
    there = AttackInput(
        x.to(DEVICE), y.to(DEVICE), index, on_progress=lambda _step, _steps: waits.append(gpu.waits.total())
    )
    gpu.waits.clear()
    found = ATTACKS[attack](model, there, **params)
    after = gpu.waits.copy()
    here = ATTACKS[attack](net.model, AttackInput(x, y, index), **params)
    assert torch.equal(found.x_adv.cpu(), here.x_adv)
    gpu.waits = after
    return waits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_step_of_pgd_waits(gpu: PretendGpu, digits_net: Any, loss: str, norm: str) -> None:
    """Nor does its start."""
    ball = {"norm": norm, "eps": 0.3, "step_size": 0.1, "steps": 4}
    waits = attacked(gpu, digits_net, "pgd", loss=loss, random_start=True, restarts=2, **ball)
    assert waits == 4 * [0] + 4 * [SEE]
    assert gpu.waits == {"index": 2 * SEE}


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("norm", NORMS)
def test_noise_waits_at_the_end_of_each_draw(gpu: PretendGpu, digits_net: Any, kind: str, norm: str) -> None:
    attacked(gpu, digits_net, "noise", kind=kind, norm=norm, draws=3)
    assert gpu.waits == {"index": 3 * SEE}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("attack", "params"), [("apgd", {"steps": 5}), ("square", {"queries": 6})])
def test_attacks_that_leave_broken_images_look_at_each_step_and_copy_nothing(
    gpu: PretendGpu, digits_net: Any, attack: str, params: dict[str, int], norm: str
) -> None:
    attacked(gpu, digits_net, attack, norm=norm, eps=1e-6, **params)
    assert gpu.waits["_to_copy"] == 0
    assert gpu.waits["_local_scalar_dense"] == 6


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_of_a_training_waits(gpu: PretendGpu, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_reports, "STEP_REPORT_SECONDS", math.inf)
    waits: list[list[int]] = []

    class Watch(training_reports.EpochWatch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            waits.append([gpu.waits.total()])

        def after_step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
            super().after_step(loss, logits, y)
            waits[-1].append(gpu.waits.total())

    monkeypatch.setattr(training, "EpochWatch", Watch)
    data = digits.read()
    small = replace(data, test_x=data.test_x[:20], test_y=data.test_y[:20])
    model = build("simple_cnn", data.shape, 10, 0)
    params = {"steps": 2} if RECIPES[recipe].attacks else {}
    how: dict[str, Any] = {
        "recipe": recipe,
        "recipe_params": params,
        "train_samples": 50,
        "batch_size": 20,
        "epochs": 2,
    }
    how |= {"augmentation": Augmentation(1, flip=True, rotation_degrees=10), "lr": 0.01}
    training.train(model, small, device=DEVICE, **how)
    first, second = waits
    assert len(first) == len(second) == 1 + 3
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] < second[0], "the end of an epoch waits: else nothing was counted"


def sharpness(gpu: PretendGpu, net: Any, images: int) -> tuple[int, int]:
    """How often `ClosedForms.of` and the measure `closed_forms` wait, without Lanczos's one look per product."""
    model: nn.Module = copy.deepcopy(net.model).to(DEVICE)
    head = linear_head(model)
    x, y, phi = (of[:images].to(DEVICE) for of in (net.x, net.y, torch.rand(images, head.in_features)))
    gpu.waits.clear()
    ClosedForms.of(phi, head.weight, head.bias, chunk=16)
    of_closed_forms = gpu.waits.total()
    gpu.waits.clear()
    numbers = closed_forms(model, MeasureInput(x, y, x, y, batch_size=16)).numbers
    products = sum(int(of or 0) for name, of in numbers.items() if "_iterations" in name)
    assert products > 0
    return of_closed_forms, gpu.waits.total() - products


def test_measures_of_the_head_wait_as_often_for_many_images_as_for_few(gpu: PretendGpu, digits_net: Any) -> None:
    few, many = (sharpness(gpu, digits_net, images) for images in (32, 128))
    assert few == many
    assert few[0] <= 2
    assert few[1] <= 50

"""Row 1: PGD with ten steps in float32, beside bare passes through the network, torchattacks and Foolbox.

Everyone also classifies the last iterate, without which there is no robust accuracy. Batches are powers of two:
torchattacks averages the loss, and dividing by a power of two changes no bit.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from workers.science.architectures import ARCHITECTURES
from workers.science.attacks import prepare
from workers.science.attacks.pgd import pgd

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10
BATCH = {"simple_cnn": 128, "mlp": 512, "resnet18": 16, "vgg11_bn": 32, "densenet121": 32, "vit_tiny": 16}
FAST: dict[str, Any] = {"fold_batch_norm": True, "channels_last": True}
GOALS = {"simple_cnn": 1.5, "resnet18": 1.15}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pgd(table: Any, network: Callable[..., Any], foolbox: ModuleType, name: str) -> None:
    net = network(name, BATCH.get(name, 8))
    fast = prepare(net.model, probe=net.x[:2], **FAST)
    theirs = torchattacks.PGD(net.model, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=False)
    eagerpy = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=STEPS, random_start=False)
    wrapped = foolbox.PyTorchModel(net.model, bounds=(0, 1), device=net.x.device)

    def bare() -> Tensor:
        x = net.x
        for _ in range(STEPS):
            x = net.x.clone().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(net.model(x), net.y, reduction="sum"), x)
        return classes(net.model, x)

    def ours(model: nn.Module) -> Tensor:
        return pgd(model, net.inputs(), eps=EPS, step_size=STEP_SIZE, steps=STEPS).x_adv

    gap = float((ours(net.model) - theirs(net.x, net.y)).abs().max())
    eps = net.middling_eps()
    walk = {"eps": eps, "step_size": eps / 4, "steps": STEPS}
    plain, folded = (pgd(m, net.inputs(), **walk).x_adv for m in (net.model, fast))
    robust = [int((classes(net.model, x) == net.y).sum()) for x in (plain, folded)]
    table.compare(
        "1",
        f"PGD x{STEPS}, {name}, batch {len(net.x)}",
        {
            "bare passes": bare,
            "torchattacks": lambda: classes(net.model, theirs(net.x, net.y)),
            "foolbox": lambda: eagerpy(wrapped, net.x, net.y, epsilons=EPS),
            "ours": lambda: ours(net.model),
            "ours, folded + channels_last": lambda: ours(fast),
        },
        reference="torchattacks",
        goals={"ours": 0.97} | ({"ours, folded + channels_last": GOALS[name]} if name in GOALS else {}),
        notes={
            "ours": "iterates bit-equal" if gap == 0 else f"iterates differ by {gap:.1e}",
            "ours, folded + channels_last": f"robust {robust[1]}, plain {robust[0]} of {len(net.x)} at eps {eps:.1e}",
        },
    )


@torch.no_grad()
def classes(model: nn.Module, x: Tensor) -> Tensor:
    answers: Tensor = model(x).argmax(1)
    return answers

"""Our AutoAttack beside the original code of its authors, on two networks in both balls, image by image."""

import copy
from typing import Any

import pytest
import torch
from pyautoattack import AutoAttack  # the authors' code, as RobustBench installs it
from torch import Tensor, nn
from torch.nn import functional

from workers.science.architectures import build
from workers.science.attacks import ATTACKS, AttackInput

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

N = 32
NORM = {"linf": "Linf", "l2": "L2"}
OF_CHANCE = 1
"""Images that other random numbers may decide otherwise: those of the random starts and of square."""


def trained(name: str, digits_net: Any) -> nn.Module:
    """The shared convolutional network, or an mlp that has learnt the images behind the first `N`."""
    if name == "simple_cnn":
        convolutional: nn.Module = copy.deepcopy(digits_net.model)
        return convolutional
    model = build("mlp", (1, 8, 8), 10, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(digits_net.x[N:]), digits_net.y[N:]))
        optimizer.step()
    return model.eval()


def robust_to_the_original(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """Bits `[N]` of the images that the published standard leaves right."""
    attack = AutoAttack(model, norm=NORM[norm], eps=eps, seed=0, version="standard")
    with torch.random.fork_rng():
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=N)
    with torch.no_grad():
        right: Tensor = model(x_adv).argmax(1) == y
    return right


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.6)])
@pytest.mark.parametrize("name", ["simple_cnn", "mlp"])
def test_the_same_images_withstand_it(digits_net: Any, name: str, norm: str, eps: float) -> None:
    model, x, y = trained(name, digits_net), digits_net.x[:N], digits_net.y[:N]
    theirs = robust_to_the_original(model, x, y, norm, eps)
    ours = ~ATTACKS["autoattack"](model, AttackInput(x, y, torch.arange(N)), norm=norm, eps=eps).broken
    assert 0 < int(theirs.sum()) < N, "neither side has anything to find"
    assert int((theirs != ours).sum()) <= OF_CHANCE

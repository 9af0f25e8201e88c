"""A small network trained on real scans, shared by the tests of the attacks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.science.architectures import build
from workers.science.datasets import digits, to_unit


@dataclass(frozen=True)
class TrainedNet:
    """`model` in eval mode, and the test set: `x [500, 1, 8, 8]` in [0, 1], `y [500]`, `index [500]`."""

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor


@pytest.fixture(scope="session")
def digits_net() -> TrainedNet:
    """`simple_cnn` on digits, 15 epochs of Adam from a fixed seed: about 99 % right, in a second or two."""
    data = digits.read()
    x, y = to_unit(data.train_x), data.train_y
    model = build("simple_cnn", (1, 8, 8), 10, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(15):
        for batch in torch.split(torch.randperm(len(x), generator=order), 128):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return TrainedNet(model.eval(), to_unit(data.test_x), data.test_y, torch.arange(len(data.test_y)))

"""Trained networks on real images, shared by the acceptance tests: seconds each, on one thread."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from workers.science.architectures import build
from workers.science.augmentation import Augmentation
from workers.science.datasets import ImageData, digits, sample_indices
from workers.science.training import train


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Sums depend on how many threads share them, and with them which network a training ends in: fix it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Subject:
    """`model` in eval mode and the images it is attacked on: `x [n, C, H, W]` uint8, `y [n]`, `index [n]`."""

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor

    def first(self, n: int) -> "Subject":
        return Subject(self.model, self.x[:n], self.y[:n], self.index[:n])


@pytest.fixture(scope="session")
def digits_net() -> Subject:
    """99 % right, and with a margin that 8/255 does not reach on images of 8x8 pixels: attacks need more."""
    data = digits.read()
    return subject(data, trained(data, "standard", epochs=15, batch_size=128), 256)


@pytest.fixture(scope="session")
def robust_digits_net() -> Subject:
    """Adversarially trained at .15: 98 % right, 86 % under PGD at .1."""
    data = digits.read()
    model = trained(data, "adversarial", {"eps": 0.15, "step_size": 0.05, "steps": 4}, epochs=10, batch_size=64)
    return subject(data, model, 256)


@pytest.fixture(scope="session")
def cifar(shared_data: Path) -> ImageData:
    """6,000 training and 2,000 test images of CIFAR-10."""
    (train_x, train_y), (test_x, test_y) = (
        read(shared_data / f"cifar10_{split}.npz") for split in ("train6000", "test2000")
    )
    return ImageData("cifar10", train_x, train_y, test_x, test_y, tuple(str(label) for label in range(10)))


@pytest.fixture(scope="session")
def cifar_net(cifar: ImageData) -> Subject:
    """`simple_cnn` that has learnt 800 images by heart: half of the test images right, and sure of itself."""
    return subject(cifar, trained(cifar, "standard", epochs=20, batch_size=32, train_samples=800), 200)


@pytest.fixture(scope="session")
def robust_cifar_net(cifar: ImageData) -> Subject:
    """Adversarially trained at 8/255, for as long as a test can wait: a third right, a fifth under PGD."""
    params = {"steps": 2, "step_size": 6 / 255}
    return subject(cifar, trained(cifar, "adversarial", params, epochs=8, batch_size=32, train_samples=500), 200)


def trained(
    data: ImageData,
    recipe: str,
    params: dict[str, float] | None = None,
    *,
    epochs: int,
    batch_size: int,
    train_samples: int | None = None,
) -> nn.Module:
    """`simple_cnn`, seed 0, without augmentation; it stays `channels_last`, which is faster on a CPU."""
    model = build("simple_cnn", data.shape, data.n_classes, seed=0)
    train(
        model, data, recipe=recipe, recipe_params=params, epochs=epochs, batch_size=batch_size, lr=0.05,
        train_samples=train_samples, augmentation=Augmentation(), channels_last=True,
    )  # fmt: skip
    return model.eval()


def subject(data: ImageData, model: nn.Module, samples: int) -> Subject:
    index = torch.from_numpy(sample_indices(len(data.test_y), samples))
    return Subject(model, data.test_x[index], data.test_y[index], index)


def read(path: Path) -> tuple[Tensor, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return torch.from_numpy(file["x"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(file["y"])

"""A data set in memory, and what every reader and trainer does with one."""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.science.errors import DatasetCorrupt, WrongShape

PERMUTATION_SEED = 20251014
Order = Literal["permutation", "file"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images as they were read: `train_x, test_x [n, C, H, W]` uint8, `train_y, test_y [n]` int64."""

    name: str
    train_x: Tensor = field(repr=False)
    train_y: Tensor = field(repr=False)
    test_x: Tensor = field(repr=False)
    test_y: Tensor = field(repr=False)
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for split, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dtype != torch.uint8 or x.ndim != 4 or y.dtype != torch.int64 or y.shape != x.shape[:1]:
                raise DatasetCorrupt(
                    f"{self.name}: {split} needs uint8 images [n, C, H, W] and int64 labels [n], has "
                    f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
                )
            if len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= len(self.classes):
                raise DatasetCorrupt(
                    f"{self.name}: {split} needs images, with labels from 0 to {len(self.classes) - 1}"
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise DatasetCorrupt(f"{self.name}: training and test images differ in shape")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @property
    def n_classes(self) -> int:
        """The number k of classes."""
        return len(self.classes)

    def to(self, device: torch.device | str) -> "ImageData":
        """The same data on the device; bytes stay bytes, so CIFAR-10 takes 180 MB."""
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)

    def sha256(self) -> str:
        """SHA-256 over the bytes of `train_x, train_y, test_x, test_y`, as they were read: for the provenance."""
        digest = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def to_unit(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1], on the same device."""
    return x.float() / 255


def sample_indices(n_total: int, n: int, order: Order = "permutation") -> NDArray[np.int64]:
    """The first `n` of the one fixed permutation of `n_total` examples (README.md, "Notation"), so n < n' nest; or, by
    `order` "file", the first `n` of the data set as it is stored, as RobustBench and AutoAttack take them.

    Raises `WrongShape` for more than there are.

    >>> sample_indices(10, 4).tolist() == sample_indices(10, 10).tolist()[:4]
    True
    >>> sample_indices(10, 3, "file").tolist()
    [0, 1, 2]
    """
    if not 0 < n <= n_total:
        raise WrongShape(f"{n} samples were asked for of {n_total} images: ask for 1 to {n_total}")
    if order == "file":
        return np.arange(n, dtype=np.int64)
    return np.random.RandomState(PERMUTATION_SEED).permutation(n_total)[:n].astype(np.int64)


def training_indices(
    n_total: int, train_samples: int | None = None, held_out: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The images that are trained on, and the `held_out` ones, which are the end of the fixed permutation.

    `train_samples` are its first so many; None: all that are not held out. Raises `WrongShape` if they overlap.

    >>> trained_on, held_out = training_indices(10, held_out=3)
    >>> sorted([*trained_on.tolist(), *held_out.tolist()]) == list(range(10)), len(held_out)
    (True, 3)
    """
    order = sample_indices(n_total, n_total)
    count = n_total - held_out if train_samples is None else train_samples
    if count < 1 or count + held_out > n_total:
        raise WrongShape(
            f"{max(count, 0)} images to train on and {held_out} held out were asked for of {n_total} training images"
        )
    return order[:count], order[n_total - held_out :]

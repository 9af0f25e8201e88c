"""The data sets, by name (README.md, "Training"). A new one is a file and a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workers.science.datasets import digits, svhn, synthetic
from workers.science.datasets.cifar import read_cifar10, read_cifar100
from workers.science.datasets.image_data import (
    PERMUTATION_SEED,
    ImageData,
    Order,
    sample_indices,
    to_unit,
    training_indices,
)
from workers.science.datasets.mnist import read_fashion_mnist, read_mnist
from workers.science.datasets.npz import read_npz


@dataclass(frozen=True)
class Dataset:
    """A data set by name: `read(data_dir)` gives it, the rest is what a catalogue says before anything is read.

    Reading downloads absent files, and raises `DatasetMissing` if it cannot, `DatasetCorrupt` for wrong checksums.
    """

    read: Callable[[Path], ImageData]
    summary: str
    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int


# `service/specs/catalog.py` has these facts without torch: `tests/contract/test_catalog.py` compares them.
DATASETS: dict[str, Dataset] = {
    "digits": Dataset(digits.read, "scikit-learn's bundled scans of handwritten digits", (1, 8, 8), 10, 1_297, 500),
    "synthetic": Dataset(synthetic.read, "generated patterns, for tests", (3, 16, 16), 4, 800, 400),
    "cifar10": Dataset(read_cifar10, "CIFAR-10", (3, 32, 32), 10, 50_000, 10_000),
    "cifar100": Dataset(read_cifar100, "CIFAR-100", (3, 32, 32), 100, 50_000, 10_000),
    "svhn": Dataset(svhn.read, "Street View house numbers, cropped", (3, 32, 32), 10, 73_257, 26_032),
    "fashion_mnist": Dataset(read_fashion_mnist, "Fashion-MNIST", (1, 28, 28), 10, 60_000, 10_000),
    "mnist": Dataset(read_mnist, "MNIST", (1, 28, 28), 10, 60_000, 10_000),
}

__all__ = [
    "DATASETS",
    "PERMUTATION_SEED",
    "Dataset",
    "ImageData",
    "Order",
    "read_npz",
    "sample_indices",
    "to_unit",
    "training_indices",
]

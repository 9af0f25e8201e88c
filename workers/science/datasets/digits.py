"""The 1,797 scans of handwritten digits that scikit-learn carries (Alpaydin and Kaynak 1998): real, and no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from workers.science.datasets.image_data import PERMUTATION_SEED, ImageData

N_TEST = 500


def read(_folder: Path | None = None) -> ImageData:
    """1,297 + 500 grey images of 8x8 pixels. Values 0..16 become `round(255 v / 16)`.

    The split is fixed and stratified: of each class the first so many of one permutation are test images, shares
    rounded by largest remainder, lower digit first.
    """
    table = _scans()
    # The one channel comes last in memory. That decides which kernels convolve it, and so the last digits of numbers.
    x = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[:, None]
    y = table[:, -1].astype(np.int64)
    order = np.random.RandomState(PERMUTATION_SEED).permutation(len(y))
    test = np.sort(np.concatenate([order[y[order] == digit][:n] for digit, n in enumerate(_shares(np.bincount(y)))]))
    train = np.setdiff1d(np.arange(len(y)), test)
    return ImageData(
        "digits",
        torch.from_numpy(x[train]),
        torch.from_numpy(y[train]),
        torch.from_numpy(x[test]),
        torch.from_numpy(y[test]),
        tuple(str(digit) for digit in range(10)),
    )


def _scans() -> np.ndarray:
    """Pixels and digit of each scan, `[1797, 65]`: what `load_digits` reads, without the seconds of its import."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install scikit-learn")
    return np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")


def _shares(counts: np.ndarray) -> list[int]:
    exact = counts * N_TEST / counts.sum()
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: N_TEST - shares.sum()]] += 1
    return [int(n) for n in shares]

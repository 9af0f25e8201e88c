"""SVHN, cropped house numbers (Netzer et al. 2011): the original .mat files, checked against torchvision's MD5 sums."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workers.science.datasets.files import verified
from workers.science.datasets.image_data import ImageData


def read(folder: Path) -> ImageData:
    """73,257 + 26,032 colour digits of 32x32 pixels, from `folder`, downloaded if absent. Label 10 becomes 0."""
    from torchvision.datasets import SVHN  # here: it takes seconds to import

    splits = []
    for split in ("train", "test"):
        url, file, md5 = SVHN.split_list[split]
        splits.append(read_mat(verified(folder / file, md5, [url])))
    (train_x, train_y), (test_x, test_y) = splits
    return ImageData("svhn", train_x, train_y, test_x, test_y, tuple(str(digit) for digit in range(10)))


def read_mat(path: Path) -> tuple[Tensor, Tensor]:
    """`X [32, 32, 3, n]` and `y [n, 1]` with labels 1..10 -> images `[n, 3, 32, 32]` and labels `[n]` 0..9."""
    from scipy.io import loadmat  # here: it takes seconds to import

    content = loadmat(path)
    x = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
    y = content["y"].astype(np.int64).reshape(-1) % 10
    return torch.from_numpy(x), torch.from_numpy(y)

"""A lab's own images: a folder with `train.npz` and `test.npz`: `x` uint8 NHWC or `[n, H, W]`, `y` int64."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.science.datasets.files import checksum
from workers.science.datasets.image_data import ImageData
from workers.science.errors import DatasetCorrupt, DatasetMissing

PREFIX = "npz:"  # `service/model/names.py` has it too: `tests/contract/test_catalog.py` compares them
FILES = ("train.npz", "test.npz")


def read_npz(folder: Path, sha256: Mapping[str, str] | None = None) -> ImageData:
    """The data set in `folder`. `sha256` are the sums that `train.npz` and `test.npz` must have; None: any.

    Labels are 0..k-1, each with at least one training image, k >= 2; the class names are the labels.
    Raises `DatasetMissing`, and `DatasetCorrupt` for other bytes, dtypes, shapes or labels. Nothing is unpickled.
    """
    paths = [folder / file for file in FILES]
    for path in paths:
        if not path.is_file():
            raise DatasetMissing(f"{path} is not there: put train.npz and test.npz in {folder}")
        if sha256 is not None and checksum(path, "sha256") != sha256[path.name]:
            raise DatasetCorrupt(f"{path} is not the file that was registered: register it again under another name")
    (train_x, train_y), (test_x, test_y) = (_read_file(path) for path in paths)
    classes = int(train_y.max()) + 1
    if classes < 2:
        raise DatasetCorrupt(f"{paths[0]}: all labels are 0, a data set needs at least 2 classes")
    missing = sorted(set(range(classes)) - set(np.unique(train_y).tolist()))
    if missing:
        raise DatasetCorrupt(
            f"{paths[0]}: labels must be 0..{classes - 1} without gaps, but none is {missing[0]}: renumber the labels"
        )
    if int(test_y.max()) >= classes:
        raise DatasetCorrupt(f"{paths[1]}: label {int(test_y.max())} has no training image (labels 0..{classes - 1})")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise DatasetCorrupt(f"{folder}: training images are {train_x.shape[1:]}, test images {test_x.shape[1:]} (HWC)")
    return ImageData(
        PREFIX + folder.name,
        _channels_first(train_x),
        torch.from_numpy(train_y),
        _channels_first(test_x),
        torch.from_numpy(test_y),
        tuple(str(label) for label in range(classes)),
    )


def _read_file(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except KeyError as error:
        raise DatasetCorrupt(f"{path} lacks an array: it needs x (images) and y (labels)") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise DatasetCorrupt(f"{path} is not an npz of plain arrays ({error}): write it with numpy.savez") from error
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DatasetCorrupt(f"{path}: x must be uint8 [n, H, W, C] or [n, H, W], it is {x.dtype} {x.shape}")
    if y.dtype != np.int64 or y.ndim != 1:
        raise DatasetCorrupt(f"{path}: y must be int64 [n], it is {y.dtype} {y.shape}")
    if len(x) != len(y):
        raise DatasetCorrupt(f"{path}: {len(x)} images but {len(y)} labels")
    if x.size == 0:
        raise DatasetCorrupt(f"{path}: there are no images in it")
    if y.min() < 0:
        raise DatasetCorrupt(f"{path}: label {int(y.min())} is negative, labels must be 0..k-1")
    return (x[..., None] if x.ndim == 3 else x), y


def _channels_first(x: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

"""MNIST (LeCun 1998) and Fashion-MNIST (Xiao 2017): the original idx files, checked against torchvision's MD5 sums."""

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from workers.science.datasets.files import verified
from workers.science.datasets.image_data import ImageData
from workers.science.errors import DatasetCorrupt

if TYPE_CHECKING:
    from torchvision.datasets import MNIST


def read_mnist(folder: Path) -> ImageData:
    """60,000 + 10,000 grey handwritten digits of 28x28 pixels, from `folder/MNIST/raw`, downloaded if absent."""
    from torchvision.datasets import MNIST  # here: it takes seconds to import

    return _read("mnist", MNIST, folder)


def read_fashion_mnist(folder: Path) -> ImageData:
    """60,000 + 10,000 grey pieces of clothing of 28x28 pixels, from `folder/FashionMNIST/raw`, downloaded if absent."""
    from torchvision.datasets import FashionMNIST  # here: it takes seconds to import

    return _read("fashion_mnist", FashionMNIST, folder)


def _read(name: str, source: "type[MNIST]", folder: Path) -> ImageData:
    arrays = []
    for file, md5 in source.resources:
        path = folder / source.__name__ / "raw" / file
        arrays.append(read_idx(verified(path, md5, [mirror + file for mirror in source.mirrors])))
    train_x, train_y, test_x, test_y = arrays
    return ImageData(
        name, train_x[:, None], train_y.long(), test_x[:, None], test_y.long(), tuple(str(c) for c in source.classes)
    )


def read_idx(path: Path) -> Tensor:
    """A gzipped idx file of bytes: magic 0, 0, 8, number of dimensions; big-endian int32 sizes; the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != b"\0\0\x08":
            raise ValueError("the magic number is not that of bytes")
        sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetCorrupt(f"{path} is not a gzipped idx file ({error}): put the original there") from error
    return torch.from_numpy(values.copy())

"""A lab's own data set: two npz files, checked once when registered and named by their SHA-256 from then on."""

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.errors import InvalidSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Registration:
    """What the store keeps of a data set: the digests of its files, the shape of an image and the counts."""

    name: str
    train_sha256: str
    test_sha256: str
    channels: int
    height: int
    width: int
    classes: int
    train_count: int
    test_count: int


def inspect(name: str, train: Path, test: Path, train_sha256: str, test_sha256: str) -> Registration:
    """Check both files: `x` uint8 `[n, height, width(, channels)]`, `y` int64 `[n]`, labels 0 .. k-1, no pickles.

    Raises `InvalidSpec` with a sentence for whatever is wrong.
    """
    if not NAME.fullmatch(name):
        raise InvalidSpec([("/name", f"{name!r} cannot be a name: letters, digits, `_`, `.` and `-`, at most 100")])
    train_x, train_y = _read(train, "train.npz")
    test_x, test_y = _read(test, "test.npz")
    if train_x.shape[1:] != test_x.shape[1:]:
        raise InvalidSpec(
            [("/test", f"test images have shape {test_x.shape[1:]}, training images {train_x.shape[1:]}")]
        )
    found = np.unique(train_y)
    classes = int(found[-1]) + 1
    if classes < 2:
        raise InvalidSpec([("/train", "all training labels are 0: at least two classes are needed")])
    if len(found) < classes:
        first = next(label for label, there in enumerate(found.tolist()) if label != there)
        raise InvalidSpec([("/train", f"labels must be 0 .. {classes - 1}; no training image has {first}")])
    if int(test_y.max()) >= classes:
        raise InvalidSpec([("/test", f"test labels reach {int(test_y.max())}, training labels only {classes - 1}")])
    height, width = train_x.shape[1:3]
    channels = train_x.shape[3] if train_x.ndim == 4 else 1
    return Registration(
        name, train_sha256, test_sha256, channels, height, width, classes, len(train_x), len(test_x)
    )  # fmt: skip


def _read(path: Path, what: str) -> tuple[np.ndarray, np.ndarray]:
    pointer = f"/{what.removesuffix('.npz')}"
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            for name in {"x", "y"}.intersection(file.files):
                arrays[name] = np.asarray(file[name])
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
        raise InvalidSpec([(pointer, f"{what} is not a readable npz file without pickled objects: {error}")]) from None
    if len(arrays) < 2:
        raise InvalidSpec([(pointer, f"{what} needs the arrays `x` and `y`; it has {list(arrays) or 'neither'}")])
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise InvalidSpec(
            [(pointer, f"`x` of {what} must be uint8 [n, height, width, 1 or 3], it is {x.dtype} {list(x.shape)}")]
        )
    if y.dtype != np.int64 or y.shape != x.shape[:1]:
        raise InvalidSpec([(pointer, f"`y` of {what} must be int64 [{len(x)}], it is {y.dtype} {list(y.shape)}")])
    if x.size == 0 or int(y.min()) < 0:
        raise InvalidSpec([(pointer, f"{what} must have images, and no negative label")])
    return x, y

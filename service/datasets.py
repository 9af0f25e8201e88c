"""A lab's own data set: two npz files, checked once when registered and named by their SHA-256 from then on."""

import hashlib
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from service.errors import InvalidSpec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
MAX_BYTES = 2**35  # of an array, unfolded: workers hold it in memory
MAX_WHOLE_BYTES = 2**30  # of one that is not read piece by piece: labels, and images in Fortran's order
CHUNK_BYTES = 2**24
COLOURS = (1, 3)


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


@dataclass(frozen=True)
class _Array:
    """An array inside an npz file, as its header describes it."""

    path: Path
    member: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    def whole(self) -> np.ndarray:
        """Raises whatever a damaged archive raises."""
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            found: np.ndarray = npy.read_array(file, allow_pickle=False)
        return found

    def entries(self) -> Iterator[np.ndarray]:
        """Its entries along the first axis, some megabytes at a time."""
        if self.fortran:  # such an array has no entry in one piece
            yield self.whole()
            return
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        at_once = max(1, CHUNK_BYTES // max(1, size))
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as file:
            _header(file)
            for start in range(0, self.shape[0], at_once):
                n = min(at_once, self.shape[0] - start)
                content = file.read(n * size)
                yield np.frombuffer(content, dtype=self.dtype).reshape(n, *self.shape[1:])
            file.read(1)  # at the end the archive compares its checksum


@dataclass
class _Split:
    """Images, not read yet, and labels `[n]`."""

    pointer: str
    x: _Array
    y: np.ndarray

    brightest: int = 0  # pixel, once the digests were read

    def digests(self) -> Iterator[bytes]:
        """One of each image."""
        try:
            for images in self.x.entries():
                self.brightest = max(self.brightest, int(images.max()))
                yield from (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
        except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
            raise _unreadable(self.pointer, error) from None


def inspect(name: str, train: Path, test: Path, train_sha256: str, test_sha256: str) -> tuple[Registration, int]:
    """Check both files: `x` uint8 `[n, height, width(, channels)]`, `y` int64 `[n]`, labels 0 .. k-1, no pickles.

    Says too how many test images are training images as well. No array of images is in memory as a whole.
    Raises `InvalidSpec` with a sentence for whatever is wrong.
    """
    if not NAME.fullmatch(name):
        raise _refusal("/name", f"{name!r} cannot be a name: letters, digits, `_`, `.` and `-`, at most 100")
    if train_sha256 == test_sha256:
        sentence = "train.npz and test.npz are the same file: an accuracy on it would be that on training images"
        raise _refusal("/test", sentence)
    trained, tested = _split(train, "/train"), _split(test, "/test")
    shape = trained.x.shape[1:]
    if shape != tested.x.shape[1:]:
        raise _refusal("/test", f"test images have shape {tested.x.shape[1:]}, training images {shape}")
    classes = _classes(trained.y)
    if int(tested.y.max()) >= classes:
        raise _refusal("/test", f"test labels reach {int(tested.y.max())}, training labels only {classes - 1}")
    known = set(trained.digests())
    if trained.brightest == 1:
        sentence = "the training images hold only 0 and 1, and images are uint8 from 0 to 255: multiply both by 255"
        raise _refusal("/train", sentence)
    in_both = sum(digest in known for digest in tested.digests())
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    counts = (len(trained.y), len(tested.y))
    return Registration(name, train_sha256, test_sha256, channels, height, width, classes, *counts), in_both


def _classes(y: np.ndarray) -> int:
    """How many there are among the training labels."""
    found = np.unique(y)
    first, last = int(found[0]), int(found[-1])
    if last == 0:
        raise _refusal("/train", "all training labels are 0: at least two classes are needed")
    if first == 1 and len(found) == last > 1:
        raise _refusal("/train", f"labels are 1 .. {last} and must be 0 .. {last - 1}: subtract 1 in both files")
    if len(found) <= last:
        absent = next(label for label, there in enumerate([*found.tolist(), -1]) if label != there)
        sentence = (
            f"labels must be 0 .. {last} without gaps; no training image has {absent}: renumber them in both files"
        )
        raise _refusal("/train", sentence)
    return last + 1


def _split(path: Path, pointer: str) -> _Split:
    """The headers are judged before anything that they describe is read."""
    what = pointer.removeprefix("/") + ".npz"
    try:
        arrays = _arrays(path)
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
        raise _unreadable(pointer, error) from None
    if len(arrays) < 2:
        raise _refusal(pointer, f"{what} needs the arrays `x` and `y`; it has {list(arrays) or 'neither'}")
    x, y = arrays["x"], arrays["y"]
    for name, array in arrays.items():
        if (size := array.dtype.itemsize * math.prod(array.shape)) > MAX_BYTES:
            said = f"`{name}` of {what} has {size / 2**30:,.0f} GiB unfolded, at most {MAX_BYTES >> 30} are taken"
            raise _refusal(pointer, said)
        if size > MAX_WHOLE_BYTES and (array.fortran or name == "y"):
            said = f"`{name}` of {what} has {size / 2**30:,.1f} GiB unfolded and has to be read as a whole"
            raise _refusal(pointer, said + (": save np.ascontiguousarray(x)" if array.fortran else ""))
    if x.dtype != np.uint8 or not _is_of_images(x.shape):
        said = f"`x` of {what} must be uint8 [n, height, width, 1 or 3], it is {x.dtype} {list(x.shape)}"
        raise _refusal(pointer, said + _advice(x, pointer))
    if y.dtype != np.int64 or y.shape != x.shape[:1]:
        said = f"`y` of {what} must be int64 [{x.shape[0]}], it is {y.dtype} {list(y.shape)}"
        raise _refusal(pointer, said)
    try:
        labels = y.whole()
    except Exception as error:  # noqa: BLE001
        raise _unreadable(pointer, error) from None
    if math.prod(x.shape) == 0 or int(labels.min()) < 0:
        raise _refusal(pointer, f"{what} must have images, and no negative label")
    return _Split(pointer, x, labels)


def _is_of_images(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or (len(shape) == 4 and shape[3] in COLOURS)


def _advice(x: _Array, pointer: str) -> str:
    """What the images look like, and how they become what they must be."""
    said = ""
    if not _is_of_images(x.shape) and len(x.shape) == 4 and x.shape[1] in COLOURS:
        said += "; that looks like channels first: transpose to NHWC, x.transpose(0, 2, 3, 1)"
    if x.dtype.kind != "f" or math.prod(x.shape) == 0:
        return said
    try:
        some = next(iter(x.entries()))
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
        raise _unreadable(pointer, error) from None
    low, high = float(some.min()), float(some.max())
    if low >= 0 and high <= 1:
        return said + "; these are floats of 0 .. 1: multiply by 255 and round, (x * 255).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return said + "; these are floats of 0 .. 255: round them, x.round().astype(np.uint8)"
    return said + f"; these are floats of {low:.3g} .. {high:.3g}: write the pixels as they were before normalisation"


def _arrays(path: Path) -> dict[str, _Array]:
    """`x` and `y`, as far as they are there, by their headers."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for name in ("x", "y"):
            if (member := f"{name}.npy") not in archive.namelist():
                continue
            with archive.open(member) as file:
                shape, fortran, dtype = _header(file)
                described = file.tell() + dtype.itemsize * math.prod(shape)
            if dtype.hasobject or described != archive.getinfo(member).file_size:
                raise ValueError(f"`{name}` is no plain array, or is cut off")
            found[name] = _Array(path, member, shape, fortran, dtype)
    return found


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is in Fortran's order, and type; `file` stands at the first entry afterwards."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format {version} is unknown")
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _unreadable(pointer: str, error: Exception) -> InvalidSpec:
    what = pointer.removeprefix("/") + ".npz"
    return _refusal(pointer, f"{what} is not a readable npz file without pickled objects: {error}")


def _refusal(pointer: str, sentence: str) -> InvalidSpec:
    return InvalidSpec([(pointer, sentence)])

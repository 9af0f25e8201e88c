"""A lab's own data set: two npz files, checked once when registered and named by their SHA-256 from then on."""

import io
import math
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from service.errors import InvalidSpec
from service.model.names import REGISTERED, REGISTERED_RULE
from service.model.records import Registration

MAX_BYTES = 2**35  # of an array, unfolded: workers hold it in memory
MAX_WHOLE_BYTES = 2**28  # of an array that is not read piece by piece: labels, and images in Fortran's order
MAX_IMAGES = 5_000_000  # of a file
MAX_IMAGE_BYTES = 2**24  # as uint8
LARGE_BYTES = 2**28  # of a file, unfolded: a larger one has at most MAX_RATIO times its packed size
MAX_RATIO = 200  # MNIST has about 5, nothing but zeros 1,000
MAX_DIRECTORY_BYTES = 2**18  # of an archive: zipfile reads its list of members as a whole
MAX_HEADER_BYTES = 10_000  # of an array
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's: zipfile unfolds others without a bound
CHUNK_BYTES = 2**24  # read at once
CHUNK_ENTRIES = 2**18  # at most: for tiny images, the sums and digests take more memory than the images
COLOURS = (1, 3)


@dataclass(frozen=True)
class _Array:
    """An array inside an npz file, as its header describes it."""

    path: Path
    member: str
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[np.generic]

    @property
    def size_bytes(self) -> int:
        """Uncompressed."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def entry_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def whole(self) -> np.ndarray:
        """The whole array. Raises any error that a damaged archive raises."""
        with _archive(self.path) as archive, archive.open(self.member) as file:
            array: np.ndarray = npy.read_array(file, allow_pickle=False)
        return array

    def entries(self) -> Iterator[np.ndarray]:
        """Its entries along the first axis, each as one row `[n, numbers of an entry]`, some megabytes at a time."""
        at_once = max(1, min(CHUNK_ENTRIES, CHUNK_BYTES // max(1, self.entry_bytes)))
        starts = range(0, self.shape[0], at_once)
        if self.fortran:  # such an array has no entry in one piece
            whole = self.whole()
            for start in starts:
                entries = np.ascontiguousarray(whole[start : start + at_once])
                yield entries.reshape(len(entries), -1)
            return
        with _archive(self.path) as archive, archive.open(self.member) as file:
            _header(file)
            for start in starts:
                n = min(at_once, self.shape[0] - start)
                content = file.read(n * self.entry_bytes)
                yield np.frombuffer(content, dtype=self.dtype).reshape(n, -1)
            file.read(1)  # at the end the archive compares its checksum


@dataclass
class _Split:
    """Images, not read yet, and labels `[n]`."""

    pointer: str
    x: _Array
    y: np.ndarray

    brightest: int = 0  # pixel, once the digests were read

    def digests(self, weights: np.ndarray) -> Iterator[np.ndarray]:
        """One of each image, as `_digests` makes them, some megabytes of images at a time."""
        try:
            for images in self.x.entries():
                self.brightest = max(self.brightest, int(images.max()))
                yield _digests(images, weights)
        except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
            raise _unreadable(self.pointer, error) from None


def _weights(size_bytes: int) -> np.ndarray:
    """Weights `[2, words]` for images of this size, random each time: nobody can prepare two images of one digest."""
    return np.random.default_rng().integers(0, 2**64, (2, -(-size_bytes // 4)), dtype=np.uint64)


def _digests(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A digest of each image `[n, bytes]`. A Python loop over the images would keep all other threads waiting.

    The upper halves of two sums of random multiples of its words of 32 bits: two images have the same with
    probability 2^-63, and among five million images and as many others any two do with one below 2^-18.
    """
    n, size = images.shape
    padded = np.zeros((n, 4 * weights.shape[1]), np.uint8)
    padded[:, :size] = images
    high, low = (np.einsum("ij,j->i", padded.view(np.uint32), each) for each in weights)
    digests: np.ndarray = (high >> np.uint64(32)) << np.uint64(32) | (low >> np.uint64(32))
    return digests


def _among(sorted_digests: np.ndarray, digests: np.ndarray) -> int:
    """How many of `digests` are among `sorted_digests`."""
    positions = np.minimum(np.searchsorted(sorted_digests, digests), len(sorted_digests) - 1)
    return int(np.count_nonzero(sorted_digests[positions] == digests))


def inspect(name: str, train: Path, test: Path, train_sha256: str, test_sha256: str) -> tuple[Registration, int]:
    """Check both files: `x` uint8 `[n, height, width(, channels)]`, `y` int64 `[n]`, labels 0 .. k-1, no pickles.

    Returns the registration, and how many test images are training images too. No array of images is in memory as a
    whole. Raises `InvalidSpec` with a sentence on the first fault.
    """
    if not REGISTERED.fullmatch(name):
        raise _refusal("/name", f"{name!r} cannot be a name: {REGISTERED_RULE}")
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
    weights = _weights(math.prod(shape))
    in_training = np.concatenate([*trained.digests(weights)])
    in_training.sort()
    if trained.brightest == 1:
        sentence = "the training images hold only 0 and 1, and images are uint8 from 0 to 255: multiply both by 255"
        raise _refusal("/train", sentence)
    in_both = sum(_among(in_training, digests) for digests in tested.digests(weights))
    height, width, channels = shape if len(shape) == 3 else (*shape, 1)
    counts = (len(trained.y), len(tested.y))
    return Registration(name, train_sha256, test_sha256, channels, height, width, classes, *counts), in_both


def _classes(y: np.ndarray) -> int:
    """The number of classes among the training labels."""
    last = int(y.max())
    there = np.bincount(y[y <= len(y)], minlength=len(y) + 1) > 0  # n labels leave a gap among 0 .. n
    if last == 0:
        raise _refusal("/train", "all training labels are 0: at least two classes are needed")
    if 1 < last <= len(y) and not there[0] and there[1 : last + 1].all():
        raise _refusal("/train", f"labels are 1 .. {last} and must be 0 .. {last - 1}: subtract 1 in both files")
    if (absent := int(np.argmin(there))) < last:
        sentence = (
            f"labels must be 0 .. {last} without gaps; no training image has {absent}: renumber them in both files"
        )
        raise _refusal("/train", sentence)
    return last + 1


def _split(path: Path, pointer: str) -> _Split:
    """The images and labels of a file. The headers are checked before anything that they describe is read."""
    npz = pointer.removeprefix("/") + ".npz"
    try:
        arrays = _arrays(path)
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
        raise _unreadable(pointer, error) from None
    if len(arrays) < 2:
        raise _refusal(pointer, f"{npz} needs the arrays `x` and `y`; it has {list(arrays) or 'neither'}")
    x, y = arrays["x"], arrays["y"]
    for name, array in arrays.items():
        if (size := array.size_bytes) > MAX_BYTES:
            sentence = f"`{name}` of {npz} has {size / 2**30:,.0f} GiB unfolded, at most {MAX_BYTES >> 30} are taken"
            raise _refusal(pointer, sentence)
        if size > MAX_WHOLE_BYTES and (array.fortran or name == "y"):
            sentence = f"`{name}` of {npz} has {size / 2**30:,.1f} GiB unfolded and has to be read as a whole"
            raise _refusal(pointer, sentence + (": save np.ascontiguousarray(x)" if array.fortran else ""))
    _refuse_a_bomb(path, pointer, npz, x.size_bytes + y.size_bytes)
    if x.dtype != np.uint8 or not _is_of_images(x.shape):
        sentence = f"`x` of {npz} must be uint8 [n, height, width, 1 or 3], it is {x.dtype} {list(x.shape)}"
        raise _refusal(pointer, sentence + _advice(x, pointer))
    if x.shape[0] > MAX_IMAGES:
        raise _refusal(pointer, f"{npz} has {x.shape[0]:,} images, at most {MAX_IMAGES:,} are taken")
    if x.entry_bytes > MAX_IMAGE_BYTES:
        sentence = f"an image of {npz} has {x.entry_bytes / 2**20:,.1f} MiB, at most {MAX_IMAGE_BYTES >> 20} are taken"
        raise _refusal(pointer, sentence)
    if y.dtype != np.int64 or y.shape != x.shape[:1]:
        sentence = f"`y` of {npz} must be int64 [{x.shape[0]}], it is {y.dtype} {list(y.shape)}"
        raise _refusal(pointer, sentence)
    try:
        labels = y.whole()
    except Exception as error:  # noqa: BLE001
        raise _unreadable(pointer, error) from None
    if math.prod(x.shape) == 0 or int(labels.min()) < 0:
        raise _refusal(pointer, f"{npz} must have images, and no negative label")
    return _Split(pointer, x, labels)


def _refuse_a_bomb(path: Path, pointer: str, npz: str, unfolded: int) -> None:
    """Refuse a large array that is packed too well: a few bytes would take much of the service's time and memory."""
    if unfolded > LARGE_BYTES and unfolded > MAX_RATIO * (packed := path.stat().st_size):
        sentence = (
            f"{npz} has {packed / 2**20:,.1f} MiB and {unfolded / 2**20:,.0f} unfolded, {unfolded / packed:,.0f} "
        )
        raise _refusal(
            pointer, f"{sentence}times as much: at most {MAX_RATIO} times are taken, so save it with np.savez"
        )


def _is_of_images(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 or (len(shape) == 4 and shape[3] in COLOURS)


def _advice(x: _Array, pointer: str) -> str:
    """The end of a message: how the images differ from the required form, and how to convert them."""
    advice = ""
    if not _is_of_images(x.shape) and len(x.shape) == 4 and x.shape[1] in COLOURS:
        advice += "; that looks like channels first: transpose to NHWC, x.transpose(0, 2, 3, 1)"
    if x.dtype.kind != "f" or not 0 < x.entry_bytes <= CHUNK_BYTES or x.shape[0] == 0:
        return advice
    try:
        some = next(iter(x.entries()))
    except Exception as error:  # noqa: BLE001 - a damaged archive can raise almost anything
        raise _unreadable(pointer, error) from None
    low, high = float(some.min()), float(some.max())
    if low >= 0 and high <= 1:
        return advice + "; these are floats of 0 .. 1: multiply by 255 and round, (x * 255).round().astype(np.uint8)"
    if low >= 0 and high <= 255:
        return advice + "; these are floats of 0 .. 255: round them, x.round().astype(np.uint8)"
    return advice + f"; these are floats of {low:.3g} .. {high:.3g}: write the pixels as they were before normalisation"


def _arrays(path: Path) -> dict[str, _Array]:
    """The headers of `x` and `y`, if they are there."""
    arrays = {}
    with _archive(path) as archive:
        names = archive.namelist()
        for name in ("x", "y"):
            if name in names:  # numpy would read this member, which is not checked here, and not `NAME.npy`
                raise ValueError(f"it has a member `{name}` besides `{name}.npy`")
            if (member := f"{name}.npy") not in names:
                continue
            info = archive.getinfo(member)
            if info.compress_type not in METHODS:
                raise ValueError(f"`{name}` is packed by another method than numpy's (np.savez_compressed)")
            with archive.open(member) as file:
                shape, fortran, dtype = _header(file)
                described = file.tell() + dtype.itemsize * math.prod(shape)
            if dtype.hasobject or min(shape, default=0) < 0 or described != info.file_size:
                raise ValueError(f"`{name}` is no plain array, or is cut off")
            arrays[name] = _Array(path, member, shape, fortran, dtype)
    return arrays


class _Guarded(io.FileIO):
    """A file of which at most `most_bytes` are read at once."""

    most_bytes = MAX_DIRECTORY_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        rest = os.fstat(self.fileno()).st_size - self.tell()
        if (rest if size is None or size < 0 else min(size, rest)) > self.most_bytes:
            raise ValueError("its list of members is too long")
        return super().read(size)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open, with a list of members of a bounded size."""
    with _Guarded(path) as file, zipfile.ZipFile(file) as archive:
        file.most_bytes = sys.maxsize
        yield archive


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Shape, whether it is in Fortran's order, and type; `file` stands at the first entry afterwards."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"its format {version} is unknown")
    prefix = file.read(2 if version == (1, 0) else 4)
    if (size := int.from_bytes(prefix, "little")) > MAX_HEADER_BYTES:  # numpy reads a header before it checks its size
        raise ValueError(f"the header of an array has {size:,} bytes")
    shape, fortran, dtype = read(io.BytesIO(prefix + file.read(size)))
    return shape, fortran, dtype


def _unreadable(pointer: str, error: Exception) -> InvalidSpec:
    npz = pointer.removeprefix("/") + ".npz"
    return _refusal(pointer, f"{npz} is not a readable npz file without pickled objects: {error}")


def _refusal(pointer: str, sentence: str) -> InvalidSpec:
    return InvalidSpec([(pointer, sentence)])

"""What a lab's own images must be, and how files that are not so are refused."""

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import datasets
from service.datasets import Registration, inspect
from service.errors import InvalidSpec


def write(path: Path, x: Any, y: Any, **more: Any) -> Path:
    np.savez(path, x=x, y=y, **more)
    return path


def images(n: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.zeros((n, *(shape or (8, 8, 3))), dtype=np.uint8)


def labels(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.npz", images(4), labels(0, 1, 2, 1))


@pytest.fixture
def test(tmp_path: Path) -> Path:
    return write(tmp_path / "test.npz", images(2), labels(2, 0))


def refused(train: Path, test: Path, name: str = "mine") -> tuple[str, str]:
    with pytest.raises(InvalidSpec) as caught:
        inspect(name, train, test, "a" * 64, "b" * 64)
    [found] = caught.value.errors
    return found


def test_what_the_store_keeps(train: Path, test: Path) -> None:
    found, in_both = inspect("mine", train, test, "a" * 64, "b" * 64)
    assert in_both == 2  # all of them are black
    assert found == Registration("mine", "a" * 64, "b" * 64, 3, 8, 8, 3, 4, 2)
    assert {type(value) for value in vars(found).values()} == {str, int}


def test_grey_images_need_no_channel(tmp_path: Path) -> None:
    train = write(tmp_path / "train.npz", images(2, 5, 7), labels(0, 1))
    test = write(tmp_path / "test.npz", images(1, 5, 7), labels(0), index=labels(3))
    found, _ = inspect("grey", train, test, "a" * 64, "b" * 64)
    assert (found.channels, found.height, found.width) == (1, 5, 7)


@pytest.mark.parametrize("name", ["", "a b", "../a", ".hidden", "a" * 101, "ä", "a\n", "npz:a"])
def test_what_is_no_name(train: Path, test: Path, name: str) -> None:
    assert refused(train, test, name)[0] == "/name"


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (images(2).astype(np.float32), labels(0, 1), "must be uint8"),
        (images(2, 8, 8, 4), labels(0, 1), "must be uint8"),
        (images(2, 8), labels(0, 1), "must be uint8"),
        (images(2), labels(0, 1).astype(np.int32), "must be int64"),
        (images(2), labels(0, 1, 2), "must be int64"),
        (images(2), labels(0, -1), "no negative label"),
        (images(0), labels(), "must have images"),
        (images(2, 0, 8), labels(0, 1), "must have images"),
        (images(2), labels(0, 0), "at least two classes"),
        (images(3), labels(0, 1, 3), "no training image has 2"),
        (images(2), labels(0, 2**62), "no training image has 1"),
        (np.array([None, None]), labels(0, 1), "not a readable npz file"),
        (images(2, 3, 8, 8), labels(0, 1), "looks like channels first: transpose to NHWC, x.transpose(0, 2, 3, 1)"),
        (images(2, 1, 28, 28), labels(0, 1), "looks like channels first"),
        (images(3), labels(1, 2, 3), "labels are 1 .. 3 and must be 0 .. 2: subtract 1 in both files"),
        (images(3), labels(0, 2, 5), "without gaps; no training image has 1: renumber them"),
        (images(3), labels(2, 3, 2), "without gaps; no training image has 0"),
        (images(2), labels(1, 1), "without gaps; no training image has 0"),
        (images(2).astype(np.float32) + 1, labels(0, 1), "0 .. 1: multiply by 255 and round, (x * 255).round()"),
        (images(2).astype(np.float64) + 254.5, labels(0, 1), "floats of 0 .. 255: round them, x.round()"),
        (images(2).astype(np.float16) - 2, labels(0, 1), "floats of -2 .. -2: write the pixels as they were before"),
        (images(2, 3, 8, 8) / 255, labels(0, 1), "x.transpose(0, 2, 3, 1); these are floats of 0 .. 1"),
        (images(0).astype(np.float32), labels(), "must be uint8"),
    ],
)
def test_what_is_no_training_set(tmp_path: Path, test: Path, x: Any, y: Any, said: str) -> None:
    pointer, sentence = refused(write(tmp_path / "train.npz", x, y), test)
    assert pointer == "/train"
    assert said in sentence


@pytest.mark.parametrize(
    ("x", "y", "said"), [(images(1, 8, 9, 3), labels(0), "have shape"), (images(1), labels(3), "test labels reach 3")]
)
def test_what_does_not_suit_the_training_set(tmp_path: Path, train: Path, x: Any, y: Any, said: str) -> None:
    pointer, sentence = refused(train, write(tmp_path / "test.npz", x, y))
    assert pointer == "/test"
    assert said in sentence


def test_pieces_of_advice_make_the_files_right(tmp_path: Path, test: Path) -> None:
    x, y = images(4, 3, 8, 8) / 255, labels(1, 2, 3, 2)
    sentence = refused(write(tmp_path / "train.npz", x, y), test)[1]
    assert "x.transpose(0, 2, 3, 1)" in sentence
    assert "(x * 255).round().astype(np.uint8)" in sentence
    right = write(tmp_path / "train.npz", (x.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8), y - 1)
    assert inspect("mine", right, test, "a" * 64, "b" * 64)[0].classes == 3


def test_one_file_for_both_splits(train: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        inspect("mine", train, train, "a" * 64, "a" * 64)
    assert caught.value.errors[0][0] == "/test"
    assert "train.npz and test.npz are the same file" in str(caught.value)


@pytest.mark.parametrize("in_fortran_order", [False, True])
def test_test_images_that_are_training_images_are_counted(
    tmp_path: Path, in_fortran_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "CHUNK_BYTES", 1000)  # several pieces, the last of them shorter
    x = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    x[41] = x[40]
    y = (np.arange(50) % 3).astype(np.int64)
    own = x[30:].copy()
    own[12:] ^= 1  # the last eight are others
    arranged = np.asfortranarray if in_fortran_order else np.ascontiguousarray
    train = write(tmp_path / "train.npz", arranged(x), y)
    test = tmp_path / "test.npz"
    np.savez_compressed(test, x=own, y=y[30:])
    assert inspect("mine", train, test, "a" * 64, "b" * 64)[1] == 12
    write(test, x, y, more=x)  # other bytes with the same images
    assert inspect("mine", train, test, "a" * 64, "b" * 64)[1] == 50


def test_sizes_are_read_before_anything_is_unfolded(tmp_path: Path, test: Path) -> None:
    """A file of 200 kB whose images would take 200 MB, in the wrong shape; and one that says 64 GiB."""
    train = tmp_path / "train.npz"
    np.savez_compressed(train, x=np.zeros((2, 10_000, 10_000), np.uint8)[:, None], y=labels(0, 1))
    assert train.stat().st_size < 300_000
    tracemalloc.start()
    assert "looks like channels first" in refused(train, test)[1]
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "|u1", "fortran_order": False, "shape": (2**20, 256, 256)})
    train.write_bytes(archive(x=huge.getvalue(), y=one_array()))
    assert "cut off" in refused(train, test)[1]


def test_more_than_a_worker_holds_is_refused(train: Path, test: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_BYTES", 700)
    pointer, sentence = refused(train, test)
    assert (pointer, "`x` of train.npz has 0 GiB unfolded" in sentence) == ("/train", True)


@pytest.mark.parametrize(("what", "refusal"), [("y", "`y` of train.npz"), ("x", "save np.ascontiguousarray(x)")])
def test_what_has_to_be_read_as_a_whole_is_not_large(
    tmp_path: Path, test: Path, what: str, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros in Fortran's order: a megabyte of a file would be a gigabyte of memory."""
    x = np.asfortranarray(images(4)) if what == "x" else images(4)
    train = write(tmp_path / "train.npz", x, labels(0, 1, 2, 1))
    inspect("mine", train, test, "a" * 64, "b" * 64)
    monkeypatch.setattr(datasets, "MAX_WHOLE_BYTES", 31 if what == "y" else 767)
    pointer, sentence = refused(train, test)
    assert (pointer, refusal in sentence) == ("/train", True)


@pytest.mark.parametrize("where", ["x", "y"])
def test_a_byte_that_was_changed_on_the_way(tmp_path: Path, test: Path, where: str) -> None:
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    train = write(tmp_path / "train.npz", x, labels(0, 1, 2, 1))
    content = train.read_bytes()
    at = content.index(x.tobytes() if where == "x" else labels(0, 1, 2, 1).tobytes())
    train.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    pointer, sentence = refused(train, test)
    assert (pointer, "not a readable npz" in sentence) == ("/train", True)


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def one_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, images(2))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not an archive", b"PK\x03\x04 cut off", one_array(), archive(x=b"", y=b""), archive(x=b"\x93NUMPY\x01"),
        archive(x=one_array()), archive(x=one_array(), y=b"\x80\x04."), archive(x=one_array(), y=one_array())[:-40],
    ],
)  # fmt: skip
def test_any_other_file(tmp_path: Path, test: Path, content: bytes) -> None:
    path = tmp_path / "train.npz"
    path.write_bytes(content)
    pointer, sentence = refused(path, test)
    assert pointer == "/train"
    assert any(said in sentence for said in ("not a readable npz", "needs the arrays", "must be"))


def test_images_of_0_and_1_are_no_bytes(tmp_path: Path) -> None:
    """They would be nearly black, which no training says."""
    x = images(2)
    x[0, 0] = 1
    test = write(tmp_path / "test.npz", x[:1], labels(0))
    pointer, said = refused(write(tmp_path / "train.npz", x, labels(0, 1)), test)
    assert (pointer, "hold only 0 and 1" in said, "multiply both by 255" in said) == ("/train", True, True)
    x[1, 1] = 2
    inspect("mine", write(tmp_path / "other.npz", x, labels(0, 1)), test, "a" * 64, "b" * 64)

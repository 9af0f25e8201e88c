"""What a lab's own images must be, and how files that are not so are refused."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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
    found = inspect("mine", train, test, "a" * 64, "b" * 64)
    assert found == Registration("mine", "a" * 64, "b" * 64, 3, 8, 8, 3, 4, 2)
    assert {type(value) for value in vars(found).values()} == {str, int}


def test_grey_images_need_no_channel(tmp_path: Path) -> None:
    train = write(tmp_path / "train.npz", images(2, 5, 7), labels(0, 1))
    test = write(tmp_path / "test.npz", images(1, 5, 7), labels(0), index=labels(3))
    found = inspect("grey", train, test, "a" * 64, "b" * 64)
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

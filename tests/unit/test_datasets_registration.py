"""What a lab's own images must be, and how files that are not so are refused."""

import io
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from service.errors import InvalidSpec
from service.lab import datasets
from service.lab.datasets import inspect
from service.model.records import Registration


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
    assert {type(value) for value in asdict(found).values()} == {str, int}


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


@contextmanager
def memory_below(most_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most_bytes
    finally:
        tracemalloc.stop()


def header(descr: str, *shape: int) -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array_header_1_0(written, {"descr": descr, "fortran_order": False, "shape": shape})
    return written.getvalue()


def bomb(path: Path, n: int, *shape: int) -> Path:
    """Of the right types and shapes, and all of it 0."""
    block = bytes(2**22)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, begin, size in (("x", header("|u1", n, *shape), n * np.prod(shape)), ("y", header("<i8", n), 8 * n)):
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(begin)
                for start in range(0, int(size), len(block)):
                    member.write(block[: int(size) - start])
    return path


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((5_000_001, 1, 1), "has 5,000,001 images, at most 5,000,000 are taken"),
        ((30_000_000, 1, 1), "257 unfolded, "),
        ((100, 1000, 1000, 3), "286 unfolded, "),
        ((2, 6000, 3000), "an image of bomb.npz has 17.2 MiB, at most 16 are taken"),
    ],
)
def test_a_bomb_of_the_right_shape_is_refused_by_its_headers(
    tmp_path: Path, train: Path, test: Path, shape: tuple[int, ...], sentence: str
) -> None:
    """36 kB of 1x1 images were accepted: 2 million of them, and 5 s in which nothing else ran."""
    path = bomb(tmp_path / "bomb.npz", *shape)
    assert path.stat().st_size < 2_000_000
    with memory_below(1_000_000):
        answers = {"train": refused(path, test), "test": refused(train, path)}
    for name, (pointer, said) in answers.items():
        assert pointer == f"/{name}"
        assert sentence.replace("bomb", name) in said


def test_as_many_images_as_are_taken_keep_nobody_waiting(tmp_path: Path) -> None:
    """No loop over images in Python: one took 1.3 s for these, and kept all other threads waiting."""
    n = 500_000
    path = tmp_path / "train.npz"
    np.savez(path, x=np.arange(n, dtype=np.uint32).view(np.uint8).reshape(n, 2, 2), y=np.arange(n) % 2)
    test = write(tmp_path / "test.npz", np.zeros((n, 2, 2), np.uint8), np.arange(n) % 2)
    started = time.process_time()
    assert inspect("mine", path, test, "a" * 64, "b" * 64)[1] == n
    assert time.process_time() - started < 0.6
    with memory_below(60 * n):  # 16 bytes of them are the labels, 8 the digests
        inspect("mine", path, test, "a" * 64, "b" * 64)


def test_the_labels_of_as_many_classes_as_images(tmp_path: Path) -> None:
    y = np.arange(1_000_000)
    y[700_000:] += 1
    train = write(tmp_path / "train.npz", images(1_000_000, 1, 1), y)
    test = write(tmp_path / "test.npz", images(1, 1, 1), labels(0))
    with memory_below(40_000_000):
        assert "no training image has 700000" in refused(train, test)[1]


def mnist_like(n: int) -> np.ndarray[Any, Any]:
    """Strokes of grey on black: a tenth of all pixels."""
    rng = np.random.default_rng(0)
    x = images(n, 28, 28)
    x[:, 8:20, 11:17] = rng.integers(0, 256, (n, 12, 6), dtype=np.uint8)
    return x


@pytest.mark.parametrize("name", ["mnist-like", "digits", "one pixel in a hundred"])
def test_ordinary_images_that_are_packed_well_are_taken(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    if name == "mnist-like":
        x = mnist_like(60_000)
    elif name == "digits":
        x = (load_digits(return_X_y=True)[0].reshape(-1, 8, 8) * 15).astype(np.uint8)
    else:
        x = np.where(rng.random((20_000, 28, 28)) < 0.01, np.uint8(255), np.uint8(0))
    y = (np.arange(len(x)) % 10).astype(np.int64)
    train, test = tmp_path / "train.npz", tmp_path / "test.npz"
    np.savez_compressed(train, x=x, y=y)
    np.savez_compressed(test, x=x[::-1][:100], y=y[::-1][:100])
    inspect("mine", train, test, "a" * 64, "b" * 64)
    monkeypatch.setattr(datasets, "LARGE_BYTES", 0)  # they are no bombs however many there are
    found, in_both = inspect("mine", train, test, "a" * 64, "b" * 64)
    assert (found.train_count, in_both) == (len(x), 100)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 64, 192])
def test_images_are_told_apart_as_their_bytes_are(size: int) -> None:
    rng = np.random.default_rng(size)
    base = rng.integers(0, 256, size, dtype=np.uint8)
    x = np.tile(base, (8 * size + 1, 1))
    for bit in range(8 * size):  # each is one bit away from the last one
        x[bit, bit // 8] ^= 1 << bit % 8
    weights = datasets._weights(size)
    assert len(np.unique(datasets._digests(x, weights))) == len(x)
    few = rng.integers(0, 2, (2, 300, size), dtype=np.uint8)
    few[:, :, 6:] = 0  # so that many are equal
    known = np.unique(datasets._digests(few[0], weights))
    there = {image.tobytes() for image in few[0]}
    assert len(known) == len(there)
    expected = sum(image.tobytes() in there for image in few[1])
    assert datasets._among(known, datasets._digests(few[1], weights)) == expected


def long_header() -> bytes:
    """As long as format 2 allows, which numpy reads before it asks for its length."""
    return b"\x93NUMPY\x02\x00" + (2**26).to_bytes(4, "little") + b" " * 2**26


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda: packed({"x.npy": bytes(2**23)}, zipfile.ZIP_BZIP2), "another method than numpy's"),
        (lambda: packed({"x.npy": bytes(2**23)}, zipfile.ZIP_LZMA), "another method than numpy's"),
        (lambda: packed({"x.npy": long_header()}), "the header of an array has 67,108,864 bytes"),
        (lambda: packed({"x.npy": one_array(), "x": one_array()}), "a member `x` besides `x.npy`"),
        (lambda: packed({"x.npy": header("|u1", 2, -4, -8) + bytes(64)}), "no plain"),
        (lambda: packed({f"{n:040}": b"" for n in range(4_000)}), "its list of members is too long"),
    ],
    ids=["bzip2", "lzma", "header", "second member", "negative", "members"],
)
def test_bombs_around_the_arrays(tmp_path: Path, test: Path, content: Any, sentence: str) -> None:
    train = tmp_path / "train.npz"
    train.write_bytes(content())
    assert train.stat().st_size < 2_000_000
    with memory_below(2_000_000):
        pointer, said = refused(train, test)
    assert (pointer, sentence in said) == ("/train", True), said


def test_the_guide_says_what_is_taken() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "own-data-and-weights.md").read_text(encoding="utf-8")
    sizes = (f"{datasets.MAX_IMAGE_BYTES >> 20} MiB", f"{datasets.LARGE_BYTES >> 20} MiB")
    for said in (
        *sizes,
        f"{datasets.MAX_IMAGES:,} images",
        f"{datasets.MAX_RATIO} times",
        f"{datasets.MAX_BYTES >> 30} GiB",
    ):
        assert said in guide, said


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

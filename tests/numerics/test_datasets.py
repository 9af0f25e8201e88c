import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits

from workers.science.datasets import (
    DATASETS,
    ImageData,
    digits,
    mnist,
    read_npz,
    sample_indices,
    svhn,
    to_unit,
)
from workers.science.datasets.cifar import checksums, read_cifar10, read_cifar100
from workers.science.datasets.files import checksum, verified
from workers.science.errors import DatasetCorrupt, DatasetMissing, WrongShape

MINI = Path(__file__).parents[2].parent / "shared" / "data" / "mini"
needs_mini = pytest.mark.skipif(not MINI.is_dir(), reason="the shared test images are not on this machine")


def md5s(folder: Path, names: list[str]) -> dict[str, str]:
    return {name: checksum(folder / name, "md5") for name in names}


CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
CIFAR100_FILES = ["train", "test", "meta"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_what_the_table_says_is_what_is_read(name: str, tmp_path: Path) -> None:
    entry = DATASETS[name]
    data = entry.read(tmp_path)
    assert data.name == name
    assert data.shape == entry.shape
    assert data.n_classes == entry.classes
    assert (len(data.train_y), len(data.test_y)) == (entry.train, entry.test)
    assert data.sha256() == entry.read(tmp_path).sha256()
    assert not list(tmp_path.iterdir())


def test_digits_are_the_scans_each_once_and_stratified() -> None:
    data = digits.read()
    scans = load_digits()
    pixels = np.floor(scans.images * 255 / 16 + 0.5).astype(int).reshape(-1, 64).tolist()
    expected = sorted((tuple(row), label) for row, label in zip(pixels, scans.target.tolist(), strict=True))
    x = torch.cat([data.train_x, data.test_x]).flatten(1).tolist()
    y = torch.cat([data.train_y, data.test_y]).tolist()
    assert sorted((tuple(row), label) for row, label in zip(x, y, strict=True)) == expected
    share = np.bincount(scans.target) * 500 / 1797
    assert (np.abs(data.test_y.bincount().numpy() - share) < 1).all()
    assert data.train_x.max() == 255


def test_digits_lie_in_memory_as_they_always_did() -> None:
    """The stride of a dimension of one element changes no byte, but the kernels that torch takes, and so numbers."""
    data = digits.read()
    assert data.train_x.stride() == data.test_x.stride() == (64, 1, 8, 1)


def test_digits_and_synthetic_are_the_bytes_they_always_were() -> None:
    assert digits.read().sha256() == "5cb335b3b6f2feba5ccae641f5baab1ba91518f43e2bca76fc02c7210618d9d2"
    synthetic = DATASETS["synthetic"].read(Path())
    assert synthetic.sha256() == "8d6748146375f75513eaf57922cd7fb9e51476df323a592e945e1b31658cc5f3"


@needs_mini
def test_cifar10_from_the_original_layout() -> None:
    data = read_cifar10(MINI, md5s(MINI / "cifar-10-batches-py", CIFAR10_FILES))
    assert data.train_x.shape == (200, 3, 32, 32)
    assert data.test_x.shape == (200, 3, 32, 32)
    assert data.classes[3] == "cat"
    original = np.load(MINI.parent / "cifar10_test2000.npz", allow_pickle=False)
    first = torch.from_numpy(original["x"][:200]).permute(0, 3, 1, 2)
    assert torch.equal(data.test_x, first)
    assert data.test_y.tolist() == original["y"][:200].tolist()


@needs_mini
def test_cifar100_has_fine_labels() -> None:
    data = read_cifar100(MINI, md5s(MINI / "cifar-100-python", CIFAR100_FILES))
    assert (len(data.train_y), len(data.test_y), data.n_classes) == (200, 200, 100)
    original = np.load(MINI.parent / "cifar100_test2000.npz", allow_pickle=False)
    assert data.test_y.tolist() == original["y"][:200].tolist()


@needs_mini
@pytest.mark.usefixtures("offline")
def test_other_bytes_than_the_official_ones_are_refused(tmp_path: Path) -> None:
    shutil.copytree(MINI / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    with pytest.raises(DatasetCorrupt, match=r"data_batch_1 has MD5.*could not be downloaded \(.*no network"):
        read_cifar10(tmp_path)


def test_official_checksums_cover_every_file() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    assert sorted(checksums(CIFAR10)) == sorted(CIFAR10_FILES)
    assert checksums(CIFAR100)["train"] == "16019d7e3df5f24257cddd939b257f8d"


def test_a_batch_that_asks_for_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1/0",)

    base = tmp_path / "cifar-100-python"
    base.mkdir()
    for name in CIFAR100_FILES:
        (base / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DatasetCorrupt, match="eval"):
        read_cifar100(tmp_path, md5s(base, CIFAR100_FILES))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"digits", "synthetic"}))
def test_an_absent_data_set_says_where_its_files_go(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing, match="put the file there") as caught:
        DATASETS[name].read(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_download_is_checked_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"original"
    md5 = hashlib.md5(content).hexdigest()
    answers = {"http://bad/": b"a proxy's error page", "http://good/": content}
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(answers[url]))
    path = tmp_path / "deep" / "file"
    with pytest.raises(DatasetMissing, match="another checksum"):
        verified(path, md5, ["http://bad/"])
    assert verified(path, md5, ["http://bad/", "http://good/"]).read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The small CIFAR-10 as the archive that there is to download, with its files as the official ones."""
    from torchvision.datasets import CIFAR10

    if not MINI.is_dir():
        pytest.skip("the shared test images are not on this machine")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(MINI / "cifar-10-batches-py", arcname="cifar-10-batches-py")
    sums = md5s(MINI / "cifar-10-batches-py", CIFAR10_FILES)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in CIFAR10_FILES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    return buffer.getvalue()


@pytest.fixture
def online(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(archive))


@pytest.mark.usefixtures("online")
def test_downloaded_archive_is_extracted_and_dropped(tmp_path: Path) -> None:
    assert len(read_cifar10(tmp_path / "data").train_y) == 200
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("of_archive", ["right", "wrong"])
def test_a_damaged_batch_is_extracted_again(archive: bytes, of_archive: str, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive if of_archive == "right" else archive[:1000])
    base = tmp_path / "cifar-10-batches-py"
    shutil.copytree(MINI / base.name, base)
    (base / "data_batch_3").write_bytes((base / "data_batch_3").read_bytes()[:1000])
    if of_archive == "right":
        assert len(read_cifar10(tmp_path).train_y) == 200
    else:
        with pytest.raises(DatasetCorrupt, match=r"data_batch_3 has MD5.*tar\.gz has MD5"):
            read_cifar10(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.usefixtures("online")
def test_an_extraction_that_stops_in_the_middle_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_tar: tarfile.TarFile, path: str, **_options: object) -> None:
        (Path(path) / "cifar-10-batches-py").mkdir()
        (Path(path) / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", stop)
        with pytest.raises(OSError, match="no space"):
            read_cifar10(tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(read_cifar10(tmp_path).train_y) == 200


@pytest.mark.usefixtures("online")
def test_a_worker_that_reads_while_another_extracts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract, read = tarfile.TarFile.extractall, []

    def slowly(tar: tarfile.TarFile, path: str, **options: Any) -> None:
        monkeypatch.setattr(tarfile.TarFile, "extractall", extract)
        (Path(path) / "cifar-10-batches-py").mkdir()
        (Path(path) / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"half of it")
        read.append(read_cifar10(tmp_path))
        extract(tar, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", slowly)
    read.append(read_cifar10(tmp_path))
    assert [len(data.train_y) for data in read] == [200, 200]
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-batches-py"]


def test_a_damaged_file_is_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(b"original").hexdigest()
    path = tmp_path / "file"
    path.write_bytes(b"orig")
    with pytest.raises(DatasetCorrupt, match="delete the file"):
        verified(path, md5)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"original"))
    assert verified(path, md5, ["http://good/"]).read_bytes() == b"original"


def test_threads_of_one_process_download_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = hashlib.md5(b"original").hexdigest()
    inner: list[str] = []

    class Answer(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if not inner:
                inner.append("begun")
                inner.append(verified(tmp_path / "file", md5, ["http://good/"]).read_text())
            return super().read(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(b"original"))
    assert verified(tmp_path / "file", md5, ["http://good/"]).read_bytes() == b"original"
    assert inner == ["begun", "original"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_mnist_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for name, _ in MNIST.resources:
        array = images if "images" in name else np.array([3, 9], np.uint8)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (raw / name).write_bytes(gzip.compress(header + array.tobytes()))
        resources.append((name, checksum(raw / name, "md5")))
    monkeypatch.setattr(MNIST, "resources", resources)
    data = mnist.read_mnist(tmp_path)
    assert torch.equal(data.train_x, torch.from_numpy(images)[:, None])
    assert data.test_y.tolist() == [3, 9]
    assert data.n_classes == 10


def test_truncated_idx_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + np.array([9], ">i4").tobytes() + b"abc"))
    with pytest.raises(DatasetCorrupt, match="idx"):
        mnist.read_idx(path)


def test_svhn_mat_file(tmp_path: Path) -> None:
    x = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    savemat(tmp_path / "train.mat", {"X": x, "y": np.array([[1], [10], [9], [2]], np.uint8)})
    images, labels = svhn.read_mat(tmp_path / "train.mat")
    assert images.shape == (4, 3, 32, 32)
    assert int(images[2, 1, 5, 7]) == x[5, 7, 1, 2]
    assert labels.tolist() == [1, 0, 9, 2]


# --- a lab's own images ---


def write(folder: Path, **changes: Any) -> Path:
    """A good folder: 6 + 3 colour images in 3 classes; `changes` replace arrays, as `train_x=...`."""
    rng = np.random.RandomState(0)
    arrays: dict[str, Any] = {
        "train_x": rng.randint(0, 256, (6, 4, 5, 3)).astype(np.uint8),
        "train_y": np.array([0, 1, 2, 0, 1, 2]),
        "test_x": rng.randint(0, 256, (3, 4, 5, 3)).astype(np.uint8),
        "test_y": np.array([2, 1, 0]),
        **changes,
    }
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", x=arrays[f"{split}_x"], y=arrays[f"{split}_y"])
    return folder


def sums_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npz")}


def test_npz_round_trip(tmp_path: Path) -> None:
    data = read_npz(tmp_path, sums_of(write(tmp_path)))
    assert (data.shape, data.n_classes, len(data.train_y), len(data.test_y)) == ((3, 4, 5), 3, 6, 3)
    x = np.load(tmp_path / "train.npz")["x"]
    assert int(data.train_x[4, 2, 1, 3]) == x[4, 1, 3, 2]
    assert data.train_x.is_contiguous()
    assert data.classes == ("0", "1", "2")


def test_npz_grey_images(tmp_path: Path) -> None:
    grey = np.zeros((6, 4, 5), np.uint8)
    assert read_npz(write(tmp_path, train_x=grey, test_x=grey[:3])).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_x": np.zeros((6, 4, 5, 3), np.float32)}, "x must be uint8"),
        ({"train_x": np.zeros((6, 60), np.uint8)}, "x must be uint8"),
        ({"train_y": np.zeros(6, np.int32)}, "y must be int64"),
        ({"train_y": np.array([[0], [1], [2], [0], [1], [2]])}, "y must be int64"),
        ({"train_y": np.array([0, 1, 2])}, "6 images but 3 labels"),
        ({"train_y": np.array([0, 1, -1, 0, 1, 2])}, "negative"),
        ({"train_y": np.zeros(6, np.int64)}, "at least 2 classes"),
        ({"train_y": np.array([0, 1, 3, 0, 1, 3])}, "without gaps"),
        ({"test_y": np.array([0, 1, 3])}, "label 3 has no training image"),
        ({"test_x": np.zeros((3, 5, 5, 3), np.uint8)}, "training images are"),
        ({"test_x": np.zeros((0, 4, 5, 3), np.uint8), "test_y": np.zeros(0, np.int64)}, "no images"),
        ({"train_x": np.array([{"a": 1}] * 6, dtype=object)}, "plain arrays"),
    ],
)
def test_npz_that_is_wrong_is_refused(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(DatasetCorrupt, match=sentence):
        read_npz(write(tmp_path, **changes))


def test_npz_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissing, match=r"train\.npz"):
        read_npz(tmp_path)
    write(tmp_path)
    whole = (tmp_path / "train.npz").read_bytes()
    np.savez(tmp_path / "train.npz", images=np.zeros(3))
    with pytest.raises(DatasetCorrupt, match="needs x"):
        read_npz(tmp_path)
    middle = len(whole) // 4
    flipped = whole[:middle] + bytes(b ^ 255 for b in whole[middle : middle + 9]) + whole[middle + 9 :]
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], flipped, single.getvalue(), pickle.dumps({"x": 1})):
        (tmp_path / "train.npz").write_bytes(content)
        with pytest.raises(DatasetCorrupt, match="plain arrays"):
            read_npz(tmp_path)


def test_npz_other_bytes_than_registered(tmp_path: Path) -> None:
    sums = sums_of(write(tmp_path))
    write(tmp_path, test_y=np.array([2, 1, 1]))
    with pytest.raises(DatasetCorrupt, match=r"test\.npz is not the file that was registered"):
        read_npz(tmp_path, sums)


# --- in memory ---


def test_samples_nest_and_are_one_fixed_permutation() -> None:
    whole = sample_indices(10_000, 10_000)
    assert sorted(whole.tolist()) == list(range(10_000))
    assert sample_indices(10_000, 300).tolist() == whole[:300].tolist()
    assert whole.tolist() == np.random.RandomState(20251014).permutation(10_000).tolist()
    for n in (0, 501):
        with pytest.raises(WrongShape, match="ask for 1 to 500"):
            sample_indices(500, n)


def test_to_unit() -> None:
    x = to_unit(torch.arange(256, dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.arange(256).float() / 255)
    assert x[-1] == 1


def test_image_data_refuses_what_does_not_fit() -> None:
    x, y = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    assert ImageData("a", x, y, x, y, ("0", "1")).to("cpu").shape == (1, 2, 2)
    for bad in [
        (x.float(), y, x, y),
        (x, y.int(), x, y),
        (x, y[:3], x, y),
        (x, y + 1, x, y),
        (x, y, x[:0], y[:0]),
        (x, y, x[..., :1], y),
    ]:
        with pytest.raises(DatasetCorrupt):
            ImageData("a", *bad, ("0", "1"))

"""Bytes by digest, on a folder and on a file system that is not one."""

import errno
import hashlib
import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
from privileges import needs_root

from service.errors import ArtifactMissing, ArtifactRootFull, ArtifactRootUnusable, UnfitArtifactRoot
from service.lab import artifacts
from service.lab.artifacts import Artifacts

BYTES = b"flat minima" * 1000
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_root"))
    return str(tmp_path / "artifacts") if request.param == "folder" else f"memory://{uuid4().hex}"


def test_what_is_written_is_found_by_its_digest(root: str) -> None:
    store = Artifacts(root)
    ref = store.write_chunks("checkpoint", [BYTES[:100], BYTES[100:]])
    assert (ref.digest, ref.size_bytes, ref.kind) == (DIGEST, len(BYTES), "checkpoint")
    with Artifacts(root).local(DIGEST) as path:
        assert path.read_bytes() == BYTES
    with Artifacts(root).open(DIGEST) as file:
        assert file.read() == BYTES


def test_what_another_process_writes_and_deletes_is_seen(root: str) -> None:
    ours, theirs = Artifacts(root), Artifacts(root)
    assert list(ours.stored()) == []
    assert not ours.exists(DIGEST)
    theirs.write_chunks("checkpoint", [BYTES])
    assert ours.exists(DIGEST)
    assert ours.size(DIGEST) == len(BYTES)
    [stored] = ours.stored()
    assert (stored.digest, stored.size_bytes) == (DIGEST, len(BYTES))
    assert not ours.discard(DIGEST, stored.modified_at)
    assert theirs.discard(DIGEST, stored.modified_at + 1)
    assert not ours.exists(DIGEST)
    assert list(ours.stored()) == []


@pytest.mark.parametrize(
    ("root", "sentence"),
    [
        ("nowhere://lab/x", "Protocol not known: nowhere"),
        ("gs://lab/x", "gcsfs"),
        ("https://lab.example/x", "cannot be written"),
    ],
)
def test_another_scheme_is_one_sentence(root: str, sentence: str) -> None:
    with pytest.raises(UnfitArtifactRoot, match=sentence) as refused:
        Artifacts(root)
    assert "\n" not in str(refused.value)


def test_s3_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UnfitArtifactRoot, match="uncanny-bench with its extra `s3`"):
        Artifacts("s3://lab/artifacts")


def test_opening_never_writes(tmp_path: Path) -> None:
    store = Artifacts(str(tmp_path / "artifacts"))
    assert not store.exists(DIGEST)
    store.delete(DIGEST)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(root: str) -> None:
    store = Artifacts(root)
    with pytest.raises(ArtifactMissing, match="is not under"), store.local(DIGEST):
        pass
    with pytest.raises(ArtifactMissing, match="is not under"), store.open(DIGEST):
        pass
    with pytest.raises(ArtifactMissing, match="is not under"):
        store.size(DIGEST)
    assert not store.exists(DIGEST)
    store.delete(DIGEST)
    assert not store.discard(DIGEST, 0.0)
    assert list(store.stored()) == []


@pytest.mark.parametrize("wrong", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "\n", DIGEST[:-1]])
def test_only_digests_are_looked_for(root: str, wrong: str) -> None:
    with pytest.raises(ArtifactMissing, match="not a SHA-256 digest"):
        Artifacts(root).exists(wrong)


def test_damage_is_noticed(root: str) -> None:
    store = Artifacts(root)
    store.write_chunks("checkpoint", [BYTES])
    with store._fs.open(store._path(DIGEST), "wb") as file:
        file.write(b"other")
    with pytest.raises(ArtifactMissing, match="damaged"), store.local(DIGEST):
        pass


def test_deleting_twice_is_deleting_once(root: str) -> None:
    store = Artifacts(root)
    store.write_chunks("checkpoint", [BYTES])
    store.delete(DIGEST)
    store.delete(DIGEST)
    assert not store.exists(DIGEST)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(BYTES[:10])
        raise OSError("no space left on device")

    store = Artifacts(str(tmp_path / "artifacts"))
    with pytest.raises(OSError, match="no space left"):
        store.write("checkpoint", half)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def read(store: Artifacts) -> None:
    with store.open(DIGEST) as file:
        file.read()


def fetch(store: Artifacts) -> None:
    with store.local(DIGEST):
        pass


OPERATIONS: dict[str, Callable[[Artifacts], object]] = {
    "open": read, "local": fetch, "size": lambda store: store.size(DIGEST),
    "exists": lambda store: store.exists(DIGEST), "delete": lambda store: store.delete(DIGEST),
    "stored": lambda store: list(store.stored()), "discard": lambda store: store.discard(DIGEST, 1e12),
    "write": lambda store: store.write_chunks("checkpoint", [BYTES]),
}  # fmt: skip


class TestUnusable:
    """A root that takes or gives no bytes is told from bytes that are not there, by the system's own error."""

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_no_room(self, tmp_path: Path, number: int) -> None:
        def full(path: Path) -> None:
            raise OSError(number, "whatever it says")

        with pytest.raises(ArtifactRootFull, match="there is no room under the artifact root"):
            Artifacts(str(tmp_path / "artifacts")).write("checkpoint", full)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_library_that_does_not_say_why_is_not_asked(self, tmp_path: Path) -> None:
        """Files may not grow beyond a limit, as on a full disk: torch and safetensors say what they like."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def half(path: Path) -> None:
            with path.open("wb") as file, suppress(OSError):
                while True:
                    file.write(BYTES)
            raise RuntimeError("unexpected pos 64 vs 0")

        resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, before[1]))
        try:
            with pytest.raises(ArtifactRootFull, match="File too large"):
                Artifacts(str(tmp_path / "artifacts")).write("checkpoint", half)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(RuntimeError, match="unexpected pos"):
            Artifacts(str(tmp_path / "artifacts")).write("checkpoint", self._breaks)

    @staticmethod
    def _breaks(_: Path) -> None:
        raise RuntimeError("unexpected pos: No space left on device, says the text")

    def test_a_root_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactRootUnusable, match="nothing can be written") as caught:
            Artifacts(str(tmp_path / "file" / "root")).write_chunks("checkpoint", [BYTES])
        assert caught.value.writing

    def test_bytes_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = Artifacts(str(tmp_path / "artifacts"))
        store.write_chunks("checkpoint", [BYTES])

        def broken(_: Path) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(artifacts, "_sha256", broken)
        with pytest.raises(ArtifactRootUnusable, match="nothing can be read") as caught, store.local(DIGEST):
            pass
        assert not caught.value.writing

    def test_an_object_store_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        store = Artifacts(f"memory://{uuid4().hex}")

        def away(*_: object, **__: object) -> None:
            raise RuntimeError("EndpointConnectionError")

        monkeypatch.setattr(store._fs, "open", away)
        with pytest.raises(ArtifactRootUnusable, match="EndpointConnectionError"):
            store.write_chunks("checkpoint", [BYTES])

    @pytest.mark.parametrize("what", OPERATIONS)
    def test_whatever_is_asked_of_a_folder_that_cannot_be_entered(self, tmp_path: Path, what: str) -> None:
        """Its own links lead to each other, which also an administrator cannot follow."""
        store = Artifacts(str(tmp_path / "artifacts"))
        store.write_chunks("checkpoint", [BYTES])
        shutil.rmtree(tmp_path / "artifacts")
        (tmp_path / "artifacts").symlink_to(tmp_path / "artifacts")
        with pytest.raises(ArtifactRootUnusable, match=f"under the artifact root {tmp_path}/artifacts .*mount it"):
            OPERATIONS[what](store)

    @needs_root
    @pytest.mark.parametrize("what", OPERATIONS)
    def test_whatever_is_asked_of_a_folder_of_another_account(self, tmp_path: Path, what: str) -> None:
        store = Artifacts(str(tmp_path / "artifacts"))
        store.write_chunks("checkpoint", [BYTES])
        tmp_path.chmod(0o700)
        os.seteuid(65534)
        try:
            with pytest.raises(ArtifactRootUnusable, match="Permission denied"):
                OPERATIONS[what](store)
        finally:
            os.seteuid(0)

    @pytest.mark.slow
    @pytest.mark.parametrize("what", OPERATIONS)
    @pytest.mark.parametrize("trouble", ["nothing listens", "not allowed"])
    def test_whatever_is_asked_of_a_bucket(
        self, s3_root: str, what: str, trouble: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The errors of boto and its libraries are not ours."""
        if trouble == "nothing listens":
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        else:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            monkeypatch.setenv("HOME", "/nonexistent")
        with pytest.raises(ArtifactRootUnusable, match=f"under the artifact root {s3_root} "):
            OPERATIONS[what](Artifacts(s3_root))

    @pytest.mark.parametrize("state", ["is not there", "is empty"])
    def test_all_of_it_missing(self, tmp_path: Path, state: str) -> None:
        store = Artifacts(str(tmp_path / "artifacts"))
        if state == "is empty":
            (tmp_path / "artifacts").mkdir()
        with pytest.raises(ArtifactRootUnusable, match=f"{state}: mount its disk"):
            store.require_root()
        store.write_chunks("checkpoint", [BYTES])
        store.require_root()


class TestMark:
    """A folder that only has the name of the root, as where its disk is not mounted, is not written to."""

    def test_a_root_keeps_its_mark(self, root: str) -> None:
        marks = [Artifacts(root).mark() for _ in range(3)]
        assert len(set(marks)) == 1
        assert bool(marks[0]) == root.startswith("/"), "an object store is the same from everywhere"
        assert Artifacts(root, marks[0]).write_chunks("checkpoint", [BYTES]).digest == DIGEST
        assert [stored.digest for stored in Artifacts(root).stored()] == [DIGEST]

    def test_many_that_ask_at_once_get_the_same(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            marks = set(pool.map(lambda _: Artifacts(str(tmp_path / "artifacts")).mark(), range(32)))
        assert len(marks) == 1

    @pytest.mark.parametrize("other", ["absent", "empty", "of another lab"])
    def test_another_folder_is_neither_written_to_nor_taken_for_the_root(self, tmp_path: Path, other: str) -> None:
        mark = Artifacts(str(tmp_path / "artifacts")).mark()
        away = tmp_path / "away"
        if other != "absent":
            away.mkdir()
        if other == "of another lab":
            Artifacts(str(away)).mark()
            Artifacts(str(away)).write_chunks("arrays", [b"theirs"])
        before = sorted(tmp_path.rglob("*"))
        worker = Artifacts(str(away), mark)
        with pytest.raises(
            ArtifactRootUnusable, match=r"is not the artifact root of this database \(.*\): mount its disk"
        ):
            worker.write_chunks("checkpoint", [BYTES])
        with pytest.raises(ArtifactRootUnusable, match="mount its disk"):
            worker.require_root()
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_root_that_was_emptied_by_hand_is_still_the_root(self, tmp_path: Path) -> None:
        """Then it is the bytes that are missing, and a retry makes them again."""
        store = Artifacts(str(tmp_path / "artifacts"))
        worker = Artifacts(store.root, store.mark())
        shutil.rmtree(Path(store._path(store.write_chunks("checkpoint", [BYTES]).digest)).parent)
        worker.require_root()

    def test_one_that_takes_no_bytes_gets_none(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactRootUnusable, match="nothing can be read"):
            Artifacts(str(tmp_path / "file" / "root")).mark()


def test_several_may_write_the_same_bytes_at_once(tmp_path: Path) -> None:
    store = Artifacts(str(tmp_path / "artifacts"))
    barrier = threading.Barrier(8)

    def chunks() -> Iterator[bytes]:
        yield BYTES[:100]
        barrier.wait()
        yield BYTES[100:]

    threads = [threading.Thread(target=store.write_chunks, args=("checkpoint", chunks())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [DIGEST]


def test_others_may_read_what_was_written_where_they_may_read_the_root(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    store = Artifacts(str(tmp_path / "artifacts"))
    store.write_chunks("checkpoint", [BYTES])
    umask = os.umask(0)
    os.umask(umask)
    with store.local(DIGEST) as path:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask

"""Bytes by SHA-256 under the artifact root: a folder, or any fsspec URL. Written by workers, read by everyone."""

import errno
import hashlib
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import fsspec

from service.errors import ArtifactMissing, ArtifactRootFull, ArtifactRootUnusable, InvalidSpec, UnfitArtifactRoot
from service.model.executor import ArtifactRef
from service.model.json import JsonMapping
from service.model.names import DIGEST

CHUNK_BYTES = 1 << 20
FULL_BYTES = 64 << 10  # a disk with less free space counts as full
MARK = ".root"  # the file with the mark of a folder
MOUNT = (
    "mount its disk or put it back; if you have moved or restored it, accept it with `uncanny artifacts adopt`; "
    "what waits for it goes on by itself"
)
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

READ_ONLY = ("http", "https", "github", "git", "data", "zip", "tar")
MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")  # what file systems call it


@dataclass(frozen=True)
class Stored:
    """Bytes under the root, and when they were last published (seconds since 1970, by the clock of their server)."""

    digest: str
    size_bytes: int
    modified_at: float


class Artifacts:
    """The artifact root. Opening it never writes; a digest either names all of its bytes or nothing.

    With a `mark`, or a function that returns it, a folder is used only while it has that mark. A folder without it is
    another one, such as the mount point of an unmounted disk: nobody would find the bytes that are written there.
    """

    def __init__(self, root: str, mark: str | Callable[[], str] = "") -> None:
        self.root = root
        self._mark = mark
        self._fs, self._base = _file_system(root)
        self._local = isinstance(self._fs, fsspec.implementations.local.LocalFileSystem)

    @property
    def is_folder(self) -> bool:
        """Whether another folder could be at the same path; an object store is the same from everywhere."""
        return self._local

    def _path(self, digest: str) -> str:
        if not DIGEST.fullmatch(digest):
            raise ArtifactMissing(f"{digest!r} is not a SHA-256 digest")
        return f"{self._base}/{digest[:2]}/{digest}"

    def write(self, kind: str, fill: Callable[[Path], object]) -> ArtifactRef:
        """Let `fill(path)` write a new file, and publish it under its digest by an atomic rename.

        Raises `ArtifactRootFull` if the disk is full, and `ArtifactRootUnusable` if the root takes no bytes for another
        reason; then nothing is left there. Other errors of `fill` are raised as they are.
        """
        with self._new_file() as path:
            with self._filling(path):
                fill(path)
            with self._writing():
                digest, size = self._publish(path)
        return ArtifactRef(digest, size, kind)

    @contextmanager
    def receiving(self, digest: str) -> Iterator[BinaryIO]:
        """A file to write these bytes to, piece by piece; at the end of the context they are published.

        Raises `InvalidSpec` for other bytes, and the errors of `write`; then nothing is left there.
        """
        with self._new_file() as path:
            with self._filling(path), path.open("wb") as file:
                yield file
            with self._writing():
                self._publish(path, digest)

    @contextmanager
    def _new_file(self) -> Iterator[Path]:
        self.require_mark()
        with self._writing():
            scratch = tempfile.TemporaryDirectory(prefix=".writing-", dir=self._scratch(), ignore_cleanup_errors=True)
        with scratch as folder:
            yield Path(folder) / "bytes"

    @contextmanager
    def _filling(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if refusal := self._refusal(path.parent, error):
                raise self._unwritable(refusal) from error
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (InvalidSpec, ArtifactRootUnusable):
            raise
        except Exception as error:  # an object store has errors of its own
            if self._local and not isinstance(error, OSError):
                raise
            raise self._unwritable(error) from error

    def _refusal(self, folder: Path, error: Exception) -> OSError | None:
        """Why the disk takes no bytes; None if it does. Not every library that fills a file says so: a probe does."""
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        try:
            with (folder / "probe").open("wb") as file:
                file.write(bytes(FULL_BYTES))
                file.flush()
                os.fsync(file.fileno())
        except OSError as refusal:
            return refusal
        return None

    def _unwritable(self, error: Exception) -> ArtifactRootUnusable:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return ArtifactRootFull(
                f"there is no room under the artifact root {self.root} ({error}): make some, or give it more; "
                "what waits for it goes on by itself"
            )
        return ArtifactRootUnusable(
            f"nothing can be written under the artifact root {self.root} ({error}): mount it, or make it writable; "
            "what waits for it goes on by itself",
            writing=True,
        )

    def write_chunks(self, kind: str, chunks: Iterable[bytes]) -> ArtifactRef:
        def fill(path: Path) -> None:
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)

        return self.write(kind, fill)

    @contextmanager
    def local(self, digest: str) -> Iterator[Path]:
        """A local file with these bytes, for as long as the context lasts.

        Raises `ArtifactMissing` if they are not there or do not have this digest, and `ArtifactRootUnusable` if they
        cannot be read.
        """
        source = self._path(digest)
        self.require_mark()
        absent = f"artifact {digest} is not under {self.root}; was it deleted, or is this another root?"
        with tempfile.TemporaryDirectory(prefix="uncanny-") as folder:
            path = Path(source) if self._local else Path(folder) / "bytes"
            try:
                with self._reading():
                    if not self._local:
                        self._fs.get_file(source, str(path))
                    actual = _sha256(path)[0]
            except FileNotFoundError as error:  # deleted since
                raise ArtifactMissing(absent) from error
            if actual != digest:
                raise ArtifactMissing(f"artifact {digest} is damaged under {self.root}: its bytes have another SHA-256")
            yield path

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (ArtifactMissing, ArtifactRootUnusable, FileNotFoundError):
            raise
        except Exception as error:
            if self._local and not isinstance(error, OSError):
                raise
            raise ArtifactRootUnusable(
                f"nothing can be read under the artifact root {self.root} ({error}): mount it, or make it readable; "
                "what waits for it goes on by itself"
            ) from error

    def mark(self) -> str:
        """The mark of this folder, which gets one at the first call; empty for an object store.

        Raises `ArtifactRootUnusable`.
        """
        if not self._local:
            return ""
        path = Path(self._base) / MARK
        with self._reading(), suppress(FileNotFoundError):
            return path.read_text(encoding="utf-8")
        with self._writing(), tempfile.TemporaryDirectory(prefix=".writing-", dir=self._scratch()) as folder:
            part = Path(folder) / "mark"
            part.write_text(uuid4().hex, encoding="utf-8")
            part.chmod(stat.S_IMODE(os.stat(self._base).st_mode) & 0o666)
            with suppress(FileExistsError):
                os.link(part, path)
            return path.read_text(encoding="utf-8")

    def require_mark(self) -> None:
        """Raises `ArtifactRootUnusable` if this is another folder than the one with the mark."""
        if not self._local or not (mark := self._mark if isinstance(self._mark, str) else self._mark()):
            return
        state = "has another mark"
        try:
            with self._reading():
                if (Path(self._base) / MARK).read_text(encoding="utf-8") == mark:
                    return
        except FileNotFoundError:
            state = f"has no {MARK}" if os.path.isdir(self._base) else "is not there"
        raise ArtifactRootUnusable(f"{self.root} is not the artifact root of this database ({state}): {MOUNT}")

    def require_root(self) -> None:
        """For callers that miss stored bytes: raises `ArtifactRootUnusable` if the whole root is missing."""
        self.require_mark()
        if not self._local or self._mark:
            return
        try:
            with self._reading():
                state = "" if any(len(name) == 2 or name == MARK for name in os.listdir(self._base)) else "is empty"
        except FileNotFoundError:
            state = "is not there"
        if state:
            raise ArtifactRootUnusable(f"the artifact root {self.root} {state}: {MOUNT}")

    def require_folder(self) -> None:
        """Raises `ArtifactRootUnusable` if there is no such folder."""
        if self._local and not os.path.isdir(self._base):
            raise ArtifactRootUnusable(f"there is no folder {self.root}: mount its disk, or make it")

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        """The bytes as a file that can be read within the context.

        Raises `ArtifactMissing`, and `ArtifactRootUnusable` if they cannot be read, also later on.
        """
        source = self._path(digest)
        with self._present(digest), self._fs.open(source, "rb") as file:
            yield file

    def size(self, digest: str) -> int:
        """How many bytes there are. Raises `ArtifactMissing`, `ArtifactRootUnusable`."""
        source = self._path(digest)
        with self._present(digest):
            return int(self._fs.info(source)["size"])

    @contextmanager
    def _present(self, digest: str) -> Iterator[None]:
        """A context for reading bytes that must be there: translates errors."""
        self.require_mark()
        try:
            with self._reading():
                yield
        except FileNotFoundError as error:
            raise ArtifactMissing(f"artifact {digest} is not under {self.root}") from error

    def exists(self, digest: str) -> bool:
        """Whether these bytes are there. Raises `ArtifactRootUnusable` if nobody can tell."""
        self.require_mark()
        source = self._path(digest)
        try:
            with self._reading():
                self._fs.info(source)
        except FileNotFoundError:
            return False
        return True

    def delete(self, digest: str) -> None:
        """Delete these bytes, if they are there. Raises `ArtifactRootUnusable`."""
        source = self._path(digest)
        if self.exists(digest):
            with self._writing(), suppress(FileNotFoundError):  # another one was faster
                self._fs.rm_file(source)

    def stored(self) -> Iterator["Stored"]:
        """All stored bytes, referred to or not, but for those whose age the file system does not tell.

        Raises `ArtifactRootUnusable` if nobody can tell.
        """
        if self._local:
            try:
                with self._reading():
                    folders = [name for name in os.listdir(self._base) if len(name) == 2]
            except FileNotFoundError:
                return
            for folder in folders:
                yield from self._stored_in(Path(self._base) / folder)
            return
        with self._reading():
            listed = self._fs.find(self._base, detail=True)
        for path, info in listed.items():
            digest, at = path.rpartition("/")[2], _modified(info)
            if DIGEST.fullmatch(digest) and at is not None:
                yield Stored(digest, int(info["size"]), at)

    def _stored_in(self, folder: Path) -> Iterator["Stored"]:
        with suppress(FileNotFoundError), self._reading():
            for file in folder.iterdir():
                with suppress(FileNotFoundError):  # deleted since it was listed
                    if DIGEST.fullmatch(file.name):
                        yield Stored(file.name, (status := file.lstat()).st_size, status.st_mtime)

    def discard(self, digest: str, older_than: float) -> bool:
        """Delete these bytes unless they were published, or published again, at or after that time; true if deleted.

        In a folder they are renamed first and then looked at, so none that were just published get lost. An object
        store has no such rename: their age is checked again right before. Raises `ArtifactRootUnusable`.
        """
        with self._writing():
            return self._discarded(self._path(digest), older_than)

    def _discarded(self, path: str, older_than: float) -> bool:
        if not self._local:
            self._fs.invalidate_cache(path)
            try:
                at = _modified(self._fs.info(path))
                if at is None or at >= older_than:
                    return False
                self._fs.rm_file(path)
            except FileNotFoundError:  # another collector was faster
                return False
            return True
        trash = f"{os.path.dirname(path)}/.trash-{uuid4().hex}"
        with suppress(FileNotFoundError):  # another collector was faster
            os.rename(path, trash)
            if young := os.stat(trash).st_mtime >= older_than:
                with suppress(FileExistsError):  # the same bytes were published again in the meantime
                    os.link(trash, path)
            os.unlink(trash)
            return not young
        return False

    def leftovers(self, older_than: float) -> list[Path]:
        """Files and folders that interrupted writes have left and nobody has changed since that time."""
        if not self._local or not os.path.isdir(self._base):
            return []
        base = Path(self._base)
        folders = [*base.glob(".writing-*"), *base.glob("??/.trash-*")]
        return [path for path in folders if _newest(path) < older_than]

    def _scratch(self) -> str | None:
        """Scratch space on the root's own file system, so that publishing is a rename."""
        if not self._local:
            return None
        os.makedirs(self._base, mode=0o700, exist_ok=True)
        return str(self._base)

    def _publish(self, path: Path, promised: str | None = None) -> tuple[str, int]:
        """The SHA-256 and the size of a file, now under the root. Raises `InvalidSpec` for another than promised."""
        digest, size = _sha256(path)
        if promised not in (None, digest):
            raise InvalidSpec([("", f"these bytes have the SHA-256 {digest}, not {promised}")])
        target = self._path(digest)
        if self._local:
            mode = stat.S_IMODE(os.stat(self._base).st_mode)  # folders in the root have the permissions of the root
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(target))
                os.chmod(os.path.dirname(target), mode)
            with path.open("rb") as file:
                os.fchmod(file.fileno(), mode & 0o666)
                os.fsync(file.fileno())
            os.replace(path, target)
        else:  # also if the bytes are there: published again, they are new for garbage collection
            self._fs.put_file(str(path), target)
        return digest, size


def _file_system(root: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of the root, and the root on it. Raises `UnfitArtifactRoot`.

    It remembers no listings: others write and delete there too.
    """
    scheme = root.partition("://")[0]
    if scheme in READ_ONLY:
        raise UnfitArtifactRoot(f"the artifact root {root} cannot be written: take a folder or s3://BUCKET/PATH")
    try:
        opened: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(root, use_listings_cache=False)
    except ImportError as error:
        extra = "uncanny-bench with its extra `s3`" if scheme in ("s3", "s3a") else f"what it needs ({error})"
        raise UnfitArtifactRoot(f"the artifact root {root} needs more than is installed: install {extra}") from None
    except ValueError as error:
        raise UnfitArtifactRoot(
            f"the artifact root {root} cannot be used ({error}): take a folder or s3://BUCKET/PATH"
        ) from None
    return opened


def _modified(info: JsonMapping) -> float | None:
    """When a file system says that a file was last written, in seconds since 1970; None if it does not say."""
    at = next((info[name] for name in MODIFIED if info.get(name) is not None), None)
    return at.timestamp() if isinstance(at, datetime) else None if at is None else float(at)


def _sha256(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size


def _newest(path: Path) -> float:
    """When the path or anything below it was last changed; infinity if it disappears meanwhile."""
    try:
        return max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    except FileNotFoundError:
        return math.inf

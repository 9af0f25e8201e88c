"""What only the account that runs the service may read: its home with database, artifacts, logs, tokens and sockets.

Who can read the database can read every number and the hashes of tokens; who reaches Ray's sockets can run code.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.settings import Settings

SESSIONS = "ray/s"  # under the home, of a local Ray head: its folder, and the closed one around it
FOLDER, FILE = 0o700, 0o600
OTHERS = 0o077  # the bits of all but the owner


def be_private() -> None:
    """From now on, files of this process and its children are for its account alone, unless they say otherwise."""
    os.umask(OTHERS)


def folder(path: Path) -> Path:
    """The folder. If it does not exist, it is made, for this account alone."""
    path.mkdir(mode=FOLDER, parents=True, exist_ok=True)
    return path


def opened(path: Path, mode: str) -> IO[Any]:  # Any: text or bytes, as `mode` says
    """The file, open. If it does not exist, it is made, for this account alone."""
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, encoding=encoding, opener=lambda name, flags: os.open(name, flags, FILE))


def tighten(settings: "Settings") -> str | None:
    """Close a home that is open to other accounts, as earlier versions made it; returns a sentence if it was open.

    A home that is not this account's, the account's own home folder, and folders that all may write to, such as /tmp,
    stay as they are, without what is ours in them.
    """
    closed = [path for path in _of_the_service(settings) if _close(path)]
    if not closed:
        return None
    more = f" and {len(closed) - 1} more" if len(closed) > 1 else ""
    return f"other accounts of this machine could read {closed[0]}{more}: from now on only this one can"


def _of_the_service(settings: "Settings") -> Iterator[Path]:
    """Each path to close. The contents of a folder are among them only if the folder itself is open."""
    home = settings.home
    if _is_ours_alone_to_close(home):
        yield home
    database = settings.home / "uncanny.db"
    yield from (database.with_name(database.name + part) for part in ("", "-wal", "-shm", "-journal"))
    yield from (home / name for name in ("serve.lock", "serve.json", "ray_token"))
    for inside in (home / "artifacts", settings.logs, settings.spool):
        if _is_open(inside):
            yield inside
            yield from inside.rglob("*")


def _is_ours_alone_to_close(home: Path) -> bool:
    with suppress(OSError):
        return not home.stat().st_mode & stat.S_ISVTX and home.resolve() not in (Path.home().resolve(), Path("/"))
    return False


def _is_open(path: Path) -> bool:
    """Whether the path belongs to this account, is no link, and is open to other accounts."""
    with suppress(OSError):
        status = path.lstat()
        mine = status.st_uid == os.getuid() and not stat.S_ISLNK(status.st_mode)
        return mine and bool(status.st_mode & OTHERS)
    return False


def _close(path: Path) -> bool:
    """Close the path to other accounts; false if it was closed, or disappears meanwhile."""
    if not _is_open(path):
        return False
    with suppress(OSError):
        path.chmod(stat.S_IMODE(path.lstat().st_mode) & ~OTHERS)
        return True
    return False

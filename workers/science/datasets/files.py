"""The files of the public data sets: with the right checksum, downloaded, or an error that says what to do."""

import hashlib
import http.client
import shutil
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from workers.science.errors import DatasetCorrupt, DatasetMissing

TIMEOUT_SECONDS = 10.0


def verified(path: Path, md5: str, urls: Sequence[str] = (), *, into: Path | None = None) -> Path:
    """`path`, if its MD5 is `md5`; else the file is downloaded from the first of `urls` that answers.

    A download replaces `path`, or goes to the folder `into`, if that is given. Returns the path of the right file.
    Raises `DatasetMissing` and `DatasetCorrupt`, which name the file.
    """
    actual = checksum(path, "md5") if path.is_file() else None
    if actual == md5:
        return path
    target = path if into is None else into / path.name
    reasons = _download(target, md5, urls)
    if reasons is None:
        return target
    if actual is not None:
        raise DatasetCorrupt(
            f"{path} has MD5 {actual}, the original has {md5}: delete the file and put the original there"
        )
    raise DatasetMissing(
        f"{path.name} is not in {path.parent} and could not be downloaded ({reasons}): put the file there"
    )


def checksum(path: Path, algorithm: str) -> str:
    """The hex digest of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _download(path: Path, md5: str, urls: Sequence[str]) -> str | None:
    """Why the download failed; None if it did not. A temporary name and a rename leave a whole file or none."""
    tried = []
    for url in urls:
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")  # other threads and machines may do the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, part.open("wb") as file:
                shutil.copyfileobj(answer, file)
            if checksum(part, "md5") != md5:
                raise OSError("the download has another checksum")
            part.replace(path)
        except (OSError, http.client.HTTPException) as error:
            tried.append(f"{url}: {error}")
        else:
            return None
        finally:
            part.unlink(missing_ok=True)
    return "; ".join(tried) or "nowhere to download it from"

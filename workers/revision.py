"""Which code this is, without importing torch: its version, its git revision, and a digest of its sources."""

import hashlib
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "uncanny-bench"
NUMERIC = ("torch", "torchvision", "timm", "numpy")  # libraries whose version shows in the digits of numbers


@cache
def code() -> dict[str, Any]:
    """`code_version`; `code_revision` and `code_dirty` in a git checkout, else null; `code_digest`."""
    revision = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", __file__) else None
    return {
        "code_version": installed(DISTRIBUTION),
        "code_revision": revision,
        "code_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if revision else None,
        "code_digest": code_digest(),
    }


def code_digest() -> str:
    """SHA-256 of the sources of `service` and `workers`: equal on two machines where they compute the same."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("service/**/*.py"), *ROOT.glob("workers/**/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity() -> dict[str, str | None]:
    """What must be equal on two machines for equal numbers: `code`, the digest, and the version of each library.

    A library's build is left out: the builds for a GPU and for a CPU have one version.
    """
    versions = {name: installed(name) for name in NUMERIC}
    return {"code": code_digest(), **{name: of and of.partition("+")[0] for name, of in versions.items()}}


@cache
def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of git in the source folder; None if git is absent or fails there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

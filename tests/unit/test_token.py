"""The token of a home's local Ray heads: one, whole and its owner's alone, whoever makes it first."""

import os
from pathlib import Path

import pytest

from workers.head import driver_environment


def token_of(home: Path) -> Path:
    return Path(driver_environment(home, local=True)["RAY_AUTH_TOKEN_PATH"])


def test_it_is_its_owners_alone_and_stays(tmp_path: Path) -> None:
    path = token_of(tmp_path / "new")
    first = path.read_text()
    assert (path.stat().st_mode & 0o777, len(first)) == (0o600, 64)
    assert token_of(tmp_path / "new").read_text() == first
    assert token_of(tmp_path / "other").read_text() != first


def test_of_two_that_make_it_at_once_the_first_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head and the dispatcher start at once, and each of them needs the same."""
    real = os.link

    def link(fresh: Path, path: Path) -> None:
        path.write_text("of the other process")
        real(fresh, path)

    monkeypatch.setattr(os, "link", link)
    path = token_of(tmp_path)
    assert path.read_text() == "of the other process"
    assert list(tmp_path.iterdir()) == [path]

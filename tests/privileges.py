"""Tests that need more than an ordinary account may do: their skips begin alike, and the end of a run counts them."""

import os
from typing import NoReturn

import pytest

NEEDS = "needs privileges:"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason=f"{NEEDS} only root can become another account")


def lacking(what: str, why: object) -> NoReturn:
    """Skip a test that cannot do `what`. Root may lack it too, as in a container: the reason says so."""
    root = " (though this is root)" if os.geteuid() == 0 else ""
    pytest.skip(f"{NEEDS} {what}{root}: {why}")

"""How long the chaos lasts: `pytest tests/chaos --minutes 10 --chaos-seed 7`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=3.0, help="how long faults are made")
    parser.addoption("--chaos-seed", type=int, default=0, help="which faults, and when")

"""How long the chaos lasts: `pytest -s -m slow tests/chaos --minutes 10 --faults 1000 --chaos-seed 7`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=3.0, help="how long faults are made")
    parser.addoption("--faults", type=int, help="how many at least, on each store; 20 a minute where nothing is said")
    parser.addoption("--chaos-seed", type=int, default=0, help="which faults, and when")

"""The stores and the executor of the dispatcher's tests."""

from typing import Any

import pytest
from dispatching import CLOCK, Scripted, dispatcher

from service.queue.dispatcher import Dispatcher
from service.store import Database


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, kept: Any) -> str:
    """What differs between the two is the store's, and its contract runs on both by default."""
    url: str = kept.emptied(request.param).url
    return url


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Database.now
    monkeypatch.setattr(CLOCK, "ahead", 0.0)
    monkeypatch.setattr(Database, "now", lambda database, connection: real(database, connection) + CLOCK.ahead)


@pytest.fixture
def scripted(lab: Any) -> Scripted:
    return Scripted()


@pytest.fixture
def one(lab: Any, scripted: Scripted) -> Dispatcher:
    """A dispatcher that has handed the training of a new job to `scripted`."""
    lab.submit()
    one = dispatcher(lab, scripted)
    one.tick()
    return one

"""Handles of submitted jobs and sweeps: their state, waiting for the end, their results."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from api.client.questions import Rows
from api.client.transport import Json, OnProgress
from service.model.jobs import STOPPED_JOB

if TYPE_CHECKING:
    from api.client.client import Client

ENDED: frozenset[str] = STOPPED_JOB
LONG_POLL_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    client: "Client"
    id: str
    accepted: Json

    def status(self) -> Json:
        return self.client.job(self.id)

    def wait(self, progress: OnProgress | bool | None = None) -> Json:
        """Wait for its end, and return the job. `progress` is called with each state of the job.

        True shows a bar, False none. By default a terminal or a notebook shows one.
        """
        return _wait(lambda seconds: self.client.job(self.id, wait_seconds=seconds), progress, f"job {self.id}")

    def result(self) -> Json:
        return self.client.result(self.id)


@dataclass(frozen=True)
class Sweep:
    """A submitted sweep. `accepted` is the answer: how many of its tasks were known already, for example."""

    client: "Client"
    id: str
    accepted: Json

    def status(self) -> Json:
        return self.client.get_sweep(self.id)

    def wait(self, progress: OnProgress | bool | None = None) -> Json:
        """Wait for its end, and return the sweep. `progress` is called with each state of the sweep.

        True shows a bar, False none. By default a terminal or a notebook shows one.
        """
        return _wait(lambda seconds: self.client.get_sweep(self.id, wait_seconds=seconds), progress, f"sweep {self.id}")

    def results(self, filter: str | None = None, **more: Any) -> Rows:  # Any: as `Client.results`
        return self.client.results(filter, sweep=self.id, **more)

    def cancel(self) -> Json:
        return self.client.cancel(self.id)

    def extend(self, **grid: Sequence[object]) -> Json:
        return self.client.extend(self.id, grid)


def _wait(look: Callable[[float], Json], progress: OnProgress | bool | None, name: str) -> Json:
    if callable(progress) or progress is False:
        return _follow(look, progress or None)
    from api.client import render  # imports rich, which only a bar needs

    if progress is None and not (render.err.is_terminal or render.err.is_jupyter):
        return _follow(look, None)
    with render.sweep_progress(name) as bar:
        return _follow(look, bar)


def _follow(look: Callable[[float], Json], progress: OnProgress | None) -> Json:
    while True:
        status = look(0 if progress else LONG_POLL_SECONDS)
        if progress is not None:
            progress(status)
        if status["state"] in ENDED:
            return status
        time.sleep(0.3)

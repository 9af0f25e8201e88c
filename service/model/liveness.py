"""A running task is alive if it makes progress, by the clock of this process: that of the worker may be wrong."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.model.executor import Message, Progress, Started

Key = tuple[str, int]
"""`(task id, attempt)`"""


@dataclass
class _Watched:
    advanced_at: float
    fraction: float = 0.0
    saved: bool = False  # it has left an epoch state since `mark`
    reported: bool = False


class Liveness:
    """When each running task last advanced: took up its work, came further than ever before, or left an epoch state."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched: dict[Key, _Watched] = {}

    def hear(self, message: Message) -> None:
        key = (message.task_id, message.attempt)
        match message:
            case Started():
                self._watched[key] = _Watched(self._clock())
            case Progress() if key in self._watched:
                watched = self._watched[key]
                watched.saved = watched.saved or message.resume is not None
                if message.resume is not None or message.fraction > watched.fraction:
                    watched.advanced_at, watched.reported = self._clock(), False
                    watched.fraction = max(watched.fraction, message.fraction)
            case Progress():
                pass  # of a task that has its answer
            case _:
                self._watched.pop(key, None)

    def __contains__(self, key: Key) -> bool:
        """Whether the task has been taken up and has no answer yet."""
        return key in self._watched

    def standing_still(self, seconds: float) -> Iterator[tuple[Key, float]]:
        """The tasks that have not advanced for so long, each with for how long."""
        now = self._clock()
        return (
            (key, now - watched.advanced_at)
            for key, watched in self._watched.items()
            if now - watched.advanced_at >= seconds
        )

    def newly_standing_still(self, seconds: float) -> dict[Key, float]:
        """The same, each task only once until it advances again."""
        newly = {key: still for key, still in self.standing_still(seconds) if not self._watched[key].reported}
        for key in newly:
            self._watched[key].reported = True
        return newly

    def mark(self) -> None:
        """`saved` counts from now on."""
        for watched in self._watched.values():
            watched.saved = False

    @property
    def saved(self) -> list[Key]:
        """The tasks that have left an epoch state since `mark`: stopping them loses the least."""
        return [key for key, watched in self._watched.items() if watched.saved]

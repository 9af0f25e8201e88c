"""Which grants of a bundle have no answer yet: with it, every executor gives exactly one answer per grant."""

from typing import assert_never

from service.model.executor import Bundle, Failed, Fault, Lost, Message, Progress, Reason, Started, Succeeded

Key = tuple[str, int]
"""`(task_id, attempt)`"""


class Ledger:
    """The grants of one bundle without an answer, in order; the running one; whether the bundle is being stopped."""

    def __init__(self, bundle: Bundle) -> None:
        self._open = dict.fromkeys((grant.task_id, grant.attempt) for grant in bundle.grants)
        self._running: Key | None = None
        self._cancelled: Key | None = None
        self.stopping = False

    def accept(self, message: Message) -> bool:
        """Record a message. False if its grant already has an answer or is not of this bundle: then drop it."""
        key = (message.task_id, message.attempt)
        is_open = key in self._open
        match message:
            case Started():
                self._running = key
            case Progress():
                pass
            case Succeeded() | Failed() | Lost():
                self._open.pop(key, None)
                self._running = None if self._running == key else self._running
            case _:
                assert_never(message)
        return is_open

    @property
    def unwanted(self) -> bool:
        """Whether the running grant already has an answer, so that the bundle is to be stopped."""
        return self._running is not None and self._running not in self._open

    @property
    def guilty(self) -> Key | None:
        """The grant to blame if the bundle's worker ends now; None if all are answered or the bundle is being stopped.

        It is the running grant, or the next in line if none was reported: with that one the worker would end again.
        """
        if self.stopping or not self._open:
            return None
        return self._running if self._running in self._open else next(iter(self._open))

    def owes(self, key: Key) -> bool:
        return key in self._open

    def cancel(self, key: Key) -> tuple[bool, list[Lost]]:
        """`(whether to stop the bundle, answers)`. A waiting grant is answered at once and disturbs no other."""
        if key not in self._open:
            return False, []
        if key == self._running:
            self._cancelled = key
            return True, []
        lost = self._lose(key, "cancelled", "cancelled before it started")
        return not self._open, [lost]

    def end(self, reason: Reason, message: str, fault: Fault | None = None) -> list[Lost]:
        """The bundle ended: the cancelled grant, else the guilty one, is lost; the rest is given back."""
        lost = []
        if self._cancelled in self._open:
            lost.append(self._lose(self._cancelled, "cancelled", "cancelled while it ran"))
        elif (guilty := self.guilty) is not None:
            lost.append(self._lose(guilty, reason, message, fault))
        return lost + [self._lose(key, "given_back", message) for key in list(self._open)]

    def _lose(self, key: Key, reason: Reason, message: str, fault: Fault | None = None) -> Lost:
        lost = Lost(*key, reason, message, fault)
        self.accept(lost)
        return lost

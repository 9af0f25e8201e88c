"""Messages of attempts that the database does not have yet: in memory, and on disk while the database is away."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.errors import DatabaseAway
from service.lab.artifacts import Artifacts
from service.model.executor import Failed, Lost, Message, Progress, Succeeded
from service.model.retrying import Patience
from service.queue.spool import Spool
from service.settings import Settings
from service.store import Database, claiming, recording

log = logging.getLogger("uncanny.outbox")

Key = tuple[str, int]
"""`(task id, attempt)`"""


@dataclass
class Outbox:
    """Messages of the dispatcher `actor`. Each is written once, and kept until its transaction has committed."""

    database: Database
    artifacts: Artifacts
    settings: Settings
    actor: str
    messages: list[Message] = field(default_factory=list)
    _spool: Spool = field(init=False)

    def __post_init__(self) -> None:
        self._spool = Spool(self.settings.spool)

    @property
    def keys(self) -> set[Key]:
        return {(message.task_id, message.attempt) for message in self.messages}

    def add(self, messages: Sequence[Message]) -> None:
        self.messages = _newest_progress([*self.messages, *messages])

    def take_over(self) -> None:
        """Add the messages that earlier processes could not write. Messages of superseded attempts change nothing."""
        earlier = [message for message in self._spool.take() if message not in self.messages]
        self.messages = [*earlier, *self.messages]

    def keep(self) -> None:
        """While the database is away: write the messages to disk that must not be lost with this process."""
        self._spool.keep(self.messages)

    def drop(self) -> None:
        """Forget all messages: another dispatcher leads, and gives these attempts to other workers."""
        self.messages.clear()

    def write(self, epoch: int | None) -> bool:
        """Write all in one transaction. False, with nothing written, if the leadership of that `epoch` is over.

        Raises `DatabaseAway`; then all messages are still here.
        """
        try:
            leads = self._record(self.messages, epoch)
        except DatabaseAway:
            raise
        except Exception:  # one message that cannot be stored must not block the others
            log.exception("messages could not be stored together; trying one by one")
            leads = all(self._record_alone(message, epoch) for message in self.messages)
        self.messages.clear()
        if leads:
            self._spool.forget()
        return leads

    def _record(self, messages: Sequence[Message], epoch: int | None) -> bool:
        if not messages:
            return True
        settings = self.settings
        patience = Patience(settings.max_errors, settings.max_suspect_losses, settings.backoff_seconds)
        with self.database.write() as connection:
            if not claiming.still_leads(connection, self.actor, epoch):
                return False
            now = self.database.now(connection)
            superseded = recording.record(connection, now, self.actor, messages, patience)
        for digest in superseded:
            self._delete(digest)
        return True

    def _record_alone(self, message: Message, epoch: int | None) -> bool:
        try:
            return self._record([message], epoch)
        except DatabaseAway:
            raise
        except Exception as error:
            log.exception("%s of task %s could not be stored", type(message).__name__, message.task_id)
            if not isinstance(message, (Succeeded, Failed, Lost)):
                return True
            sentence = str(getattr(error, "orig", None) or error).replace("\0", "")
            why = f"its {type(message).__name__.lower()} could not be stored: {type(error).__name__}: {sentence}"
            return self._record([Failed(message.task_id, message.attempt, "configuration", why)], epoch)

    def _delete(self, digest: str) -> None:
        try:
            self.artifacts.delete(digest)
        except Exception as error:  # noqa: BLE001 - any error of the file system: bytes that stay are only untidy
            log.warning("artifact %s could not be deleted: %s", digest, error)


def _newest_progress(messages: list[Message]) -> list[Message]:
    """The messages without progress reports that a later report of the same attempt outdates."""
    latest = {(m.task_id, m.attempt): i for i, m in enumerate(messages) if isinstance(m, Progress) and m.resume is None}
    return [
        message
        for i, message in enumerate(messages)
        if not isinstance(message, Progress)
        or message.resume is not None
        or latest[message.task_id, message.attempt] == i
    ]

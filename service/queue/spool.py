"""Outcomes on disk that the database could not take yet. A restarted dispatcher writes those of earlier processes too.

Each process has one file and replaces it as a whole, so that a file is never half written. The spool does not decide
whether an outcome still counts: the database compares its attempt number when it is written.
"""

import logging
import os
import pickle
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from service.model.executor import Failed, Lost, Message, Progress, Succeeded

log = logging.getLogger("uncanny.spool")
SUFFIX = ".messages"


class Spool:
    """A folder of messages. Opening it never writes; only its own user can read what it holds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own_file = folder / f"{uuid.uuid4().hex}{SUFFIX}"
        self._kept: list[Message] = []
        self._taken: list[Path] = []

    def keep(self, messages: Sequence[Message]) -> None:
        """Write to disk the messages that must not be lost. An error is logged, not raised."""
        worth = [message for message in messages if _worth_keeping(message)]
        if worth == self._kept or not worth:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            part = self._own_file.with_suffix(".part")
            with os.fdopen(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                pickle.dump(worth, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._own_file)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.error("%d outcomes stay in memory only: %s: make room under %s", len(worth), error, self._folder)
            return
        if not self._kept:
            log.warning("%d outcomes wait in %s for the database", len(worth), self._folder)
        self._kept = worth

    def take(self) -> list[Message]:
        """The messages that earlier processes have left. They stay on disk until `forget`."""
        messages: list[Message] = []
        self._taken = [path for path in sorted(self._folder.glob(f"*{SUFFIX}")) if path != self._own_file]
        for path in self._taken:
            try:
                left: list[Message] = pickle.loads(path.read_bytes())
            except FileNotFoundError:  # its process has written it to the database meanwhile
                continue
            except Exception:  # of another version, or damaged: its tasks are computed again
                log.exception("%s cannot be read and is left aside", path)
                with suppress(OSError):
                    path.replace(path.with_suffix(".unreadable"))
                continue
            log.info("%d outcomes of an earlier run were found in %s", len(left), path)
            messages += left
        return messages

    def forget(self) -> None:
        """Delete all messages from disk: they are in the database now."""
        if not self._kept and not self._taken:
            return
        for path in (self._own_file, *self._taken):
            path.unlink(missing_ok=True)
        self._kept, self._taken = [], []


def _worth_keeping(message: Message) -> bool:
    return isinstance(message, (Succeeded, Failed, Lost)) or (
        isinstance(message, Progress) and message.resume is not None
    )

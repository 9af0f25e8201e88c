"""One HTTP connection: how long its head may take, how long its reader may take nothing, and how many there may be."""

import asyncio
import logging
import resource
from contextlib import suppress
from dataclasses import dataclass, field

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("uncanny.api")

HEAD_SECONDS = 10.0  # for a request's line and headers
READER_SECONDS = 30.0  # in which a reader must take something of what waits for it
MOST_CONNECTIONS = 4096
SPARE_DESCRIPTORS = 256  # for the database, files and libraries


@dataclass(eq=False)
class Crowd:
    """The connections of one server: at most `most`; `idle` are those without a request, the longest idle first."""

    most: int = MOST_CONNECTIONS
    idle: dict["Connection", None] = field(default_factory=dict)


class Connection(H11Protocol):
    """A connection whose client cannot keep it for nothing.

    A client that does not send a whole head in time is dropped, and one that takes nothing of its answer. If there are
    too many connections, the one that has been without a request for longest goes.
    """

    crowd: Crowd
    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # else what the socket does not take gathers before anybody is told
        self._look()
        if len(self.connections) > self.crowd.most:
            log.warning("more than %d connections: the one that was idle for longest is dropped", self.crowd.most)
            next(iter(self.crowd.idle)).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.idle.pop(self, None)
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing here speaks another protocol: such a request is answered as if it had not asked, as HTTP allows."""

    def drop(self) -> None:
        self.crowd.idle.pop(self, None)
        self.transport.abort()

    def _look(self) -> None:
        """Start or stop the clock for a head, whichever this moment asks for."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.crowd.idle.pop(self, None)
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None and not self.transport.is_closing():
            self.crowd.idle[self] = None
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.get_write_buffer_size():  # it still reads the answer before
            self._look()
        else:
            self.drop()

    def _await_reader(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(READER_SECONDS, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        if self.transport.get_write_buffer_size() < before:
            self._await_reader()
        else:
            self.drop()


def connections() -> type[Connection]:
    """The protocol of a new server, with as many connections as this process may have descriptors for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    room = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - SPARE_DESCRIPTORS
    return type("Connection", (Connection,), {"crowd": Crowd(max(16, min(MOST_CONNECTIONS, room)))})

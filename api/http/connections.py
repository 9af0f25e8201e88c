"""One HTTP connection, with limits: seconds for its head, seconds for its client to read, and how many there may be.

A body is parsed as the application reads it, a few pieces at a time. Once the request is answered, the rest is not
parsed.
"""

import asyncio
import logging
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from h11._connection import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("uncanny.api")

HEAD_SECONDS = 10.0  # for a request's line and headers
READER_SECONDS = 30.0  # a client that reads nothing of its answer for so long is dropped
MOST_CONNECTIONS = 4096
SPARE_DESCRIPTORS = 256  # left for the database, files and libraries
FREE_PIECES = 16  # pieces of a body that are parsed before the application reads it: a small body is whole at once
MORE_PIECES = 64  # pieces that are parsed at a time when the application reads the body
TURN_SECONDS = 0.01  # of one turn of the event loop, for parsing bodies
MANY_CHUNKS, LEAST_BYTES = 512, 64  # beyond so many chunks, the average chunk must have at least so many bytes
TINY = f"the chunks of this body have less than {LEAST_BYTES} bytes on average: send larger ones, or a Content-Length"


class Parser(h11.Connection):
    """Parses only as many pieces of a body as it is allowed to: `left`.

    A piece costs the event loop about as much as a small request, however small the piece is.
    """

    left = 0
    starved = False  # it has stopped because nothing was left
    unread = False  # the answer has begun before the whole body was read: then the connection ends with the answer
    _chunks = _bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        self.starved = self.their_state is h11.SEND_BODY and self.left <= 0
        if self.starved:
            return h11.NEED_DATA
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.left, self._chunks, self._bytes = FREE_PIECES, 0, 0
        elif isinstance(event, h11.Data):
            self.left -= 1
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self.is_tiny:
                raise h11.RemoteProtocolError(TINY)
        return event

    @property
    def is_tiny(self) -> bool:
        return self._chunks > MANY_CHUNKS and self._bytes < LEAST_BYTES * self._chunks

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        sent: bytes | None = super().send(event)
        if isinstance(event, h11.Response) and self.their_state is h11.SEND_BODY:
            self.unread = True
            if sent is not None and not any(name == b"connection" for name, _ in event.headers):
                # The header is not given to h11: uvicorn would close at once, and bytes that still arrive would reset
                # the connection before the client has read its answer.
                sent = sent.replace(b"\r\n", b"\r\nconnection: close\r\n", 1)
        return sent


class _Flow(FlowControl):
    """Calls `wanted` when the application reads more of the body."""

    def __init__(self, transport: asyncio.Transport, wanted: Callable[[], None]) -> None:
        super().__init__(transport)
        self._wanted = wanted

    def resume_reading(self) -> None:
        super().resume_reading()
        self._wanted()


@dataclass(eq=False)
class Crowd:
    """The connections of one server: at most `most`. `idle` are those without a request, the longest idle first.

    `parsing` are those with a body to parse: they take turns, so that the event loop has time for everything else.
    """

    most: int = MOST_CONNECTIONS
    idle: dict["Connection", None] = field(default_factory=dict)
    parsing: dict["Connection", None] = field(default_factory=dict)

    def parse(self, connection: "Connection") -> None:
        if not self.parsing:
            connection.loop.call_soon(self._turn, connection.loop)
        self.parsing[connection] = None

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        deadline = time.monotonic() + TURN_SECONDS
        while self.parsing and time.monotonic() < deadline:
            connection = next(iter(self.parsing))
            del self.parsing[connection]
            connection.parse()
        if self.parsing:
            loop.call_soon(self._turn, loop)


class Connection(H11Protocol):
    """A connection that an idle or slow client cannot hold for ever.

    A client that does not send a whole head in time is dropped, and so is one that does not read its answer. If there
    are too many connections, the one that has been idle for longest is dropped.
    """

    crowd: Crowd
    conn: Parser
    _head_timer: asyncio.TimerHandle | None = None
    _reader_timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:  # Any: uvicorn's own arguments, passed on
        super().__init__(*arguments, **options)
        most = self.config.h11_max_incomplete_event_size
        self.conn = Parser(h11.SERVER, DEFAULT_MAX_INCOMPLETE_EVENT_SIZE if most is None else most)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self._request_more)
        transport.set_write_buffer_limits(high=0)  # else bytes pile up here before the application is told to pause
        self._update_head_timer()
        if len(self.connections) > self.crowd.most:
            log.warning("more than %d connections: the one that was idle for longest is dropped", self.crowd.most)
            next(iter(self.crowd.idle)).drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self.crowd.idle.pop(self, None)
        self.crowd.parsing.pop(self, None)
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.unread and self.cycle.response_complete:
            return  # the rest of a body whose request is answered
        super().data_received(data)
        self._update_head_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.starved:
            self.flow.pause_reading()

    def parse(self) -> None:
        """Parse some more of the body. If that is not enough, the application asks again."""
        self.conn.left = MORE_PIECES
        self.handle_events()
        self._update_head_timer()

    def _request_more(self) -> None:
        if self.conn.starved and not (self.cycle.response_complete or self.transport.is_closing()):
            self.crowd.parse(self)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(TINY if self.conn.is_tiny else msg)

    def on_response_complete(self) -> None:
        """After an answer that left a body unread, all that arrives is dropped until the client has read the answer."""
        super().on_response_complete()
        if self.conn.unread and not self.transport.is_closing():
            self.transport.write_eof()
        self._update_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        """A request to upgrade to another protocol is answered as if it had not asked for it, as HTTP allows."""

    def drop(self) -> None:
        self.crowd.idle.pop(self, None)
        self.transport.abort()

    def _update_head_timer(self) -> None:
        """Start the timer for the next head if the connection is idle, else stop it."""
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
        if self.transport.get_write_buffer_size():  # the client still reads the previous answer
            self._update_head_timer()
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
    """The protocol of a new server: as many connections as this process may have file descriptors for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    most = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - SPARE_DESCRIPTORS
    return type("Connection", (Connection,), {"crowd": Crowd(max(16, min(MOST_CONNECTIONS, most)))})

"""A small transaction pooler before a PostgreSQL on a Unix socket, as labs have them: it knows no prepared statements.

A client has a backend from its first message until the backend is idle outside of a transaction, and may then get
another one.
"""

import asyncio
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from sqlalchemy import URL, make_url

SSL, GSS, CANCEL = 80877103, 80877104, 80877102
ASKS = b"QSF"  # messages that PostgreSQL answers with one ReadyForQuery each


@dataclass(eq=False)
class Backend:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    greeting: bytes  # its parameters
    key: bytes  # its process, for a client that wants to cancel


@dataclass
class Pooler:
    """`backends`: how many there are at most. `newest_first`: which of those that are free is given next."""

    socket: str
    backends: int
    newest_first: bool = True
    own_keys: bool = True  # as PgBouncer: a client is told a made-up process; else that of some backend
    port: int = 0
    queries: list[bytes] = field(default_factory=list)
    _free: dict[bytes, deque[Backend]] = field(default_factory=dict)
    _made: int = 0

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = struct.unpack("!i", await reader.readexactly(4))
                startup = await reader.readexactly(length - 4)
                code = struct.unpack("!i", startup[:4])[0]
                if code == CANCEL:
                    return writer.close()
                if code not in (SSL, GSS):
                    break
                writer.write(b"N")
            backend = await self._take(startup)
            self._give(startup, backend)
            key = struct.pack("!ii", 0x7A000000 + id(writer) % 1000, 1) if self.own_keys else backend.key
            writer.write(_message(b"R", struct.pack("!i", 0)) + backend.greeting + _message(b"K", key))
            writer.write(_message(b"Z", b"I"))
            await self._pass_on(startup, reader, writer)
        writer.close()
        return None

    async def _pass_on(self, startup: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend: Backend | None = None
        state, owed = b"I", 0
        answering: asyncio.Task[tuple[bytes, bytes]] | None = None
        asking = asyncio.ensure_future(_received(reader))
        try:
            while True:
                await asyncio.wait({asking, *([answering] if answering else [])}, return_when=asyncio.FIRST_COMPLETED)
                if answering is not None and answering.done():
                    kind, body = answering.result()
                    writer.write(_message(kind, body))
                    owed, state = (owed - 1, body) if kind == b"Z" else (owed, state)
                    assert backend is not None
                    answering = asyncio.ensure_future(_received(backend.reader))
                    if kind == b"Z" and state == b"I" and not owed:
                        answering.cancel()
                        await asyncio.gather(answering, return_exceptions=True)
                        self._give(startup, backend)
                        backend = answering = None
                elif asking.done():
                    kind, body = asking.result()
                    if kind == b"X":
                        return
                    if kind in b"QP":
                        self.queries.append(body)
                    if backend is None:
                        backend = await self._take(startup)
                        answering = asyncio.ensure_future(_received(backend.reader))
                    owed += kind in ASKS
                    backend.writer.write(_message(kind, body))
                    asking = asyncio.ensure_future(_received(reader))
        finally:
            for task in filter(None, (asking, answering)):
                task.cancel()
            if backend is not None:  # it is in the middle of something
                backend.writer.close()
                self._made -= 1

    async def _take(self, startup: bytes) -> Backend:
        free = self._free.setdefault(startup, deque())
        while not free:
            if self._made < self.backends:
                self._made += 1
                return await _connected(self.socket, startup)
            await asyncio.sleep(0.002)
        return free.pop() if self.newest_first else free.popleft()

    def _give(self, startup: bytes, backend: Backend) -> None:
        self._free[startup].append(backend)


@contextmanager
def pooling(
    url: str, backends: int = 3, *, newest_first: bool = True, own_keys: bool = True
) -> Iterator[tuple[Pooler, str]]:
    """A pooler before the database of this URL, and the URL through it."""
    parsed = make_url(url)
    pooler = Pooler(f"{parsed.query['host']}/.s.PGSQL.{parsed.port or 5432}", backends, newest_first, own_keys)
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(pooler.serve(started, stop),))
    thread.start()
    try:
        started.wait()
        through = URL.create("postgresql+psycopg", parsed.username, None, "127.0.0.1", pooler.port, parsed.database)
        yield pooler, through.render_as_string(hide_password=False)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
            with suppress(BaseException):
                loop.run_until_complete(task)
        loop.close()


async def _connected(socket: str, startup: bytes) -> Backend:
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(struct.pack("!i", len(startup) + 4) + startup)
    greeting, key = b"", b""
    while True:
        kind, body = await _received(reader)
        assert kind != b"E", body
        if kind == b"S":
            greeting += _message(kind, body)
        elif kind == b"K":
            key = body
        elif kind == b"Z":
            return Backend(reader, writer, greeting, key)


async def _received(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readexactly(5)
    return head[:1], await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body

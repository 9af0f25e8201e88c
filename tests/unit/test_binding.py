"""The address that the service answers on."""

import asyncio
import socket

import pytest

from api.binding import PortTaken, listen


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_answers_are_not_held_back_for_the_clients_acknowledgement(host: str) -> None:
    """Linux delays that by 40 ms, and an answer of two writes would wait for it; asyncio only helps a TCP socket."""

    async def nodelay_of_what_is_accepted() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=listen(host, 0)) as server:
            address = server.sockets[0].getsockname()
            _, writer = await asyncio.open_connection(*address[:2])
            writer.close()
            return await accepted

    assert asyncio.run(nodelay_of_what_is_accepted())


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1:{port} .*take another --port"):
            listen("127.0.0.1", port)

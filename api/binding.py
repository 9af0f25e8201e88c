"""The address that the service answers on. Light enough for every command to import."""

import ipaddress
import socket

from service.errors import UncannyError
from service.settings import Settings

UNSENT_BYTES = 128 << 10  # the most that the kernel holds for a client that does not read


class PortTaken(UncannyError):
    """Nothing can listen at this address."""


class NotLoopback(UncannyError):
    """Other machines could reach the server, and it would require no token."""


def check_bind(settings: Settings) -> None:
    """Raises `NotLoopback` for an address that others can reach, unless tokens are required or `insecure` is set."""
    if not (settings.auth or settings.insecure or is_loopback(settings.host)):
        raise NotLoopback(
            f"refusing to listen on {settings.host}: anyone who reaches it could submit jobs as anyone. "
            "Switch tokens on (--auth, UNCANNY_AUTH=1; the first one: "
            "`uncanny token create NAME --scope admin --direct`), "
            "use 127.0.0.1 and a tunnel, or say --insecure on a network that you trust"
        )


def is_loopback(host: str) -> bool:
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `PortTaken` with a sentence that says what to do.

    The socket names its protocol, because asyncio sets TCP_NODELAY only on sockets that do. Without TCP_NODELAY, an
    answer of two writes (head and body) waits 40 ms for the client's delayed acknowledgement.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _taken(host, port, error) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # the accepted connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise _taken(host, port, error) from None
    return listening


def _taken(host: str, port: int, error: OSError) -> PortTaken:
    reason = error.strerror or error
    return PortTaken(f"cannot listen on {host}:{port} ({reason}): stop what uses it, or take another --port")

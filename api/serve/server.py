"""The API as a process of its own: `python -m api.serve.server`. Settings come from the environment."""

import argparse
import logging
import math
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

from api.binding import check_bind, listen
from api.http.app import create_app
from api.http.connections import connections
from service import logs, private
from service.errors import UncannyError
from service.operations.upgrading import prepare_store
from service.settings import Settings

log = logging.getLogger("uncanny.api")
GRACE_SECONDS = 3


class Server(uvicorn.Server):
    """A server that ends its event streams when it is asked to stop, and exits without the signal as its cause."""

    def __init__(self, app: FastAPI, grace_seconds: float) -> None:
        grace = math.ceil(grace_seconds)
        config = uvicorn.Config(
            app,
            http=connections(),
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=grace,
            server_header=False,
        )
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: object) -> None:
        self._app.state.stopping = True
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(settings: Settings, listening: socket.socket) -> None:
    """Answer requests on this socket until SIGTERM or SIGINT. Open requests get a few seconds to end."""
    log.info("answers requests on %s port %s", *listening.getsockname()[:2])
    Server(create_app(settings), GRACE_SECONDS).run(sockets=[listening])
    log.info("has stopped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, help="A listening socket that the parent process has opened.")
    fd = parser.parse_args().fd
    logs.configure("plain")
    private.be_private()
    settings = Settings()
    try:
        check_bind(settings)
        prepare_store(settings)
        listening = socket.socket(fileno=fd) if fd is not None else listen(settings.host, settings.port)
        serve(settings, listening)
    except UncannyError as error:
        print(f"uncanny: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

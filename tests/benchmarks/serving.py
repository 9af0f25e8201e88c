"""The API as the process that it is when it serves, beside the process that measures."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil


@dataclass(frozen=True)
class Serving:
    """A client of a process."""

    http: httpx.Client
    process: psutil.Process

    def get(self, path: str, **parameters: Any) -> Any:
        return self.http.get(path, params=parameters).raise_for_status().json()

    def memory_bytes(self) -> int:
        return int(self.process.memory_info().rss)

    def peak_while(self, work: Callable[[], object]) -> int:
        """The most memory that the process has while `work` goes on, in bytes."""
        seen, over = [self.memory_bytes()], Event()

        def watch() -> None:
            while not over.wait(0.02):
                seen.append(self.memory_bytes())

        thread = Thread(target=watch)
        thread.start()
        try:
            work()
        finally:
            over.set()
            thread.join()
        return max(seen)


@contextmanager
def serving(url: str, home: Path, **environment: str) -> Iterator[Serving]:
    """The API on this store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"UNCANNY_DATABASE_URL": url, "UNCANNY_HOME": str(home), "UNCANNY_PORT": str(port)}
    process = subprocess.Popen(
        [sys.executable, "-m", "api.serve.server"],
        env={**os.environ, **settings, **environment},
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
            wait_until_it_answers(http)
            yield Serving(http, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait()


def wait_until_it_answers(http: httpx.Client, path: str = "/healthz", seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            http.get(path).raise_for_status()
            return
        except httpx.HTTPError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)

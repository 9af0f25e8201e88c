"""Requests to a service: repeated with growing pauses where that is safe, refused with the service's own words."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx

from api.binding import is_loopback
from api.home import service_url
from service.errors import UncannyError
from service.settings import Settings

Json = dict[str, Any]
OnProgress = Callable[[Json], None]
BUSY = (429, 503)
RESTARTS = 10  # of one download


class ApiError(UncannyError):
    """The service refused, or failed. `problem` is its problem document."""

    def __init__(self, status: int, problem: Json) -> None:
        self.status, self.problem = status, problem
        super().__init__(str(problem.get("detail") or f"the service answered with status {status}"))


class Unreachable(UncannyError):
    """Nothing answers at the service's address."""


class Transport:
    """Talks to a service: at `url`, else `UNCANNY_URL`, else the one that runs for this home.

    What is safe to repeat is repeated with growing pauses while the service or its database is away, for up to
    `patience_seconds`; submissions are made safe by an idempotency key. Raises `ApiError` and `Unreachable`.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, *, user: str | None = None, patience_seconds: float = 20
    ) -> None:
        settings = Settings()
        self.url = (url or service_url(settings)).rstrip("/")
        self.patience_seconds = patience_seconds
        self._program = settings.program
        headers = {"X-Uncanny-User": user} if user else {}
        if token or settings.token:
            headers["Authorization"] = f"Bearer {token or settings.token}"
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=httpx.Timeout(120, connect=5),
            trust_env=not is_loopback(httpx.URL(self.url).host),  # no proxy knows this machine
        )  # fmt: skip

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, path: str, body: Mapping[str, Any]) -> Json:
        headers = {"Idempotency-Key": str(uuid4())}
        return self._request("POST", path, json=dict(body), headers=headers, repeatable=True)

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[Json]:
        cursor: str | None = None
        while True:
            page = self._request("GET", path, params={**params, **({"cursor": cursor} if cursor else {})})
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _request(
        self, method: str, path: str, *, repeatable: bool | None = None,
        content: Callable[[], Iterator[bytes]] | None = None, **more: Any,
    ) -> Json:  # fmt: skip
        """One request, repeated where that is safe: always if nothing was sent or done, else if `repeatable`."""
        repeatable = method in ("GET", "PUT") if repeatable is None else repeatable
        patience = Patience(self.patience_seconds)
        while True:
            response = None
            try:
                response = self._http.request(method, path, content=content() if content else None, **more)
                if response.status_code not in BUSY or patience.is_over:
                    check(response)
                    return answer_of(response)
            except httpx.TransportError as error:
                safe = repeatable or isinstance(error, httpx.ConnectError)
                if not safe or patience.is_over:
                    raise self._unreachable(error) from None
            patience.pause(response)

    def _download(self, path: str, params: Mapping[str, Any], target: Path) -> None:
        """Write an answer to a file, piece by piece; from its start again where the connection breaks.

        It is tried anew after every connection that something came through, up to `RESTARTS` times.
        """
        patience, restarts = Patience(self.patience_seconds), 0
        while True:
            response, written = None, 0
            try:
                with self._http.stream("GET", path, params=params) as response:
                    if response.status_code not in BUSY or patience.is_over:
                        check(response)
                        with target.open("wb") as file:
                            for piece in response.iter_bytes():
                                written += file.write(piece)
                        return
            except httpx.TransportError as error:
                if written and restarts < RESTARTS:
                    patience, restarts = Patience(self.patience_seconds), restarts + 1
                if patience.is_over:
                    raise self._unreachable(error) from None
            patience.pause(response)

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"nothing answers at {self.url} ({error}): start it with `{self._program} serve`, or say where it is by "
            "--url or UNCANNY_URL"
        )


class Patience:
    """How long something is tried again: with growing pauses, or with those that the service asks for."""

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._pause_seconds = 0.1

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def pause(self, response: httpx.Response | None = None) -> None:
        """Wait, as `Retry-After` says where the answer was that the service is busy, and not beyond the end."""
        seconds = self._pause_seconds * random.uniform(0.5, 1.0)
        asked = response.headers.get("Retry-After", "") if response is not None else ""
        if asked.isdecimal():
            seconds = min(float(asked), max(0.0, self._deadline - time.monotonic())) + seconds / 10
        self._pause_seconds = min(2 * self._pause_seconds, 2.0)
        time.sleep(seconds)


def answer_of(response: httpx.Response) -> Json:
    """The JSON of an answer. Raises `ApiError` where there is none: something else than the service answers."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        kind = response.headers.get("Content-Type", "nothing")
        said = f"{response.url} answers with {kind} and not with JSON: is it the address of an Uncanny service?"
        raise ApiError(response.status_code, {"detail": said})
    return answer


def check(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    raise ApiError(response.status_code, problem if isinstance(problem, dict) else {})

"""Requests to a service: repeated with growing pauses if that is safe. Errors have the service's own words."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, Unpack
from uuid import uuid4

import httpx

from api.binding import is_loopback
from api.home import service_url
from service.errors import UncannyError
from service.model.json import JsonObject
from service.settings import Settings

Json = JsonObject
Scalar = str | int | float | bool | None
Parameter = Scalar | Sequence[Scalar]
"""A query parameter. Several values of a filter mean: any of them."""
OnProgress = Callable[[Json], None]
REFUSED = 429  # the request was not begun
LOST = (502, 503, 504)  # a proxy or the database broke off: the request may have been carried out
PASSING = (REFUSED, *LOST)
REPEATABLE = ("GET", "PUT", "PATCH", "DELETE")
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
PATIENCE_SECONDS = 60.0  # longer than a restart of the API takes, or a writer waits for the database
RESTARTS = 10  # of one download
MAY_EXIST = (
    "what was asked for may have been done all the same: look with `{program} jobs`, `{program} sweeps` or "
    "`{program} token list` before you ask for it again"
)


class Sent(TypedDict, total=False):
    """The parts of a request beside its method and path."""

    params: Mapping[str, Parameter]
    json: Mapping[str, object] | None
    headers: Mapping[str, str]
    timeout: httpx.Timeout


class ApiError(UncannyError):
    """The service refused the request, or failed. `problem` is its problem document."""

    def __init__(self, status: int, problem: Json) -> None:
        self.status, self.problem = status, problem
        super().__init__(str(problem.get("detail") or f"the service answered with status {status}"))


class Unreachable(UncannyError):
    """Nothing answers at the service's address."""


class Unanswered(Unreachable):
    """No answer came to a request that changes something: it may have been carried out."""


class Transport:
    """Sends requests to a service: at `url`, else `UNCANNY_URL`, else the one that runs for this home.

    A request that is safe to repeat is repeated for up to `patience_seconds`, with growing pauses or those that the
    service asks for; for up to `reach_seconds` if nothing listens at the address. An idempotency key makes submissions
    safe. Raises `ApiError`, `Unreachable` and `Unanswered`.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        user: str | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
        reach_seconds: float | None = None,
    ) -> None:
        settings = Settings()
        self.url = (url or service_url(settings)).rstrip("/")
        self.patience_seconds = patience_seconds
        self.reach_seconds = patience_seconds if reach_seconds is None else reach_seconds
        self._program = settings.program
        headers = {"X-Uncanny-User": user} if user else {}
        if token or settings.token:
            headers["Authorization"] = f"Bearer {token or settings.token}"
        self._http = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(120, connect=5),
            trust_env=not is_loopback(httpx.URL(self.url).host),  # a request to this machine goes through no proxy
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _post(self, path: str, body: Mapping[str, object]) -> Json:
        headers = {"Idempotency-Key": str(uuid4())}
        return self._request("POST", path, json=dict(body), headers=headers, repeatable=True)

    def _pages(self, path: str, params: Mapping[str, Parameter]) -> Iterator[Json]:
        cursor: str | None = None
        while True:
            page = self._request("GET", path, params={**params, **({"cursor": cursor} if cursor else {})})
            yield from page["items"]
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def _request(
        self,
        method: str,
        path: str,
        *,
        repeatable: bool | None = None,
        content: Callable[[], Iterator[bytes]] | None = None,
        **more: Unpack[Sent],
    ) -> Json:
        """One request, repeated if that is safe: always if nothing was sent or done, else if `repeatable`."""
        repeatable = method in REPEATABLE if repeatable is None else repeatable
        patience = self._patience()
        lost = False  # a request that changes something was sent, and its answer did not come
        while True:
            response = None
            try:
                response = self._http.request(method, path, content=content() if content else None, **more)
                lost |= method != "GET" and response.status_code in LOST
                passes = response.status_code in (PASSING if repeatable else (REFUSED,))
                if not passes or patience.is_over:
                    check(response, self._may_exist if lost else "")
                    return answer_of(response)
            except httpx.TransportError as error:
                sent = not isinstance(error, NOT_SENT)
                lost |= method != "GET" and sent
                if (sent and not repeatable) or patience.is_over_for(error):
                    raise self._unanswered(error, lost) from None
            patience.pause(response)

    def _download(self, path: str, params: Mapping[str, Parameter], target: Path) -> None:
        """Write an answer to a file, piece by piece. If the connection breaks, the download starts again.

        After a connection that delivered something it gets the whole patience again, up to `RESTARTS` times.
        """
        patience, restarts = self._patience(), 0
        while True:
            response, written = None, 0
            try:
                with self._http.stream("GET", path, params=params) as response:
                    if response.status_code not in PASSING or patience.is_over:
                        check(response)
                        with target.open("wb") as file:
                            for piece in response.iter_bytes():
                                written += file.write(piece)
                        return
            except httpx.TransportError as error:
                if written and restarts < RESTARTS:
                    patience, restarts = self._patience(), restarts + 1
                if patience.is_over_for(error):
                    raise self._unanswered(error) from None
            patience.pause(response)

    def _patience(self) -> "Patience":
        return Patience(self.patience_seconds, self.reach_seconds)

    @property
    def _may_exist(self) -> str:
        return MAY_EXIST.format(program=self._program)

    def _unanswered(self, error: Exception, lost: bool = False) -> Unreachable:
        """The error for an answer that did not come. `lost` says that the request may have changed something."""
        if lost:
            return Unanswered(f"no answer came from {self.url} ({error}): {self._may_exist}")
        if not isinstance(error, NOT_SENT):
            return Unreachable(f"{self.url} does not answer ({error}): ask again, or look at the service's log")
        return Unreachable(
            f"nothing answers at {self.url} ({error}): start it with `{self._program} serve`, or say where it is by "
            "--url or UNCANNY_URL"
        )


class Patience:
    """How long a request is repeated: with growing pauses, or with those that the service asks for."""

    def __init__(self, seconds: float, reach_seconds: float | None = None) -> None:
        """`reach_seconds` is for an address at which nothing listens."""
        began = time.monotonic()
        self._deadline = began + seconds
        self._reach_deadline = began + (seconds if reach_seconds is None else min(seconds, reach_seconds))
        self._pause_seconds = 0.1

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    def is_over_for(self, error: Exception) -> bool:
        """Whether to give up after this error."""
        return self.is_over or (isinstance(error, NOT_SENT) and time.monotonic() > self._reach_deadline)

    def pause(self, response: httpx.Response | None = None) -> None:
        """Wait a little longer each time.

        If the answer has a `Retry-After`, wait as long as it says, but not beyond the end of the patience.
        """
        seconds = self._pause_seconds * random.uniform(0.5, 1.0)
        retry_after = _retry_after(response.headers.get("Retry-After", "")) if response is not None else None
        if retry_after is not None:
            seconds = min(retry_after, max(0.0, self._deadline - time.monotonic())) + seconds / 10
        self._pause_seconds = min(2 * self._pause_seconds, 2.0)
        time.sleep(seconds)


def _retry_after(text: str) -> float | None:
    """The seconds that `Retry-After` asks for, as a number or a date (RFC 9110); None if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return None


def answer_of(response: httpx.Response) -> Json:
    """The JSON object of an answer. Raises `ApiError` if it is none: then the answer is not from the service."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        kind = response.headers.get("Content-Type", "nothing")
        detail = f"{response.url} answers with {kind} and not with JSON: is it the address of an Uncanny service?"
        raise ApiError(response.status_code, {"detail": detail})
    return answer


def check(response: httpx.Response, more: str = "") -> None:
    """Raises `ApiError` for a refusal or a failure. `more` is added to its message."""
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    problem = problem if isinstance(problem, dict) else {}
    status = response.status_code
    if "detail" not in problem and status in PASSING:
        phrase = HTTPStatus(status).phrase
        problem["detail"] = f"something between here and the service answers {status} {phrase}: is the service up?"
    if more and status != HTTPStatus.UNPROCESSABLE_ENTITY:
        detail = problem.get("detail") or f"the service answered with status {status}"
        problem["detail"] = (
            f"{detail}; {more}" if status in LOST else f"{detail} (an earlier try got no answer: {more})"
        )
    raise ApiError(status, problem)

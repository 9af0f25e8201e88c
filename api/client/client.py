"""A client for scripts and notebooks: `Client().sweep(name=..., base=..., grid=...).wait()`."""

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlencode

import httpx
from httpx_sse import SSEError, connect_sse

from api.client.handles import Job, Sweep
from api.client.questions import Questions
from api.client.transport import (
    PASSING,
    ApiError,
    Json,
    Parameter,
    Patience,
    check,
)
from service.errors import UncannyError

__all__ = ["Client", "Event", "Job", "Sweep"]

SWEEP_FIELDS = {"base", "grid", "include", "exclude"}
CHECKPOINT_SECONDS = 400  # the service may take so long to check weights, others in line before them included
CHUNK_BYTES = 1 << 20
IDS_AT_ONCE = 100


@dataclass(frozen=True)
class Event:
    """A state change (`id` is set, `kind` as in `task.succeeded`), or a `progress` report without an id.

    A `gap` stands for events that are not kept any more: `data` has their ids `from` and `to`.
    """

    id: int | None
    kind: str
    data: Json


class Client(Questions):
    """Everything that a service does, as methods. `Client()` uses the service of this home (see `Transport`)."""

    def submit(self, spec: Mapping[str, object] | None = None, /, **fields: object) -> Job:
        """Submit one job, given as a JobSpec's fields."""
        accepted = self._post("/v1/jobs", {**(spec or {}), **fields})
        return Job(self, str(accepted["id"]), accepted)

    def sweep(self, spec: Mapping[str, object] | None = None, /, **fields: object) -> Sweep:
        """Submit a grid of jobs, given as a Sweep's fields: `name`, `base`, `grid`, ..."""
        accepted = self._post("/v1/sweeps", {**(spec or {}), **fields})
        return Sweep(self, str(accepted["id"]), accepted)

    def dry_run(self, spec: Mapping[str, object]) -> Json:
        """What a job or a sweep would mean: jobs, distinct tasks, which are known, device seconds, time, quota."""
        path = "/v1/sweeps" if SWEEP_FIELDS & set(spec) else "/v1/jobs"
        return self._request("POST", path, params={"dry_run": True}, json=dict(spec), repeatable=True)

    def job(self, job_id: str, *, wait_seconds: float = 0) -> Json:
        return self._request("GET", f"/v1/jobs/{job_id}", params={"wait": wait_seconds})

    def jobs(self, filter: str | None = None, *, sort: str = "-created_at", **filters: Parameter) -> Iterator[Json]:
        """All jobs that match; a dotted field is given as in `**{"attack.norm": "linf"}`."""
        return self._pages("/v1/jobs", {"sort": sort, **({"filter": filter} if filter else {}), **filters})

    def sweeps(self, **filters: Parameter) -> Iterator[Json]:
        return self._pages("/v1/sweeps", filters)

    def get_sweep(self, sweep_id: str, *, wait_seconds: float = 0) -> Json:
        return self._request("GET", f"/v1/sweeps/{sweep_id}", params={"wait": wait_seconds})

    def task(self, id_or_digest: str) -> Json:
        return self._request("GET", f"/v1/tasks/{id_or_digest}")

    def catalog(self) -> Json:
        return self._request("GET", "/v1/catalog")

    def cluster(self) -> Json:
        return self._request("GET", "/v1/cluster")

    def ready(self) -> Json:
        return self._request("GET", "/readyz")

    def cancel(self, job_or_sweep_id: str) -> Json:
        return self._change(job_or_sweep_id, "cancel", "cancel")

    def retry(self, job_or_sweep_id: str, *, states: Collection[str] = ("failed",)) -> Json:
        """Run a failed, held or cancelled job again, or the jobs of a sweep that are in one of `states`."""
        return self._change(job_or_sweep_id, "retry", f"retry-failed?{urlencode({'states': ','.join(states)})}")

    def short_ids(self, ids: Iterable[str]) -> dict[str, str]:
        """The shortest prefix of each id that no other job or sweep has; from an older service, the whole ids."""
        whole = list(ids)
        prefixes = dict(zip(whole, whole, strict=True))
        for first in range(0, len(whole), IDS_AT_ONCE):
            params = {"ids": ",".join(whole[first : first + IDS_AT_ONCE])}
            try:
                prefixes |= self._request("GET", "/v1/ids", params=params)["prefixes"]
            except ApiError as error:
                if error.status != 404:
                    raise
        return prefixes

    def explain(self, job_id: str) -> Json:
        """Why a job is not running, and what comes before it."""
        return self._request("GET", f"/v1/jobs/{job_id}/explain")

    def queue(self) -> Json:
        """What is in the queue, whether it is paused, and how much each user has used of the cluster."""
        return self._request("GET", "/v1/queue")

    def pause(self, sweep_id: str | None = None) -> Json:
        """Start nothing more for a sweep, or, without one, for anybody. Paused twice is paused once."""
        path = f"/v1/sweeps/{sweep_id}" if sweep_id else "/v1/queue"
        return self._request("POST", f"{path}:pause", repeatable=True)

    def resume(self, sweep_id: str | None = None) -> Json:
        path = f"/v1/sweeps/{sweep_id}" if sweep_id else "/v1/queue"
        return self._request("POST", f"{path}:resume", repeatable=True)

    def extend(self, sweep_id: str, grid: Mapping[str, Sequence[object]]) -> Json:
        """Add values to axes of a sweep's grid; the answer says how many cells and tasks are new by it."""
        return self._post(f"/v1/sweeps/{sweep_id}:extend", {"grid": dict(grid)})

    def change(self, job_or_sweep_id: str, **changes: object) -> Json:
        """Change `priority` or `labels` of a job or sweep, whatever they were."""
        headers = {"If-Match": "*"}
        try:
            return self._request("PATCH", f"/v1/jobs/{job_or_sweep_id}", json=changes, headers=headers)
        except ApiError as error:
            if error.status != 404:
                raise
        return self._request("PATCH", f"/v1/sweeps/{job_or_sweep_id}", json=changes, headers=headers)

    def boost(self, job_or_sweep_id: str, *, boosted: bool = True) -> Json:
        """Put a job, or the live jobs of a sweep, before all other users' work, or back in turn (admin)."""
        verb = "boost" if boosted else "unboost"
        return self._change(job_or_sweep_id, verb, verb)

    def _change(self, ident: str, of_job: str, of_sweep: str) -> Json:
        """The request may be repeated: the second one changes nothing, or is refused with the state that it found."""
        try:
            return self._request("POST", f"/v1/jobs/{ident}:{of_job}", repeatable=True)
        except ApiError as error:
            if error.status != 404:
                raise
        return self._request("POST", f"/v1/sweeps/{ident}:{of_sweep}", repeatable=True)

    def me(self) -> Json:
        """The user whom the service takes this client for, and what its token may do."""
        return self._request("GET", "/v1/me")

    def users(self) -> list[Json]:
        items: list[Json] = self._request("GET", "/v1/users")["items"]
        return items

    def put_user(self, name: str, **changes: object) -> Json:
        """Make a user, or change `role`, `weight`, `max_queued_jobs`, `max_gpus`, `disabled` of one."""
        return self._request("PUT", f"/v1/users/{name}", json=changes)

    def disable_user(self, name: str) -> Json:
        return self._request("DELETE", f"/v1/users/{name}")

    def enable_user(self, name: str) -> Json:
        """Let a disabled user in again."""
        return self.put_user(name, disabled=False)

    def tokens(self, *, user: str | None = None) -> list[Json]:
        items: list[Json] = self._request("GET", "/v1/tokens", params={"user": user} if user else {})["items"]
        return items

    def create_token(
        self, name: str, *, user: str | None = None, scope: str = "submit", expires_in_days: float | None = None
    ) -> Json:
        """A new token; its `secret` is in this answer only."""
        body = {"name": name, "user": user, "scope": scope, "expires_in_days": expires_in_days}
        return self._request("POST", "/v1/tokens", json=body)

    def revoke_token(self, token_id: str) -> Json:
        """Refuse a token and all that were made with it; `revoked_children` says how many those were."""
        return self._request("DELETE", f"/v1/tokens/{token_id}")

    def datasets(self) -> list[Json]:
        """The registered data sets."""
        items: list[Json] = self._request("GET", "/v1/datasets")["items"]
        return items

    def register_dataset(self, name: str, folder: str | Path) -> Json:
        """Upload `train.npz` and `test.npz` of a folder and register them as `npz:NAME`."""
        body = {"name": name}
        for split in ("train", "test"):
            path = Path(folder) / f"{split}.npz"
            if not path.is_file():
                raise UncannyError(f"{path} is not there: a data set is a folder with train.npz and test.npz")
            body[f"{split}_sha256"] = self.upload(path)
        return self._request("POST", "/v1/datasets", json=body, repeatable=True)

    def checkpoints(self) -> list[Json]:
        """The registered weights, which were made elsewhere."""
        items: list[Json] = self._request("GET", "/v1/checkpoints")["items"]
        return items

    def networks(self, **filters: Parameter) -> Iterator[Json]:
        """The trained networks, the newest first: all, or of an `architecture`, `dataset`, `recipe`, `weights_sha256`.

        Jobs name one by `checkpoint=network["weights_sha256"]`.
        """
        return self._pages("/v1/networks", filters)

    def register_checkpoint(
        self, name: str, file: str | Path, *, architecture: str, dataset: str, **more: object
    ) -> Json:
        """Upload a safetensors file and register it.

        `more` are `keys`, `mean`, `std`, `expected_clean_accuracy`, `tolerance`. Jobs name it by `checkpoint=name`.
        """
        if not Path(file).is_file():
            raise UncannyError(f"{file} is not there: a checkpoint is a state dict saved as safetensors")
        body = {"name": name, "architecture": architecture, "dataset": dataset, **more}
        body["weights_sha256"] = self.upload(Path(file))
        timeout = httpx.Timeout(CHECKPOINT_SECONDS, connect=5)
        return self._request("POST", "/v1/checkpoints", json=body, timeout=timeout, repeatable=True)

    def upload(self, path: Path) -> str:
        """Upload a file as an artifact; returns its SHA-256."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._request("PUT", f"/v1/artifacts/{digest}", content=lambda: _chunks(file))
        return digest

    def events(
        self, *, sweep: str | None = None, job: str | None = None, after: int | None = None, follow: bool = True
    ) -> Iterator[Event]:
        """Events as they happen. If the connection breaks, it connects again and misses no state change."""
        params: Json = {"follow": follow} | ({"sweep": sweep} if sweep else {}) | ({"job": job} if job else {})
        last_id = after
        patience: Patience | None = None
        while True:
            response: httpx.Response | None = None
            headers = {"Last-Event-ID": str(last_id)} if last_id is not None else {}
            try:
                timeout = httpx.Timeout(30, connect=5)
                with connect_sse(
                    self._http, "GET", "/v1/events", params=params, headers=headers, timeout=timeout
                ) as source:
                    response = source.response
                    check(response)
                    for item in source.iter_sse():
                        if item.event == "end":  # the last event with `follow=False`
                            return
                        patience = None
                        last_id = int(item.id) if item.id else last_id
                        if item.data:
                            yield Event(None if item.event == "progress" else last_id, item.event, item.json())
                time.sleep(0.5)
            except (httpx.TransportError, SSEError, ApiError) as error:
                if isinstance(error, ApiError) and error.status not in PASSING:
                    raise
                patience = patience or self._patience()
                if patience.is_over_for(error):
                    raise error if isinstance(error, ApiError) else self._unanswered(error) from None
                patience.pause(response)


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk

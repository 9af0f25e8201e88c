"""The verbs: what a user can ask the service to do. Each writes in one transaction, and counts once that committed."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass

from service.errors import Changed, Conflict, InvalidSpec, NotFound, QuotaExceeded
from service.lab.artifacts import Artifacts
from service.lab.datasets import inspect
from service.limits import MAX_SWEEP_JOBS, Limits
from service.model import records
from service.model.events import EventKind
from service.model.jobs import LIVE_JOB, RETRIABLE, JobState
from service.model.json import JsonObject
from service.model.names import OWN_DATASET
from service.model.records import Job
from service.queue import replanning
from service.queue.plans import counted, distinct_tasks, plans_of
from service.queue.preview import preview
from service.results.views import version
from service.specs import JobSpec, Sweep, digest
from service.specs.plan import JobPlan
from service.specs.sweep import Grid
from service.store import (
    Connection,
    artifact_index,
    changing,
    datasets,
    history,
    jobs,
    joining,
    quotas,
    reading,
    replies,
    sweeps,
)
from service.store.database import Database
from service.store.history import Event
from service.store.jobs import Origin
from service.store.replies import Reply


@dataclass(frozen=True)
class Idempotency:
    """A client's key for one request, and the SHA-256 of the request's body."""

    key: str
    body_sha256: str


class Service:
    """The verbs on one store and one artifact root."""

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        limits: Limits | None = None,
        *,
        max_sweep_jobs: int = MAX_SWEEP_JOBS,
    ) -> None:
        self.database = database
        self.artifacts = artifacts
        self.limits = limits or Limits()
        self.max_sweep_jobs = max_sweep_jobs

    def submit(
        self,
        job: JobSpec,
        *,
        user: str,
        priority: int = 0,
        labels: dict[str, str] | None = None,
        idempotency: Idempotency | None = None,
    ) -> Reply:
        """Accept one job: it joins existing tasks and makes the others. The job is stored once this returns."""

        def write(connection: Connection, now: float) -> Reply:
            plans = plans_of(connection, [job])
            [job_id] = self.accept(connection, now, plans, user=user, priority=priority, labels=labels)
            state = reading.job_state(connection, job_id)
            body = {"id": job_id, "state": state, "tasks": [task.digest for task in plans[0].tasks.values()]}
            return Reply(201, f"/v1/jobs/{job_id}", body)

        return self._once(user, idempotency, write)

    def accept(
        self,
        connection: Connection,
        now: float,
        plans: Sequence[JobPlan],
        *,
        user: str,
        priority: int = 0,
        labels: dict[str, str] | None = None,
    ) -> list[str]:
        """Write jobs of no sweep in the caller's transaction; returns their ids. Raises `QuotaExceeded`."""
        self._check_quota(connection, user, len(plans))
        existing = joining.existing_tasks(connection, distinct_tasks(plans))
        return jobs.insert_jobs(connection, now, plans, existing, Origin(user, priority, labels or {}))

    def submit_sweep(self, sweep: Sweep, *, user: str, idempotency: Idempotency | None = None) -> Reply:
        """Accept all cells of a sweep at once, or none of them."""
        cells = sweep.cells(self.max_sweep_jobs)
        with self.database.read() as connection:  # not in the one writing transaction: planning is slow
            plans = plans_of(connection, cells, sweep.located)
        needed = distinct_tasks(plans)

        def write(connection: Connection, now: float) -> Reply:
            self._check_quota(connection, user, len(plans))
            existing = joining.existing_tasks(connection, needed)
            spec, labels = sweep.model_dump(mode="json"), sweep.labels
            sweep_id = sweeps.insert_sweep(
                connection, now, name=sweep.name, user=user, spec=spec, priority=sweep.priority, labels=labels
            )
            origin = Origin(user, sweep.priority, labels, sweep_id)
            jobs.insert_jobs(connection, now, plans, existing, origin)
            numbers = counted(len(plans), needed, existing, repetitions=sweep.written() - len(plans))
            body = {"id": sweep_id, "name": sweep.name, **numbers}
            return Reply(201, f"/v1/sweeps/{sweep_id}", body)

        return self._once(user, idempotency, write)

    def dry_run(self, submission: JobSpec | Sweep, *, user: str) -> JsonObject:
        """What a job or a sweep would mean: tasks, device seconds, time, quota. Nothing is written."""
        with self.database.read() as connection:
            if isinstance(submission, JobSpec):
                return preview(connection, "", plans_of(connection, [submission]), user, self.limits)
            plans = plans_of(connection, submission.cells(self.max_sweep_jobs), submission.located)
            repetitions = submission.written() - len(plans)
            return preview(connection, submission.name, plans, user, self.limits, repetitions=repetitions)

    def extend(self, sweep_id: str, grid: Grid, *, user: str, idempotency: Idempotency | None = None) -> Reply:
        """Add values to axes of a sweep's grid, and accept the new cells as jobs of `user`.

        The jobs have the sweep's priority and labels, and are paused if the sweep is. Raises `NotFound`, `InvalidSpec`
        for a name that is no axis, `Conflict` if somebody else extends the sweep at the same time.
        """
        with self.database.read() as connection:
            stored = _sweep(connection, sweep_id)
            before = Sweep.model_validate(stored.spec)
            sweep = before.extended(grid)
            have = reading.spec_digests_of_sweep(connection, sweep_id)
            try:
                # Cells are compared, not only digests: stored digests may be of an earlier canonical form.
                old = set(before.cells(self.max_sweep_jobs))
                new = [job for job in sweep.cells(self.max_sweep_jobs) if job not in old]
                planned = plans_of(connection, new, sweep.located)
            except InvalidSpec as error:
                raise sweep.in_extension(grid, error) from None
        plans = [plan for plan in planned if digest(plan.job) not in have]
        needed = distinct_tasks(plans)

        def write(connection: Connection, now: float) -> Reply:
            self._check_quota(connection, user, len(plans))
            current = _sweep(connection, sweep_id)
            if current.spec != stored.spec:
                raise Conflict(f"sweep {sweep_id} was extended by somebody else just now: look at it, then try again")
            existing = joining.existing_tasks(connection, needed)
            if plans:
                sweeps.extend_sweep(connection, sweep_id, sweep.model_dump(mode="json"))
                event = Event(EventKind.SWEEP_EXTENDED, sweep_id=sweep_id, data={"grid": grid, "jobs": len(plans)})
                history.append(connection, now, user, [event])
                origin = Origin(user, current.priority, current.labels, sweep_id, paused=current.paused)
                jobs.insert_jobs(connection, now, plans, existing, origin)
            body = {"id": sweep_id, "name": current.name, **counted(len(plans), needed, existing)}
            return Reply(200, f"/v1/sweeps/{sweep_id}", body)

        return self._once(user, idempotency, write)

    def cancel_job(self, job_id: str, *, user: str) -> None:
        """Detach a live job from its tasks. Raises `NotFound`, `Conflict` if it has ended already."""
        self._change([job_id], user, "cancelled", jobs.cancel_jobs, "cancelled by " + user)

    def retry_job(self, job_id: str, *, user: str) -> None:
        """Reopen a failed, held or cancelled job.

        Raises `NotFound`, `Conflict` if it is in another state, `QuotaExceeded` if its owner has too many jobs.
        """
        self._change([job_id], user, "retried", self._retry)

    def cancel_sweep(self, sweep_id: str, *, user: str) -> int:
        """Cancel the live jobs of a sweep; returns how many were cancelled."""
        with self.database.write() as connection:
            ids = _jobs_of(connection, sweep_id)
            now = self.database.now(connection)
            return len(jobs.cancel_jobs(connection, now, user, ids, f"cancelled by {user}"))

    def retry_failed(
        self, sweep_id: str, *, user: str, states: Collection[str] = (JobState.FAILED,)
    ) -> tuple[int, dict[str, int]]:
        """Reopen the jobs of a sweep that are in one of these `states`, which are among `RETRIABLE`.

        Returns how many it reopened, and how many were in each state of `RETRIABLE`. Raises `NotFound`, and
        `QuotaExceeded` if an owner of them would have too many jobs; then none is reopened.
        """
        with self.database.write() as connection:
            ids = _jobs_of(connection, sweep_id)
            counts = jobs.states_of(connection, ids)
            ended = [JobState(state) for state in states]
            retried = self._retry(connection, self.database.now(connection), user, ids, ended)
            return len(retried), {state: counts[state] for state in RETRIABLE}

    def pause_sweep(self, sweep_id: str, *, user: str) -> None:
        """Claim no more tasks for this sweep. Running tasks finish, and tasks that other jobs need go on.

        A paused sweep stays as it is. Raises `NotFound`, `Conflict` if all of its jobs have ended.
        """
        with self.database.write() as connection:
            _sweep(connection, sweep_id)
            if not reading.has_live_jobs(connection, sweep_id):
                raise Conflict(f"sweep {sweep_id} has ended, so it cannot be paused")
            changing.pause_sweep(connection, self.database.now(connection), user, sweep_id, paused=True)

    def resume_sweep(self, sweep_id: str, *, user: str) -> None:
        """Let a paused sweep go on; one that is not paused stays as it is. Raises `NotFound`."""
        with self.database.write() as connection:
            _sweep(connection, sweep_id)
            changing.pause_sweep(connection, self.database.now(connection), user, sweep_id, paused=False)

    def pause_queue(self, *, user: str) -> None:
        """Claim no more tasks for anybody. Running tasks finish, and jobs are still accepted."""
        with self.database.write() as connection:
            changing.pause_queue(connection, self.database.now(connection), user, paused=True)

    def resume_queue(self, *, user: str) -> None:
        with self.database.write() as connection:
            changing.pause_queue(connection, self.database.now(connection), user, paused=False)

    def change_job(
        self,
        job_id: str,
        *,
        user: str,
        seen: Collection[str] | None = None,
        priority: int | None = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        """Change the priority or the labels of a job. Its tasks are ranked again; running tasks keep running.

        Raises `NotFound`, `Changed` if `seen` is given and has not the job's version (`views.version`), `Conflict` for
        the priority of a job that has ended.
        """
        with self.database.write() as connection:
            job = reading.job(connection, job_id)
            if job is None:
                raise NotFound(f"there is no job {job_id}")
            _check_seen(job, seen, f"job {job_id}")
            if priority is not None and job.state not in LIVE_JOB:
                raise Conflict(f"job {job_id} is {job.state}, so its priority cannot be changed")
            now = self.database.now(connection)
            changing.change_job(connection, now, user, job_id, priority=priority, labels=labels)

    def change_sweep(
        self,
        sweep_id: str,
        *,
        user: str,
        seen: Collection[str] | None = None,
        priority: int | None = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        """Like `change_job`, for a sweep: its live jobs get the priority, all of its jobs the labels."""
        with self.database.write() as connection:
            _check_seen(_sweep(connection, sweep_id), seen, f"sweep {sweep_id}")
            now = self.database.now(connection)
            changing.change_sweep(connection, now, user, sweep_id, priority=priority, labels=labels)

    def boost_job(self, job_id: str, *, user: str, boosted: bool = True) -> None:
        """Let a live job go before all other users' work, whatever its owner has used; not `boosted`, in turn again.

        The caller checks that an admin asks. Raises `NotFound`, `Conflict` if the job has ended.
        """
        with self.database.write() as connection:
            state = reading.job_state(connection, job_id)
            if state is None:
                raise NotFound(f"there is no job {job_id}")
            if state not in LIVE_JOB:
                raise Conflict(f"job {job_id} is {state}, so it has no turn any more")
            now = self.database.now(connection)
            changing.boost_job(connection, now, user, job_id, boosted=boosted)

    def boost_sweep(self, sweep_id: str, *, user: str, boosted: bool = True) -> int:
        """Like `boost_job`, for the live jobs of a sweep, not for jobs of later extensions; returns how many."""
        with self.database.write() as connection:
            _sweep(connection, sweep_id)
            now = self.database.now(connection)
            return changing.boost_sweep(connection, now, user, sweep_id, boosted=boosted)

    def register_dataset(self, name: str, train_sha256: str, test_sha256: str, *, user: str) -> JsonObject:
        """Register a lab's own images as `npz:NAME`. Their two files must be artifacts already.

        Registering the same name again changes nothing with the same files, and is a `Conflict` with others. The answer
        says how many test images are training images too. Raises `InvalidSpec` for files that are not as
        docs/own-data-and-weights.md asks, `ArtifactMissing`.
        """
        with self.artifacts.local(train_sha256) as train, self.artifacts.local(test_sha256) as test:
            dataset, in_both = inspect(name, train, test, train_sha256, test_sha256)
            sizes = {train_sha256: train.stat().st_size, test_sha256: test.stat().st_size}
        with self.database.write() as connection:
            now = self.database.now(connection)
            existing = datasets.named(connection, name)
            if existing is None:
                datasets.register(connection, {**asdict(dataset), "created_by": user, "created_at": now})
                artifact_index.keep_uploads(connection, now, "dataset", sizes)
                data = {"name": name, "test_images_in_train": in_both}
                history.append(connection, now, user, [Event(EventKind.DATASET_REGISTERED, data=data)])
            elif (existing.train_sha256, existing.test_sha256) != (train_sha256, test_sha256):
                sentence = "is registered with other files; results rest on them, so take a new name"
                raise Conflict(f"{existing.reference} {sentence}")
        return {**asdict(dataset), "name": OWN_DATASET + name, "test_images_in_train": in_both}

    def _change(self, ids: list[str], user: str, verb: str, change: Callable[..., list[str]], *more: str) -> None:
        with self.database.write() as connection:
            state = reading.job_state(connection, ids[0])
            if state is None:
                raise NotFound(f"there is no job {ids[0]}")
            if not change(connection, self.database.now(connection), user, ids, *more):
                raise Conflict(f"job {ids[0]} is {state}, so it cannot be {verb}")

    def _retry(
        self,
        connection: Connection,
        now: float,
        user: str,
        ids: list[str],
        states: Collection[JobState] = RETRIABLE,
    ) -> list[str]:
        for owner, count in jobs.count_retries(connection, ids, states).items():
            self._check_quota(connection, owner, count)
        replanning.before_retry(connection, now, user, ids, states)
        return jobs.retry_jobs(connection, now, user, ids, states)

    def _once(self, user: str, idempotency: Idempotency | None, write: Callable[[Connection, float], Reply]) -> Reply:
        """Call `write` once per idempotency key: its reply is stored in the same transaction as its changes."""
        with self.database.write() as connection:
            now = self.database.now(connection)
            if idempotency is not None:
                stored = replies.find(connection, user, idempotency.key, idempotency.body_sha256)
                if stored is not None:
                    return stored
            reply = write(connection, now)
            if idempotency is not None:
                replies.keep(connection, now, user, idempotency.key, idempotency.body_sha256, reply)
            return reply

    def _check_quota(self, connection: Connection, user: str, more: int) -> None:
        """Raises `QuotaExceeded` if, with `more` jobs, the user had more waiting or running than they may have."""
        most = quotas.limits(connection, [user], self.limits)[user].max_queued_jobs
        if most is not None and more and (have := quotas.unfinished_jobs(connection, user)) + more > most:
            raise QuotaExceeded(
                f"{user} may have {most:,} jobs waiting or running and has {have:,}; {more:,} more do not fit: "
                "let some end, cancel some, or ask for a larger quota"
            )


def _check_seen(value: Job | records.Sweep, seen: Collection[str] | None, name: str) -> None:
    if seen is not None and version(value.id, value.priority, value.labels) not in seen:
        raise Changed(f"{name} was changed since you looked at it: get it again, then say what to change")


def _sweep(connection: Connection, sweep_id: str) -> records.Sweep:
    sweep = reading.sweep(connection, sweep_id)
    if sweep is None:
        raise NotFound(f"there is no sweep {sweep_id}")
    return sweep


def _jobs_of(connection: Connection, sweep_id: str) -> list[str]:
    _sweep(connection, sweep_id)
    return reading.job_ids_of_sweep(connection, sweep_id)

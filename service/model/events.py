"""The kinds of events, by the names that they are stored and shown under: `noun.verb`.

The comment beside each kind names the modules that write it; `tests/unit/test_events.py` compares. An event of a state
(`task.queued`, `job.failed`) is written by whoever moves the task or the job into that state.
"""

from enum import StrEnum
from typing import Self

from service.model.jobs import JobState, TaskState


class EventKind(StrEnum):
    JOB_SUBMITTED = "job.submitted"  # store.jobs: the service accepts it
    JOB_REPLANNED = "job.replanned"  # store.jobs, .trained_again: it needs other tasks from now on
    JOB_RETRIED = "job.retried"  # store.jobs: somebody reopens it
    JOB_CHANGED = "job.changed"  # store.changing: another priority, other labels
    JOB_BOOSTED = "job.boosted"  # store.changing: an admin puts it before other users' work
    JOB_UNBOOSTED = "job.unboosted"  # store.changing: an admin takes that back
    JOB_QUEUED = "job.queued"  # store.settling
    JOB_RUNNING = "job.running"  # store.settling
    JOB_SUCCEEDED = "job.succeeded"  # store.settling
    JOB_FAILED = "job.failed"  # store.settling
    JOB_CANCELLED = "job.cancelled"  # store.jobs
    JOB_HELD = "job.held"  # store.settling

    TASK_BLOCKED = "task.blocked"  # store.joining, .trained_again
    TASK_QUEUED = "task.queued"  # store.joining, .settling, .claiming, .recording, .trained_again
    TASK_RUNNING = "task.running"  # store.claiming, .trained_again
    TASK_SUCCEEDED = "task.succeeded"  # store.recording, .trained_again
    TASK_FAILED = "task.failed"  # store.recording
    TASK_CANCELLED = "task.cancelled"  # store.joining, .settling, .claiming, .recording, .trained_again
    TASK_HELD = "task.held"  # store.recording
    TASK_CHECKPOINTED = "task.checkpointed"  # store.recording: it can resume from this epoch
    TASK_STALLED = "task.stalled"  # store.recording: it does not advance
    TASK_OTHER_WEIGHTS = "task.other_weights"  # store.trained_again: its training ran again and gave other weights
    TASK_RETRACTED = "task.retracted"  # queue.retractions
    TASK_RESTORED = "task.restored"  # queue.retractions

    SWEEP_SUBMITTED = "sweep.submitted"  # store.sweeps
    SWEEP_EXTENDED = "sweep.extended"  # queue.verbs: its grid has more values
    SWEEP_CHANGED = "sweep.changed"  # store.changing: another priority, other labels
    SWEEP_PAUSED = "sweep.paused"  # store.changing: by somebody, or by the service after many quick failures
    SWEEP_RESUMED = "sweep.resumed"  # store.changing
    QUEUE_PAUSED = "queue.paused"  # store.changing
    QUEUE_RESUMED = "queue.resumed"  # store.changing

    RESULT_RETRACTED = "result.retracted"  # queue.retractions: it is hidden from now on
    RESULT_RESTORED = "result.restored"  # queue.retractions
    RESULT_UNMEASURED = "result.unmeasured"  # queue.retractions: it is shown without a further measure's numbers
    RESULT_MEASURED = "result.measured"  # queue.retractions: it has these numbers back
    RESULT_JUDGED = "result.judged"  # results.judging: its verdict is another one now

    USER_CREATED = "user.created"  # lab.access
    USER_CHANGED = "user.changed"  # lab.access
    USER_DISABLED = "user.disabled"  # lab.access
    USER_ENABLED = "user.enabled"  # lab.access
    TOKEN_CREATED = "token.created"  # lab.access
    TOKEN_REVOKED = "token.revoked"  # lab.access
    DATASET_REGISTERED = "dataset.registered"  # queue.verbs
    CHECKPOINT_REGISTERED = "checkpoint.registered"  # lab.checkpoints

    ENVIRONMENT_SET_ASIDE = "environment.set_aside"  # queue.dispatcher: a node, device or folder gets no work
    ENVIRONMENT_RETURNED = "environment.returned"  # queue.dispatcher: it gets work again

    @classmethod
    def of_task(cls, state: TaskState) -> Self:
        """The event that a task is in this state from now on."""
        return cls(f"task.{state}")

    @classmethod
    def of_job(cls, state: JobState) -> Self:
        """The event that a job is in this state from now on."""
        return cls(f"job.{state}")

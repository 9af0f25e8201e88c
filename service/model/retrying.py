"""When an attempt ends without success, its task is tried again, fails, is cancelled, or is held."""

import random
from dataclasses import dataclass, replace

from service.model.executor import Failed
from service.model.jobs import TaskState
from service.model.json import JsonMapping

COSTLY = frozenset({"worker_died", "out_of_memory", "stalled"})  # losses that may be the task's own doing
PATIENT = frozenset({"out_of_shared_memory"})  # losses that would come again at once
OF_MEMORY = frozenset({"out_of_memory", "out_of_shared_memory"})
MAX_PATIENT_LOSSES = 3  # in a row, with a whole GPU: then the memory is too little for the task itself
LONGEST_WAIT_SECONDS = 600.0
MISSING_CHECKPOINT = "missing_checkpoint"  # how an attempt ended, by which a retry finds the training to run again
UNWANTED = "no live job needs it"


@dataclass(frozen=True)
class Patience:
    """How many application errors and lost workers a task may have, and the wait before a retry: doubled each time."""

    max_errors: int
    max_suspect_losses: int
    backoff_seconds: float

    def wait_seconds(self, errors: int) -> float:
        """With jitter, so that tasks that failed together do not come back together."""
        doubled = min(self.backoff_seconds * 2.0 ** min(errors - 1, 20), LONGEST_WAIT_SECONDS)
        return float(doubled * random.uniform(0.75, 1.25))


@dataclass(frozen=True)
class Counts:
    """The errors and suspect losses of a task so far."""

    errors: int
    suspect_losses: int


@dataclass(frozen=True)
class Ending:
    """The next state of the task and its reason, how the attempt ended, and the counts from now on.

    `wait_seconds` is the wait before the next attempt; None leaves it as it is.
    """

    state: TaskState
    reason: str
    end: str
    counts: Counts
    wait_seconds: float | None = None


def after_error(failed: Failed, counts: Counts, patience: Patience) -> Ending:
    """An error of the task's own code is tried again up to `max_errors` times, unless it would come again."""
    counts = replace(counts, errors=counts.errors + 1)
    if failed.kind == "error" and counts.errors < patience.max_errors:
        return Ending(TaskState.QUEUED, failed.message, "error", counts, patience.wait_seconds(counts.errors))
    end = MISSING_CHECKPOINT if failed.kind == MISSING_CHECKPOINT else "failed"
    return Ending(TaskState.FAILED, failed.message, end, counts)


def after_loss(
    message: str, end: str, in_a_row: int, counts: Counts, patience: Patience, *, dispensable: bool
) -> Ending:
    """A lost attempt is tried again; a task that loses its worker too often is held for a person to look at.

    `in_a_row` counts the patient losses just before this one. A `dispensable` task fails instead of being held: it is a
    further measure, and its jobs have their results without its numbers.
    """
    if end in PATIENT:
        return Ending(TaskState.QUEUED, message, end, counts, patience.wait_seconds(1 + in_a_row))
    if end in COSTLY:
        losses = counts.suspect_losses + 1
        lost = Ending(TaskState.QUEUED, message, end, replace(counts, suspect_losses=losses))
        lost = replace(lost, wait_seconds=patience.wait_seconds(losses))
        if losses < patience.max_suspect_losses:
            return lost
        reason = f"it lost its worker {losses} times, last: {message}"
        if dispensable:
            return replace(lost, state=TaskState.FAILED, reason=reason)
        return replace(lost, state=TaskState.HELD, reason=f"held for review: {reason}")
    return Ending(TaskState.QUEUED, message, end, counts)


def unless_unwanted(ending: Ending) -> Ending:
    """The ending of a task that no live job needs any more: it is cancelled, unless it has failed by itself."""
    if ending.state is TaskState.FAILED:
        return ending
    return replace(ending, state=TaskState.CANCELLED, reason=UNWANTED)


def is_further_measure(kind: str, spec: JsonMapping) -> bool:
    """Whether a task of this kind and spec measures more than the closed forms that every result has."""
    return kind == "measure" and spec["measure"]["type"] != "closed_forms"

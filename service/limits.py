"""How much of the cluster a user may use, and their weight next to other users."""

from dataclasses import dataclass

MAX_LIMIT = 1000  # rows of a page
MAX_SWEEP_JOBS = 100_000  # of one sweep, where no setting says otherwise


@dataclass(frozen=True)
class Limits:
    """On a busy cluster, users' usage is in proportion to their weights. None is no limit.

    `max_queued_jobs` counts jobs that have not ended; `max_gpus` devices in use at once (on a cluster without GPUs,
    slots).
    """

    weight: float = 1.0
    max_queued_jobs: int | None = None
    max_gpus: float | None = None

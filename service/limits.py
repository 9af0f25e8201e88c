"""What a user may use, and how much of it next to others."""

from dataclasses import dataclass

MAX_LIMIT = 1000  # rows of a page
MAX_SWEEP_JOBS = 100_000  # of one sweep, where no setting says otherwise


@dataclass(frozen=True)
class Limits:
    """Two users' shares of a busy cluster are as their weights. None is no limit.

    `max_queued_jobs` counts jobs that have not ended; `max_gpus` devices in use at once (on a cluster without GPUs,
    places to run).
    """

    weight: float = 1.0
    max_queued_jobs: int | None = None
    max_gpus: float | None = None

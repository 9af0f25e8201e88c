"""The client for scripts, notebooks and the commands: requests, answers, and tables and bars for the terminal."""

from api.client.client import SWEEP_FIELDS, Client, Event
from api.client.handles import ENDED, Job, Sweep
from api.client.transport import ApiError, Json, Unanswered, Unreachable

__all__ = [
    "ENDED",
    "SWEEP_FIELDS",
    "ApiError",
    "Client",
    "Event",
    "Job",
    "Json",
    "Sweep",
    "Unanswered",
    "Unreachable",
]

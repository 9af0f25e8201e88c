"""Logs of the processes of the service: lines for people, or one JSON object per line for a collector."""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

LogFormat = Literal["plain", "json"]


class Rate(NamedTuple):
    """Lines of one logger: `burst` at once, then so many a second."""

    burst: int
    per_second: float


OURS, OTHERS = Rate(1000, 20.0), Rate(50, 1.0)
MAX_CHARACTERS = 8000  # of a message, and of a traceback


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, and `traceback` if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(line)


@dataclass
class _Bucket:
    """Lines that may be written at once; `left_out` counts those that were not."""

    lines: float
    at: float
    left_out: int = 0


class Bounded(logging.Filter):
    """Keeps a flood of lines from filling the disk of the database: limits the lines of each logger, and each line.

    Of each logger a number of lines passes at once, and then some each second; the next one that passes says how many
    were left out. What is longer than `MAX_CHARACTERS` is cut.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        rate = OURS if record.name.split(".")[0] == "uncanny" else OTHERS
        now = self._clock()
        bucket = self._buckets.setdefault(record.name, _Bucket(rate.burst, now))
        bucket.lines = min(rate.burst, bucket.lines + (now - bucket.at) * rate.per_second)
        bucket.at = now
        if bucket.lines < 1:
            bucket.left_out += 1
            return False
        bucket.lines -= 1
        message = _cut(record.getMessage())
        if bucket.left_out:
            message += f" ({bucket.left_out:,} lines before this one were left out)"
            bucket.left_out = 0
        record.msg, record.args = message, None
        if record.exc_info:
            record.exc_text = _cut(logging.Formatter().formatException(record.exc_info))
        return True


def _cut(text: str) -> str:
    """The beginning and the end of a text that is too long: both are useful in a traceback."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]} ... {len(text) - 2 * half:,} characters ... {text[-half:]}"


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Send this process's logs to standard error. Other libraries log warnings and errors only."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else plain)
    handler.addFilter(Bounded())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("uncanny").setLevel(level)

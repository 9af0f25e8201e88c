"""Times as they are shown and queried: to the millisecond, in UTC.

The store keeps seconds since 1970 as float64, which is finer. One rule rounds them, so that JSON, CSV, NDJSON and
Parquet show one time, and a question for the shown time finds its row.
"""

import math
from datetime import UTC, date, datetime, timedelta

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY_MILLISECONDS = 86_400_000


def milliseconds(seconds: float) -> int:
    """Seconds since 1970 as whole milliseconds, the nearest; half of one goes up."""
    return math.floor(1000 * seconds + 0.5)


def iso(seconds: float | None) -> str | None:
    """Seconds since 1970 as ISO 8601 in UTC.

    >>> iso(1769860800.0006)
    '2026-01-31T12:00:00.001Z'
    """
    if seconds is None:
        return None
    shown = EPOCH + timedelta(milliseconds=milliseconds(seconds))
    return shown.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def seconds_of(text: str) -> float:
    """A time in ISO 8601 as seconds since 1970; UTC if it has no zone. Raises `ValueError`, `OverflowError`."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def span(text: str) -> tuple[float, float]:
    """The stored seconds that a text in ISO 8601 stands for, `from <= seconds < to`: a day, or a millisecond.

    Raises `ValueError`, `OverflowError` if the text is no time.
    """
    first = milliseconds(seconds_of(text))
    return _least(first), _least(first + (DAY_MILLISECONDS if _is_a_day(text) else 1))


def _is_a_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _least(shown: int) -> float:
    """The least number of seconds that is shown as that many milliseconds."""
    seconds = (shown - 0.5) / 1000
    while milliseconds(seconds) >= shown:
        seconds = math.nextafter(seconds, -math.inf)
    while milliseconds(seconds) < shown:
        seconds = math.nextafter(seconds, math.inf)
    return seconds

"""A sweep whose tasks fail at once, one after the other, is paused before all of them have used up their retries."""

from collections.abc import Callable, Sequence

from service.model.environment import QUICK_SECONDS
from service.store import Connection, Database, changing

MOST_IN_A_ROW = 8  # attempts of a sweep's tasks

Ended = tuple[str, str | None]
"""`(task id, how it failed at once)`, or `(task id, None)` if it succeeded."""


def pause_failing(
    database: Database,
    actor: str,
    still_leads: Callable[[Connection], bool],
    ended: Sequence[Ended],
    in_a_row: dict[str, int],
) -> None:
    """Count each sweep's quick failures `in_a_row`, and pause those that have too many."""
    if not in_a_row and all(why is None for _, why in ended):
        return
    with database.write() as connection:
        if not still_leads(connection):
            return
        sweeps_of: dict[str, list[str]] = {}
        for task_id, sweep_id in changing.going_on(connection, [task_id for task_id, _ in ended]):
            sweeps_of.setdefault(task_id, []).append(sweep_id)
        for task_id, why in ended:
            for sweep_id in sweeps_of.get(task_id, ()):
                in_a_row[sweep_id] = in_a_row.get(sweep_id, 0) + 1 if why is not None else 0
                if why is not None and in_a_row[sweep_id] >= MOST_IN_A_ROW:
                    _pause(database, connection, actor, sweep_id, in_a_row[sweep_id], why)
        for sweep_id in [sweep_id for sweep_id, count in in_a_row.items() if count == 0 or count >= MOST_IN_A_ROW]:
            del in_a_row[sweep_id]


def _pause(database: Database, connection: Connection, actor: str, sweep_id: str, count: int, why: str) -> None:
    reason = (
        f"{count} attempts in a row ended within {QUICK_SECONDS:g} s of their start, the last: {why}; "
        f"`uncanny resume {sweep_id}` lets it go on"
    )
    changing.pause_sweep(connection, database.now(connection), actor, sweep_id, paused=True, reason=reason)

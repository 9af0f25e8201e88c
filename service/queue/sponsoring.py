"""Whose quota a shared task counts against while it waits: the user's whose turn comes first, of those who need it.

Else a task that a user with a large share needs too would wait for the turn of another who has used up theirs, or who
may use nothing. What runs stays with its sponsor.
"""

from collections.abc import Callable

from service.model import scheduling
from service.model.scheduling import Cluster
from service.settings import Settings
from service.store import Connection, Database, claiming, quotas

MOST = 512  # tasks that change their sponsor in one transaction


def pass_on(database: Database, settings: Settings, cluster: Cluster, leads: Callable[[Connection], bool]) -> int:
    """Give waiting tasks to the users whose turn is first, while the caller `leads`; returns how many."""
    with database.read() as connection:
        if not claiming.any_shared(connection):
            return 0
        now, names = database.now(connection), quotas.with_unfinished_jobs(connection)
        accounts = quotas.accounts(connection, now, names, settings.usage_half_life_seconds, settings.limits)
        turns = scheduling.turns(accounts, cluster)
        late = claiming.sponsored_too_late(connection, turns, MOST)
    if not late:
        return 0
    with database.write() as connection:
        if not leads(connection):
            return 0
        claiming.change_sponsors(connection, database.now(connection), late, turns)
    return len(late)

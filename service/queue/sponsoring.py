"""A waiting task that jobs of several users need is sponsored by the one of them whose turn comes first.

Otherwise the task could wait for the turn of a user who has used up their quota, although a job of another user with
quota left needs it. A running task keeps its sponsor.
"""

from collections.abc import Callable

from service.model import scheduling
from service.model.scheduling import Cluster
from service.settings import Settings
from service.store import Connection, Database, claiming, quotas

MOST = 512  # tasks that change their sponsor in one transaction


def pass_on(database: Database, settings: Settings, cluster: Cluster, leads: Callable[[Connection], bool]) -> int:
    """Give waiting tasks the sponsors whose turn is first, while the caller `leads`. Returns how many tasks change."""
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

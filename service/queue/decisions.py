"""The decision log: what the scheduler saw at each claim, packed, and that the same comes out of it again."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from service.model.json import JsonObject
from service.model.scheduling import RULE, Account, Cluster, Decision, Waiting, choose
from service.store import Database, deciding

Seen = tuple[list[Waiting], dict[str, Account], Cluster, float]
"""What `scheduling.choose` is a function of."""


def packed(queue: Sequence[Waiting], accounts: Mapping[str, Account], cluster: Cluster, now: float) -> bytes:
    """The arguments of `scheduling.choose` as bytes, exactly: JSON repeats a float64 to the last bit."""
    known = {name: _values(account) for name, account in accounts.items()}
    seen = [[_values(task) for task in queue], known, _values(cluster), now, RULE]
    return zlib.compress(json.dumps(seen, separators=(",", ":")).encode(), level=1)


def _values(of: Waiting | Account | Cluster) -> list[Any]:
    """Its fields in order; unlike `astuple`, nothing is copied: this is done hundreds of times a claim."""
    return [*vars(of).values()]


def unpacked(seen: bytes) -> Seen | None:
    """The same again; None where another rule than this version's decided."""
    queue, known, cluster, now, *rule = json.loads(zlib.decompress(seen))
    if rule != [RULE]:
        return None
    accounts = {name: Account(*values) for name, values in known.items()}
    return [Waiting(*values) for values in queue], accounts, Cluster(*cluster), now


def told(decisions: Sequence[Decision]) -> list[JsonObject]:
    """Decisions as they are stored."""
    return [
        {"task_ids": list(one.task_ids), "sponsor": one.sponsor, "share": one.share, "reason": one.reason}
        for one in decisions
    ]


def replay(database: Database) -> tuple[int, list[int]]:
    """Decide everything in the log again: `(how many claims it has, the ids of those that come out otherwise)`.

    Claims that another version decided by its own rule are left out.
    """
    with database.read() as connection:
        rows = [(row, unpacked(row.seen)) for row in deciding.recorded(connection)]
    ours = [(row, seen) for row, seen in rows if seen is not None]
    return len(ours), [row.id for row, seen in ours if told(choose(*seen)) != row.decided]

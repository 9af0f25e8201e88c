"""The decision log: what the scheduler saw at each claim, packed, and a replay that must decide the same."""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from service.model.json import JsonObject
from service.model.scheduling import RULE, Account, Cluster, Decision, Waiting, choose
from service.store import Database, deciding

Seen = tuple[list[Waiting], dict[str, Account], Cluster, float]
"""The arguments of `scheduling.choose`."""


def packed(queue: Sequence[Waiting], accounts: Mapping[str, Account], cluster: Cluster, now: float) -> bytes:
    """The arguments of `scheduling.choose` as bytes, exactly: JSON repeats a float64 to the last bit."""
    packed_accounts = {name: _values(account) for name, account in accounts.items()}
    seen = [[_values(task) for task in queue], packed_accounts, _values(cluster), now, RULE]
    return zlib.compress(json.dumps(seen, separators=(",", ":")).encode(), level=1)


def _values(value: Waiting | Account | Cluster) -> list[Any]:  # Any: fields of several types
    """The fields in order. `astuple` would copy them too, which is slow for the hundreds of values of a claim."""
    return [*vars(value).values()]


def unpacked(seen: bytes) -> Seen | None:
    """The arguments that `packed` made these bytes of; None if another rule than this version's decided."""
    queue, packed_accounts, cluster, now, *rule = json.loads(zlib.decompress(seen))
    if rule != [RULE]:
        return None
    accounts = {name: Account(*values) for name, values in packed_accounts.items()}
    return [Waiting(*values) for values in queue], accounts, Cluster(*cluster), now


def told(decisions: Sequence[Decision]) -> list[JsonObject]:
    """Decisions as they are stored."""
    return [
        {
            "task_ids": list(decision.task_ids),
            "sponsor": decision.sponsor,
            "share": decision.share,
            "reason": decision.reason,
        }
        for decision in decisions
    ]


def replay(database: Database) -> tuple[int, list[int]]:
    """Decide all claims in the log again: `(their count, the ids of those that are decided differently)`.

    Claims that another version decided by its own rule are not counted.
    """
    with database.read() as connection:
        rows = [(row, unpacked(row.seen)) for row in deciding.recorded(connection)]
    ours = [(row, seen) for row, seen in rows if seen is not None]
    return len(ours), [row.id for row, seen in ours if told(choose(*seen)) != row.decided]

"""Row 12b: a cluster's day in virtual time: what its decisions cost, what its store is asked for, who gets what."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from service.model.executor import Bundle, Grant
from service.model.scheduling import Account
from service.operations.simulation import Load, Submission, nodes_with, simulate
from service.operations.what_if import STATED_SECONDS
from service.settings import Settings
from service.specs import Sweep

GRID: dict[str, list[Any]] = {"scale": [0.25, 0.5, 1, 2.5, 5, 10, 50], "attack": ["pgd_l2", "pgd_linf"]}
BASE = {"architecture": "resnet18", "dataset": "cifar10", "samples": 256}
TASKS_PER_NETWORK = 1 + 7 + 14 + 2  # training, measures, attacks, panels
NETWORK_SECONDS = sum(
    number * STATED_SECONDS[kind] for kind, number in zip(STATED_SECONDS, (1, 7, 14, 2), strict=True)
)  # of one GPU
WEIGHTS = (1.0, 2.0, 4.0)
MOST_IDLE = 0.01
DAY_SECONDS = 12 * 3600  # that the large one may take


@dataclass(frozen=True)
class Day:
    """A cluster, and users who keep it busy: each has submitted work in proportion to their weight."""

    gpus: int
    users: int
    tasks: int
    half_lives: int  # in the day

    @property
    def accounts(self) -> dict[str, Account]:
        return {f"user-{i:03}": Account(weight=WEIGHTS[i % len(WEIGHTS)]) for i in range(self.users)}

    @property
    def half_life_seconds(self) -> float:
        return self.tasks / TASKS_PER_NETWORK * NETWORK_SECONDS / self.gpus / self.half_lives

    def submissions(self) -> Iterator[Submission]:
        """The networks of all users have seeds of their own, so that no user's task is another's too."""
        networks, weights = self.tasks / TASKS_PER_NETWORK, sum(account.weight for account in self.accounts.values())
        first = 0
        for name, account in self.accounts.items():
            count = round(networks * account.weight / weights)
            grid = {"seed": list(range(first, first + count)), **GRID}
            yield Submission(0.0, name, Sweep(name=name, base=BASE, grid=grid).cells())
            first += count


SMALL = Day(gpus=40, users=10, tasks=5_000, half_lives=2)
LARGE = Day(gpus=1_000, users=100, tasks=1_000_000, half_lives=8)


def length(_: Bundle, grant: Grant) -> float:
    """Half to one and a half times the usual length, by the digest, so that GPUs do not march in step."""
    return STATED_SECONDS[grant.spec["kind"]] * (0.5 + int(grant.digest[:8], 16) / 0xFFFFFFFF)


@pytest.mark.timeout(DAY_SECONDS)
def test_a_clusters_day(table: Any, pytestconfig: pytest.Config) -> None:
    day = LARGE if pytestconfig.getoption("--benchmark-large") else SMALL
    settings = Settings(usage_half_life_seconds=day.half_life_seconds)
    load = Load(day.submissions(), day.accounts)
    report = simulate(load, nodes_with(day.gpus, 4 * day.gpus), length, settings)
    work = f"{report.tasks:,} tasks of {day.users} users on {day.gpus:,} GPUs, in virtual time, SQLite"
    times = {
        "a decision, median": report.decision_p50_ms,
        "a decision, 95 %": report.decision_p95_ms,
        "the longest decision": report.decision_max_ms,
        "a task, all that the dispatcher does": 1000 * report.seconds / report.tasks,
    }
    seconds = {name: [milliseconds / 1000] for name, milliseconds in times.items() if milliseconds is not None}
    table.tell("12b", work, seconds, share=0.5)
    for line in report.lines():
        table.write(line)
    waits = [user.longest_wait_seconds or 0.0 for user in report.users]
    table.write(f"Longest wait of a task by user: {min(waits):,.0f} to {max(waits):,.0f} s.")
    reached = "reached" if (report.idle_while_fits or 0.0) <= MOST_IDLE else "short"
    table.write(f"Idle while a queued task would have fit: goal <= {MOST_IDLE:.0%}, {reached}.")

"""Verdicts on jobs whose last task has ended, from the outcome bits and numbers that their tasks left."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple  # Any for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import Connection, Row, Table, bindparam, exists, select, update

from service.model.json import JsonObject
from service.model.verdict import VERSION, AttackBits, BitArray, Controls, Evidence, Verdict, chance_of, judge, unpack
from service.store.datasets import classes
from service.store.listed import listed
from service.store.retractions import retraction_of
from service.store.states import CURRENT, SOURCE_USED, WEIGHTS_USED
from service.store.tables import attack_results, attempts, control_results, jobs, outcome_bits, tasks

AT_ONCE = 200  # jobs whose bits are in memory together
COLUMNS = {name: f"verdict_{name}" for name in ("reasons", "checks", "counts", "version")}
NAMES = [field.name for field in fields(Verdict)]
WRITE_VERDICT = (
    update(jobs)
    .where(jobs.c.id == bindparam("judged"))
    .values({COLUMNS.get(name, name): bindparam(f"new_{name}") for name in NAMES})
)


class Judged(NamedTuple):
    """A job with the verdict on it."""

    job_id: str
    verdict: Verdict


class Outdated(NamedTuple):
    """A job with the verdict that another version of the rule gave."""

    job_id: str
    sequence: int
    verdict: str


def verdicts(connection: Connection, job_ids: Sequence[str]) -> list[Judged]:
    """The verdict on each of these jobs."""
    judged = []
    for start in range(0, len(job_ids), AT_ONCE):
        batch = listed(job_ids[start : start + AT_ONCE])
        rows = connection.execute(select(jobs).where(jobs.c.id.in_(batch)).order_by(jobs.c.sequence)).all()
        evidence = _Evidence(connection, rows)
        judged += [Judged(row.id, evidence.verdict(row)) for row in rows]
    return judged


def write_verdicts(connection: Connection, judged: Sequence[Judged]) -> None:
    """Store these verdicts with their jobs."""
    if not judged:
        return
    rows = [{"judged": job.job_id, **{f"new_{name}": getattr(job.verdict, name) for name in NAMES}} for job in judged]
    connection.execute(WRITE_VERDICT, rows)


def outdated(connection: Connection, after: int, limit: int) -> list[Outdated]:
    """Jobs that were judged by another version of the rule, in their order.

    Jobs whose bits are gone cannot be judged again, and keep their verdict.
    """
    of_another = jobs.c.verdict.is_not(None) & jobs.c.verdict_version.is_distinct_from(VERSION)
    for task_id in (jobs.c.attack_task_id, jobs.c.baseline_task_id):
        of_another &= exists().where(outcome_bits.c.task_id == task_id, outcome_bits.c.name == "robust")
    query = select(jobs.c.id, jobs.c.sequence, jobs.c.verdict).where(of_another, jobs.c.sequence > after)
    return [Outdated(*row) for row in connection.execute(query.order_by(jobs.c.sequence).limit(limit))]


class _Evidence:
    """What the tasks of some jobs left, read in a few queries for all of the jobs."""

    def __init__(self, connection: Connection, rows: Sequence[Row[Any]]) -> None:
        attacks = {task_id for row in rows for task_id in (row.attack_task_id, row.baseline_task_id)}
        controls = {row.control_task_id for row in rows if row.control_task_id is not None}
        self._bits: dict[str, dict[str, BitArray]] = defaultdict(dict)
        for row in connection.execute(
            select(outcome_bits).where(outcome_bits.c.task_id.in_(listed(attacks | controls)))
        ):
            self._bits[row.task_id][row.name] = unpack(row.n, row.packed)
        self._numbers = _numbers(connection, attack_results, attacks) | _numbers(connection, control_results, controls)
        self._classes = classes(connection, {row.dataset for row in rows})
        self._weights = _weights(connection, attacks | controls)
        self._retracted = retraction_of(connection, {row.baseline_task_id for row in rows})

    def verdict(self, row: Row[Any]) -> Verdict:
        # The panel ran at s = 1. At another scale its bits hold only if scaling changes no predicted class.
        holds = row.control_task_id is not None and (row.scale == 1 or row.spec["scale_bias"])
        holds = holds and self._of_one_network(row.attack_task_id, row.control_task_id)
        baseline = self._of_one_network(row.attack_task_id, row.baseline_task_id)
        # A retracted attack is hidden itself, and proves nothing about others.
        baseline = baseline and (
            row.baseline_task_id not in self._retracted or row.attack_task_id == row.baseline_task_id
        )
        majority_share = self._numbers[row.attack_task_id].get("majority_share")
        evidence = Evidence(
            row.attack,
            row.scale,
            chance_of(majority_share, self._classes[row.dataset]),
            at_scale=self._attack(row.attack_task_id),
            at_one=self._attack(row.baseline_task_id) if baseline else None,
            controls=self._controls(row.control_task_id) if holds else None,
            twin=self._twin(row.control_task_id, row.spec["attack"]) if holds else None,
        )
        return judge(evidence)

    def _of_one_network(self, attack: str, other: str) -> bool:
        """Whether no attempt reports that these two tasks used different weights, or different transfer sources."""
        pairs = zip(self._weights.get(attack, ()), self._weights.get(other, ()), strict=False)
        return all(first == second or None in (first, second) for first, second in pairs)

    def _twin(self, task_id: str, attack: Mapping[str, object]) -> BitArray | None:
        """The twin of plain PGD is the panel's PGD on the margin; another attack has a twin if its panel ran one."""
        bits = self._bits[task_id]
        plain = attack["type"] == "pgd" and not (attack["random_start"] or attack["targeted"])
        if plain and attack["restarts"] == 1 and attack["judge"] == "final":
            return bits["robust_margin"]
        return bits.get("robust_twin") if attack["type"] in ("pgd", "apgd") else None

    def _attack(self, task_id: str) -> AttackBits:
        bits, numbers = self._bits[task_id], self._numbers[task_id]
        outside = [numbers[name] for name in ("outside_ball", "outside_box") if numbers.get(name) is not None]
        return AttackBits(
            bits["clean_correct"],
            bits["robust"],
            bits.get("zero_gradient"),
            int(max(outside)) if outside else None,
            bits.get("non_finite"),
        )

    def _controls(self, task_id: str) -> Controls:
        bits = {name.removeprefix("robust_"): bits for name, bits in self._bits[task_id].items()}
        return Controls(bits, self._numbers[task_id])


def _numbers(connection: Connection, table: Table, task_ids: Iterable[str]) -> dict[str, JsonObject]:
    query = select(table.c.task_id, table.c.numbers).where(table.c.task_id.in_(listed(task_ids)))
    return {task_id: numbers for task_id, numbers in connection.execute(query)}


def _weights(connection: Connection, task_ids: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """The SHA-256 of the weights that each of these tasks used, and of a transfer's source, as far as it was noted."""
    query = select(tasks.c.id, WEIGHTS_USED, SOURCE_USED).join(attempts, CURRENT)
    rows = connection.execute(query.where(tasks.c.id.in_(listed(task_ids))))
    return {task_id: (weights, source) for task_id, weights, source in rows}

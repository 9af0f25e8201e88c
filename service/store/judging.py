"""Verdicts on jobs whose last task has landed, from the outcome bits and numbers that their tasks left."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, Table, select

from service.store.listed import listed
from service.store.tables import attack_results, control_results, jobs, outcome_bits
from service.verdict import AttackBits, BitArray, Controls, judge, unpack

AT_ONCE = 200  # jobs whose bits are in memory together
COLUMNS = {"reasons": "verdict_reasons", "checks": "verdict_checks", "version": "verdict_version"}


def verdicts(connection: Connection, job_ids: Sequence[str]) -> list[dict[str, Any]]:
    """The verdict on each of these jobs, as values of its columns in `jobs`, with its `id`."""
    found = []
    for start in range(0, len(job_ids), AT_ONCE):
        these = listed(job_ids[start : start + AT_ONCE])
        rows = connection.execute(select(jobs).where(jobs.c.id.in_(these)).order_by(jobs.c.sequence)).all()
        evidence = _Evidence(connection, rows)
        found += [{"id": row.id, **evidence.verdict(row)} for row in rows]
    return found


class _Evidence:
    """What the tasks of some jobs left, read at once."""

    def __init__(self, connection: Connection, rows: Sequence[Row[Any]]) -> None:
        attacks = {task_id for row in rows for task_id in (row.attack_task_id, row.baseline_task_id)}
        controls = {row.control_task_id for row in rows if row.control_task_id is not None}
        self._bits: dict[str, dict[str, BitArray]] = defaultdict(dict)
        for row in connection.execute(
            select(outcome_bits).where(outcome_bits.c.task_id.in_(listed(attacks | controls)))
        ):
            self._bits[row.task_id][row.name] = unpack(row.n, row.packed)
        self._numbers = _numbers(connection, attack_results, attacks) | _numbers(connection, control_results, controls)

    def verdict(self, row: Row[Any]) -> dict[str, Any]:
        # The panel ran at s = 1; elsewhere its bits hold only while no predicted class changes.
        holds = row.control_task_id is not None and (row.scale == 1 or row.spec["scale_bias"])
        controls = self._controls(row.control_task_id) if holds else None
        found = judge(row.scale, self._attack(row.attack_task_id), self._attack(row.baseline_task_id), controls)
        return {COLUMNS.get(name, name): value for name, value in asdict(found).items()}

    def _attack(self, task_id: str) -> AttackBits:
        bits, numbers = self._bits[task_id], self._numbers[task_id]
        outside = [numbers[name] for name in ("outside_ball", "outside_box") if numbers.get(name) is not None]
        return AttackBits(
            bits["clean_correct"], bits["robust"], bits.get("zero_gradient"), int(sum(outside)) if outside else None
        )

    def _controls(self, task_id: str) -> Controls:
        bits = {name.removeprefix("robust_"): bits for name, bits in self._bits[task_id].items()}
        return Controls(bits, self._numbers[task_id])


def _numbers(connection: Connection, table: Table, task_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    query = select(table.c.task_id, table.c.numbers).where(table.c.task_id.in_(listed(task_ids)))
    return {task_id: numbers for task_id, numbers in connection.execute(query)}

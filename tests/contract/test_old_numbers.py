"""Numbers that an older version stored and that mean nothing: an upgrade takes them out."""

import importlib
import io
from typing import Any

import numpy as np
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from service.model.executor import Bits, Succeeded
from service.store import tables


@pytest.mark.parametrize(("classes", "left"), [(5, None), (6, 1.0)])
def test_a_top5_accuracy_of_at_most_five_classes_is_none(lab: Any, classes: int, left: float | None) -> None:
    """It is always 1.0, and was stored for imported networks and for attacks."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((20, 8, 8, 1), np.uint8), y=np.arange(20) % classes)
    train, test = (str(lab.artifacts.write_chunks("dataset", [buffer.getvalue() + end]).digest) for end in (b"", b"."))
    lab.service.register_dataset("own", train, test, user="ann")
    for dataset in ("npz:own", "digits"):
        lab.submit(dataset=dataset, samples=10)
    old = {"train": {"test_top5_accuracy": 1.0}, "attack": {"robust_top5_accuracy": 1.0}}
    while grants := lab.grant():
        done = [(grant, lab.outcome(grant, **old.get(grant.spec["kind"], {}))) for grant in grants]
        for grant, outcome in done:
            if grant.spec["kind"] == "attack":
                outcome.bits["robust_top5"] = Bits(10, b"\xff\xc0")
        lab.record(*(Succeeded(grant.task_id, grant.attempt, outcome) for grant, outcome in done))
    migration = importlib.import_module("service.store.migrations.versions.0021_wrong_numbers")
    for _ in range(2):
        with lab.database.write() as connection, Operations.context(MigrationContext.configure(connection)):
            migration._fill()
        own = {row.id for row in lab.rows(tables.tasks, kind="train") if row.spec["dataset"]["name"] == "npz:own"}
        own |= {edge.child_id for edge in lab.rows(tables.task_edges) if edge.parent_id in own}
        for table, number in (
            (tables.trainings, "test_top5_accuracy"),
            (tables.attack_results, "robust_top5_accuracy"),
        ):
            found = {row.task_id in own: row.numbers[number] for row in lab.rows(table)}
            assert found == {True: left, False: 1.0}
        with_bits = {row.task_id in own for row in lab.rows(tables.outcome_bits, name="robust_top5")}
        assert with_bits == ({False} if left is None else {True, False})
    attack = next(row for row in lab.rows(tables.attack_results) if row.task_id in own)
    assert attack.numbers["outside_ball"] == 0, "other numbers stay"

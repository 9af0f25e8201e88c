"""What the store hands out has the columns of its table as fields, in their order: values are built by position."""

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from service.model import records
from service.store import tables

TABLES = {
    records.Job: tables.jobs,
    records.Sweep: tables.sweeps,
    records.Task: tables.tasks,
    records.Attempt: tables.attempts,
    records.User: tables.users,
    records.Token: tables.tokens,
    records.RegisteredDataset: tables.datasets,
    records.RegisteredCheckpoint: tables.checkpoints,
    records.Lease: tables.leases,
    records.Queue: tables.queues,
    records.Decision: tables.decisions,
}


@pytest.mark.parametrize("record", TABLES, ids=lambda record: record.__name__)
def test_a_record_has_the_columns_of_its_table(record: Any) -> None:
    columns = TABLES[record].columns
    assert [field.name for field in fields(record)] == [column.name for column in columns]
    optional = {field.name for field in fields(record) if "None" in str(field.type)}
    assert optional == {column.name for column in columns if column.nullable}


@pytest.mark.parametrize("record", TABLES, ids=lambda record: record.__name__)
def test_a_record_is_frozen_and_is_printed_in_a_few_words(record: Any) -> None:
    value = record(*(f"<{field.name}>" for field in fields(record)))
    with pytest.raises(FrozenInstanceError):
        setattr(value, fields(record)[0].name, "other")
    assert len(str(value)) < 80
    assert "sha256" not in repr(value) or record is not records.Token


def test_a_job_is_printed_with_its_id_and_state() -> None:
    job: Any = records.Job
    assert str(job(*(field.name for field in fields(job)))) == "job id (state)"

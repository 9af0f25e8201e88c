"""The rows of a lab's own data sets, and how many classes and test images each data set has."""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Column, Connection, insert, select

from service.model.names import OWN_DATASET
from service.model.records import RegisteredDataset
from service.specs import catalog
from service.store.listed import listed
from service.store.tables import datasets
from service.store.values import every, one


def named(connection: Connection, name: str) -> RegisteredDataset | None:
    """The data set of that name, with or without `npz:`."""
    query = select(datasets).where(datasets.c.name == name.removeprefix(OWN_DATASET))
    return one(connection, RegisteredDataset, query)


def registered(connection: Connection) -> list[RegisteredDataset]:
    """All of them, by name."""
    return every(connection, RegisteredDataset, select(datasets).order_by(datasets.c.name))


def some_names(connection: Connection) -> list[str]:
    """The names of at most twenty, as jobs write them."""
    return [OWN_DATASET + name for name in connection.scalars(select(datasets.c.name).limit(20))]


def register(connection: Connection, values: Mapping[str, Any]) -> None:  # Any: each has the type of its column
    connection.execute(insert(datasets).values(values))


def classes(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """How many classes these data sets have, and all of the catalogue; unknown names are left out."""
    catalogued = {name: dataset.classes for name, dataset in catalog.DATASETS.items()}
    return _sizes(connection, names, catalogued, datasets.c.classes)


def test_samples(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """How many test images these data sets have, and all of the catalogue; unknown names are left out."""
    catalogued = {name: dataset.test for name, dataset in catalog.DATASETS.items()}
    return _sizes(connection, names, catalogued, datasets.c.test_count)


def _sizes(
    connection: Connection, names: Iterable[str], catalogued: dict[str, int], own: Column[int]
) -> dict[str, int]:
    of_lab = [name.removeprefix(OWN_DATASET) for name in names if name not in catalogued]
    query = select(datasets.c.name, own).where(datasets.c.name.in_(listed(of_lab)))
    return catalogued | ({OWN_DATASET + name: size for name, size in connection.execute(query)} if of_lab else {})

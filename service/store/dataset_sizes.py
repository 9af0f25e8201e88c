"""How many images and classes data sets have: the known ones by the catalogue, a lab's own by their rows."""

from collections.abc import Iterable

from sqlalchemy import Column, Connection, select

from service.specs import catalog
from service.store.listed import listed
from service.store.tables import datasets

OWN_DATASET = "npz:"


def classes(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """How many classes each of these data sets has, as far as they are there."""
    known = {name: dataset.classes for name, dataset in catalog.DATASETS.items()}
    return _sizes(connection, names, known, datasets.c.classes)


def test_samples(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """How many test images each of these data sets has, as far as they are there."""
    known = {name: dataset.test for name, dataset in catalog.DATASETS.items()}
    return _sizes(connection, names, known, datasets.c.test_count)


def _sizes(connection: Connection, names: Iterable[str], known: dict[str, int], own: Column[int]) -> dict[str, int]:
    of_lab = [name.removeprefix(OWN_DATASET) for name in names if name not in known]
    query = select(datasets.c.name, own).where(datasets.c.name.in_(listed(of_lab)))
    return known | ({OWN_DATASET + name: size for name, size in connection.execute(query)} if of_lab else {})

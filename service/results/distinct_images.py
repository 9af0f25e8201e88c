"""How many distinct images a group's accuracy rests on: an image that three networks saw counts once."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

from service.model.observations import FRACTIONS
from service.store import Connection, aggregating
from service.store.datasets import test_samples
from service.store.fields import Column
from service.store.result_tables import cells

Key = tuple[object, ...]
Counts = dict[tuple[Key, str], int | None]


class DistinctImages:
    """Counts for the results that `where` chooses, in groups. `key_of(cell_id, values of own)` is a group's key."""

    def __init__(
        self,
        connection: Connection,
        where: Sequence[Column],
        own: Sequence[Column],
        key_of: Callable[[int, Sequence[object]], Key],
    ) -> None:
        self._connection, self._where, self._own, self._key_of = connection, where, own, key_of
        self._samples: dict[int, tuple[str, int]] = {}  # data set and samples by cell
        self._correct: dict[str, Counts] = {}  # by the fraction's name, then by group and data set

    def look_up(self, cell_ids: Collection[int]) -> None:
        """Read the data sets and samples of these cells: `count` knows only cells that were looked up."""
        self._samples = aggregating.of_cells(self._connection, cell_ids, [cells.c.dataset, cells.c.samples])

    def count(self, fraction: str, column: Column, key: Key, cell_ids: Collection[int]) -> int | None:
        """The least number of distinct images behind this fraction of a group; None if a result does not tell.

        Samples of one data set are always its first images, so the largest sample counts. Of the images that the
        networks get right, those of the best network count: those of the others may be among them.
        """
        most: dict[str, int] = defaultdict(int)
        for dataset, samples in (self._samples[cell_id] for cell_id in cell_ids):
            most[dataset] = max(most[dataset], samples)
        counts: list[int | None]
        match FRACTIONS[fraction]:
            case "samples":
                counts = [*most.values()]
            case "test_samples":
                sizes = test_samples(self._connection, most)
                counts = [sizes.get(dataset) for dataset in most]
            case "n_clean_correct":
                correct = self._clean_correct(fraction, column)
                counts = [correct[key, dataset] for dataset in most if (key, dataset) in correct]
            case unknown:
                assert_never(unknown)
        counted = [count for count in counts if count is not None]
        return sum(counted) if len(counted) == len(counts) else None

    def _clean_correct(self, fraction: str, column: Column) -> Counts:
        """The most images that a network of each group gets right without an attack, read once for all groups."""
        if fraction not in self._correct:
            counts = self._correct[fraction] = {}
            of_keys = aggregating.clean_correct(self._connection, self._where, self._own, column)
            for cell_id, own, (most, untold) in of_keys:
                group_and_dataset = self._key_of(cell_id, own), self._samples[cell_id][0]
                before = counts.get(group_and_dataset, 0)
                counts[group_and_dataset] = None if untold or before is None else max(before, most)
        return self._correct[fraction]

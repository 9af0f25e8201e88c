"""What a worker keeps while it lives: the artifact root, its device, and the networks and data that it has loaded."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from service.lab.artifacts import Artifacts
from workers.devices import BATCH_IMAGES

T = TypeVar("T")


class Cache:
    """Loaded values by key. Beyond `capacity_bytes`, the least recently used value is dropped first.

    The dictionary is copied on write, so an interrupt leaves the old one or the new one, never half of each.
    """

    def __init__(self, capacity_bytes: float = math.inf) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, load: Callable[[], tuple[T, int]]) -> T:
        """The value of the key. If it is not in the cache, `load` gives the value and its size in bytes."""
        entries = self._entries.copy()
        entry: tuple[T, int] = entries.pop(key) if key in entries else load()
        entries[key] = entry
        while len(entries) > 1 and sum(size for _, size in entries.values()) > self.capacity_bytes:
            entries.popitem(last=False)
        self._entries = entries
        return entry[0]

    def clear(self) -> None:
        self._entries = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self._entries.values())


@dataclass(frozen=True)
class Context:
    """Where a task runs. `device_share` is the part of the GPU, or the number of CPUs, that it may take.

    `node` is the executor's name of the machine. Attacks and closed forms take `batch_images` images at a time.
    """

    artifacts: Artifacts
    data_dir: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    device_share: float = 1.0
    epoch_state_seconds: float = 5.0
    cache: Cache = field(default_factory=Cache)
    node: str = ""
    batch_images: int = BATCH_IMAGES

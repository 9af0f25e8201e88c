"""What a type says less exactly than the test that asks knows."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

Key = TypeVar("Key")


def number(numbers: Mapping[Key, float | None], name: Key) -> float:
    """The number of this name, which a result may lack and this one has."""
    value = numbers[name]
    assert value is not None, name
    return value


def linear(model: nn.Module, place: int) -> nn.Linear:
    """The linear layer at this place of a sequential network."""
    assert isinstance(model, nn.Sequential)
    layer = model[place]
    assert isinstance(layer, nn.Linear)
    return layer

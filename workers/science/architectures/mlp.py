"""Two hidden layers with ReLU, n-256-128-k: the smallest network that learns digits."""

import math

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Images of any size; m = 128."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )

"""VGG-11 with batch norm (Simonyan, Zisserman 2015), pooled to 2x2, head 2048-256-256-k, as the predecessor's code."""

import torch
from torch import Tensor, nn


class PoolTo2x2(nn.Module):
    """`nn.AdaptiveAvgPool2d(2)`, whose gradient is not deterministic on a GPU, as four means."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, C, H, W]` -> `[n, C, 2, 2]`."""
        rows, columns = _halves(x.shape[2]), _halves(x.shape[3])
        means = [[x[:, :, top, left].mean((2, 3)) for left in columns] for top in rows]
        return torch.stack([torch.stack(row, dim=2) for row in means], dim=2)


def _halves(size: int) -> tuple[slice, slice]:
    return slice(0, (size + 1) // 2), slice(size // 2, size)


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Five max-pools, so images of 32x32 pixels and more. No dropout; phi is the last ReLU's output, m = 256."""
    from torchvision.models.vgg import (  # here: it takes a second to import, and a worker may never need it
        cfgs,
        make_layers,
    )

    convolutions: nn.Sequential = make_layers(cfgs["A"], batch_norm=True)
    if shape[0] != 3:
        convolutions[0] = nn.Conv2d(shape[0], 64, 3, padding=1)
    for module in convolutions:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return nn.Sequential(
        convolutions,
        PoolTo2x2(),
        nn.Flatten(),
        nn.Linear(2048, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )

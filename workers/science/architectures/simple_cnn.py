"""Three 3x3 convolutions (32, 64, 64) with batch norm and ReLU, head 256-128-k: trains on digits in seconds."""

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Images of 8x8 pixels and more; m = 128."""
    channels, height, width = shape
    h, w = height // 4, width // 4
    # What nn.AdaptiveAvgPool2d(2) does, whose gradient is not deterministic on a GPU.
    pool_to_2x2 = nn.AvgPool2d(((h + 1) // 2, (w + 1) // 2), stride=(h // 2, w // 2))
    return nn.Sequential(
        *_block(channels, 32),
        nn.MaxPool2d(2),
        *_block(32, 64),
        nn.MaxPool2d(2),
        *_block(64, 64),
        pool_to_2x2,
        nn.Flatten(),
        nn.Linear(4 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

"""Augmentation on the device: random crop, flip and rotation of a whole batch of bytes (README.md, "Training").

Random numbers are drawn on the CPU, so that equal seeds give equal crops on every device.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from workers.science.seeding import moved


@dataclass(frozen=True)
class Augmentation:
    """Crop of the image's size from the image padded with `crop_padding` black pixels; then a horizontal flip half the
    time; then a rotation uniform in +-`rotation_degrees` (nearest pixel, black corners), as torchvision's transforms.
    """

    crop_padding: int = 0
    flip: bool = False
    rotation_degrees: float = 0.0


_DEFAULTS = {
    "cifar10": Augmentation(4, flip=True),
    "cifar100": Augmentation(4, flip=True, rotation_degrees=15.0),
    "svhn": Augmentation(4),
    "fashion_mnist": Augmentation(2, flip=True),
    "mnist": Augmentation(2),
}


def default_augmentation(dataset: str) -> Augmentation:
    """What suits the data set; nothing for digits, generated images and a lab's own (a flip may change their class)."""
    return _DEFAULTS.get(dataset, Augmentation())


def augment(x: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """`x [n, C, H, W]` uint8 -> the same shape, dtype, device. Every image draws its own numbers from `generator`,
    which is on the CPU.
    """
    if how.crop_padding or how.flip:
        x = _crop_and_flip(x, how.crop_padding, how.flip, generator)
    if how.rotation_degrees:
        x = _rotate(x, how.rotation_degrees, generator)
    return x


def _crop_and_flip(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    n, channels, height, width = x.shape
    device = x.device
    top, left = moved(torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator), device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    if flip:
        mirrored = moved(torch.rand((n, 1), generator=generator), device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return pad(x, (padding,) * 4)[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _rotate(x: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    n, _, height, width = x.shape
    angle = (torch.rand(n, generator=generator) * 2 - 1) * math.radians(degrees)
    sin, cos, zero = angle.sin(), angle.cos(), torch.zeros_like(angle)
    # In affine_grid's coordinates both sides are 2 long, so an uneven image needs its aspect ratio.
    theta = torch.stack([cos, -sin * height / width, zero, sin * width / height, cos, zero], 1).reshape(n, 2, 3)
    grid = affine_grid(moved(theta, x.device), list(x.shape), align_corners=False)
    return grid_sample(x.float(), grid, mode="nearest", align_corners=False).to(torch.uint8)

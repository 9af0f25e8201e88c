"""Generated coloured gratings for tests: four orientations, in noise that leaves them learnable. No seed, no file."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from workers.science.datasets.image_data import ImageData

CLASSES = ("horizontal", "vertical", "rising", "falling")
SIDE = 16
N_TRAIN, N_TEST = 800, 400


def read(_folder: Path | None = None) -> ImageData:
    """800 + 400 colour images of 16x16 pixels in 4 balanced classes; the same bytes on every machine."""
    bits = np.random.Philox(key=20251014).random_raw((N_TRAIN + N_TEST) * (8 + 3 * SIDE * SIDE))
    numbers = (bits >> np.uint64(40)).astype(np.int64).reshape(N_TRAIN + N_TEST, -1)
    y = np.arange(N_TRAIN + N_TEST) % len(CLASSES)
    x = np.stack([_image(int(label), row) for label, row in zip(y, numbers, strict=True)])
    images, labels = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
    return ImageData("synthetic", images[:N_TRAIN], labels[:N_TRAIN], images[N_TRAIN:], labels[N_TRAIN:], CLASSES)


def _image(label: int, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
    """A square wave of period 4 to 7 along the class's direction, in two random colours, noise of +-40 (integers)."""
    row, column = np.indices((SIDE, SIDE))
    along = (row, column, row + column, row - column + SIDE)[label]
    period, phase = 4 + numbers[0] % 4, numbers[1] % 8
    wave = ((along + phase) * 2 // period) % 2
    dark, bright = 40 + numbers[2:5] % 50, 150 + numbers[5:8] % 60
    clean = np.where(wave[None] == 1, bright[:, None, None], dark[:, None, None])
    noise = numbers[8:].reshape(3, SIDE, SIDE) % 81 - 40
    return np.clip(clean + noise, 0, 255).astype(np.uint8)

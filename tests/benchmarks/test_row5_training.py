"""Row 5: an epoch of the paper's recipe (ResNet-18, batch 128, crop and flip) on a GPU, beside a plain DataLoader loop.

The loop does what the predecessor's code does: images one by one through torchvision, four workers, cuDNN's own choice
of algorithm. Torch's default is TF32 for convolutions and IEEE for matrix products: that is one reference, and IEEE for
both is another. Ours computes bit-equally (deterministic) with the data set and the augmentation on the GPU. What
accuracy the seconds buy is measured on CIFAR-10, after a short training with the same learning rates.
"""

import io
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from workers.science.architectures import build
from workers.science.datasets import ImageData
from workers.science.evaluation import evaluate_clean
from workers.science.seeding import deterministic
from workers.science.training import train

IMAGES, BATCH, WORKERS = 12_800, 128, 4
EPOCHS = 10  # of the trainings whose accuracy is measured
LR = 0.1
LOOPS: dict[str, Literal["tf32", "ieee"]] = {
    "DataLoader loop, TF32 convolutions": "tf32",
    "DataLoader loop, IEEE convolutions": "ieee",
}
OURS: dict[str, dict[str, Any]] = {
    "ours, float32": {},
    "ours, tf32": {"precision": "tf32"},
    "ours, bf16 + channels_last": {"precision": "bf16", "channels_last": True},
    "ours, bf16 + channels_last + compile": {"precision": "bf16", "channels_last": True, "compile": True},
    "ours, bf16 + channels_last + CUDA graphs": {
        "precision": "bf16",
        "channels_last": True,
        "compile": True,
        "cuda_graphs": True,
    },
}


def test_epoch_of_resnet18(table: Any, gpu: torch.device, shared_data: Path) -> None:
    epochs(table, gpu, "resnet18", cifar10(shared_data), IMAGES, EPOCHS, OURS)


def epochs(
    table: Any, device: torch.device, name: str, data: ImageData, images: int, n_epochs: int,
    ours: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Time an epoch of the first `images`; accuracies are those of `n_epochs` epochs of all of them."""
    calls: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    timed = ImageData(
        data.name, data.train_x[:images], data.train_y[:images], data.test_x[:100], data.test_y[:100], data.classes
    )

    def run(options: dict[str, Any]) -> Callable[[], object]:
        model = build(name, data.shape, data.n_classes, seed=0)
        return lambda: train(model, timed, epochs=1, batch_size=BATCH, device=device, **options)

    def note(accuracy: float) -> str:
        return f"{accuracy:.1%} of {len(data.test_y):,} test images after {n_epochs} epochs"

    for who, precision in LOOPS.items():
        whole = PlainLoop(name, data, device, precision)
        for epoch in range(n_epochs):
            whole.epoch(LR * (1 + math.cos(math.pi * epoch / n_epochs)) / 2)
        with deterministic(device):
            found = evaluate_clean(whole.model.eval(), data.test_x, data.test_y, device=device)
        notes[who] = note(found.accuracy)
        del whole  # and its four processes
        calls[who] = PlainLoop(name, timed, device, precision).epoch
    for who, options in ours.items():
        model = build(name, data.shape, data.n_classes, seed=0)
        done = train(model, data, epochs=n_epochs, lr=LR, batch_size=BATCH, device=device, **options)
        notes[who] = note(done.clean_accuracy)
        calls[who] = run(options)
    table.compare(
        "5",
        f"an epoch of {images:,} images, {name}, batch {BATCH}",
        calls,
        reference=next(iter(LOOPS)),
        goals={who: 5.0 for who in ours if "bf16" in who},
        notes=notes,
    )


def cifar10(folder: Path) -> ImageData:
    """49,925 training images and 2,000 test images."""
    x, y = [], []
    for part in (1, 2):
        with np.load(folder / f"cifar10_train_full_part{part}.npz") as file:
            packed, offsets = file["webp"], file["offsets"]
            y.append(file["y"])
        for start, end in itertools.pairwise(offsets):
            x.append(np.asarray(Image.open(io.BytesIO(packed[start:end].tobytes())).convert("RGB")))
    with np.load(folder / "cifar10_test2000.npz") as file:
        test_x, test_y = file["x"], file["y"]
    images = [torch.from_numpy(of).permute(0, 3, 1, 2).contiguous() for of in (np.stack(x), test_x)]
    labels = [torch.from_numpy(of) for of in (np.concatenate(y), test_y)]
    return ImageData("cifar10", images[0], labels[0], images[1], labels[1], tuple(map(str, range(10))))


@contextmanager
def convolutions(precision: Literal["tf32", "ieee"]) -> Iterator[None]:
    """Matrix products stay as torch has them: IEEE."""
    cudnn: Any = torch.backends.cudnn  # whose `conv` torch declares nowhere
    conv = cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


class Images(Dataset[tuple[Any, int]]):
    """Image by image through torchvision's transforms."""

    def __init__(self, data: ImageData) -> None:
        self.x, self.y = data.train_x, data.train_y.tolist()
        self.change = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.change(self.x[i]), self.y[i]


class PlainLoop:
    """A network and the loop that trains it, epoch by epoch."""

    def __init__(self, name: str, data: ImageData, device: torch.device, precision: Literal["tf32", "ieee"]) -> None:
        self.model = build(name, data.shape, data.n_classes, seed=0).to(device)
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=1e-4)
        self.criterion = nn.CrossEntropyLoss()
        self.loader = DataLoader(
            Images(data), batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True,
            pin_memory=device.type == "cuda",
        )  # fmt: skip

    def epoch(self, lr: float = LR) -> float:
        self.model.train()
        self.optimizer.param_groups[0]["lr"] = lr
        total = 0.0
        with convolutions(self.precision):
            for x, y in self.loader:
                x, y = x.to(self.device), y.to(self.device)
                self.optimizer.zero_grad()
                loss = self.criterion(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                total += loss.item()
        return total

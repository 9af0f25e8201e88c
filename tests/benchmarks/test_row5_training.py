"""Row 5: an epoch of the paper's recipe (ResNet-18, batch 128, crop and flip) on a GPU, beside a plain DataLoader loop.

On made-up images of CIFAR-10's size: what is compared is the seconds, and the README says what accuracy they buy. The
loop does what the predecessor's code does: images one by one through torchvision, four workers, float32 with cuDNN's
own choice of algorithm. Ours computes bit-equally (deterministic) with the data set and the augmentation on the GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from workers.science.architectures import build
from workers.science.datasets import ImageData
from workers.science.training import train

IMAGES, BATCH, WORKERS = 12_800, 128, 4
OURS: dict[str, dict[str, Any]] = {
    "ours, float32": {},
    "ours, tf32": {"precision": "tf32"},
    "ours, bf16 + channels_last": {"precision": "bf16", "channels_last": True},
    "ours, bf16 + channels_last + compile": {"precision": "bf16", "channels_last": True, "compile": True},
}


def test_epoch_of_resnet18(table: Any, gpu: torch.device) -> None:
    epochs(table, gpu, "resnet18", IMAGES, OURS)


def epochs(table: Any, device: torch.device, name: str, images: int, ours: dict[str, dict[str, Any]]) -> None:
    data = made_up(images)

    def run(options: dict[str, Any]) -> Callable[[], object]:
        model = build(name, data.shape, data.n_classes, seed=0)
        return lambda: train(model, data, epochs=1, batch_size=BATCH, device=device, **options)

    calls: dict[str, Callable[[], object]] = {"DataLoader loop": plain_loop(name, data, device)}
    calls |= {who: run(options) for who, options in ours.items()}
    table.compare(
        "5",
        f"an epoch of {images:,} images, {name}, batch {BATCH}",
        calls,
        reference="DataLoader loop",
        goals={who: 5.0 for who in ours if "bf16" in who},
    )


def made_up(images: int) -> ImageData:
    random = np.random.RandomState(0)
    x = torch.from_numpy(random.randint(0, 256, (images + 100, 3, 32, 32), dtype=np.uint8))
    y = torch.from_numpy(random.randint(0, 10, images + 100))
    return ImageData("cifar10", x[:images], y[:images], x[images:], y[images:], tuple(map(str, range(10))))


class Images(Dataset[tuple[Any, int]]):
    """Image by image through torchvision's transforms."""

    def __init__(self, data: ImageData) -> None:
        self.x, self.y = data.train_x, data.train_y.tolist()
        self.change = transforms.Compose(
            [
                transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.change(self.x[i]), self.y[i]


def plain_loop(name: str, data: ImageData, device: torch.device) -> Callable[[], object]:
    model = build(name, data.shape, data.n_classes, seed=0).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    loader = DataLoader(
        Images(data), batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    def epoch() -> float:
        model.train()
        total = 0.0
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    return epoch

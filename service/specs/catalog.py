"""The architectures and data sets that jobs can name, as far as the service needs to know them without torch.

`workers/science` has the same facts beside the networks and files: `tests/contract/test_catalog.py` compares them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ArchitectureInfo:
    """A network that can be trained: the `m` features that enter its linear head, and a line for the catalogue.

    `min_side` is the least height and width of its images, which must be multiples of `multiple_of`.
    """

    features: int
    summary: str
    min_side: int = 1
    multiple_of: int = 1
    batch_norm: bool = True


@dataclass(frozen=True)
class DatasetInfo:
    """A known data set: the shape of an image (channels, height, width), its classes and its sizes."""

    shape: tuple[int, int, int]
    classes: int
    train: int
    test: int
    summary: str
    crop_padding: int = 0
    flip: bool = False
    rotation_degrees: float = 0.0


ARCHITECTURES: dict[str, ArchitectureInfo] = {
    "simple_cnn": ArchitectureInfo(128, "three small convolutions, for a laptop and for tests", 8),
    "mlp": ArchitectureInfo(128, "two hidden layers, for a laptop and for tests", batch_norm=False),
    "resnet18": ArchitectureInfo(512, "ResNet-18 with the CIFAR stem: 3x3 first convolution, no max-pool"),
    "resnet20": ArchitectureInfo(64, "ResNet-20 for CIFAR, 16 to 64 channels, shortcuts without parameters"),
    "wide_resnet28_4": ArchitectureInfo(256, "Wide ResNet-28-4, pre-activation, no dropout"),
    "densenet121": ArchitectureInfo(1024, "DenseNet-121 with its ImageNet stem", 29),
    "densenet121_cifar": ArchitectureInfo(1024, "DenseNet-121 with a 3x3 stem, no max-pool", 8),
    "vgg11_bn": ArchitectureInfo(256, "VGG-11 with batch norm, pooled to 2x2, head 2048-256-256-k", 32),
    "vit_tiny": ArchitectureInfo(192, "ViT-Ti with patches of 4x4 pixels (timm)", 4, 4, batch_norm=False),
    "resnet50d": ArchitectureInfo(2048, "ResNet-50-D (timm)"),
    "attention_resnet50d": ArchitectureInfo(2048, "ResNet-50-D with efficient channel attention in every block (timm)"),
}

DATASETS: dict[str, DatasetInfo] = {
    "digits": DatasetInfo((1, 8, 8), 10, 1_297, 500, "scikit-learn's bundled scans of handwritten digits"),
    "synthetic": DatasetInfo((3, 16, 16), 4, 800, 400, "generated patterns, for tests"),
    "cifar10": DatasetInfo((3, 32, 32), 10, 50_000, 10_000, "CIFAR-10", crop_padding=4, flip=True),
    "cifar100": DatasetInfo(
        (3, 32, 32), 100, 50_000, 10_000, "CIFAR-100", crop_padding=4, flip=True, rotation_degrees=15.0
    ),
    "svhn": DatasetInfo((3, 32, 32), 10, 73_257, 26_032, "Street View house numbers, cropped", crop_padding=4),
    "fashion_mnist": DatasetInfo((1, 28, 28), 10, 60_000, 10_000, "Fashion-MNIST", crop_padding=2, flip=True),
    "mnist": DatasetInfo((1, 28, 28), 10, 60_000, 10_000, "MNIST", crop_padding=2),
}

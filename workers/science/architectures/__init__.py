"""The networks that can be trained, by name (README.md, "Training"). A new one is a file and a line here."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from workers.science.architectures import (
    densenet,
    mlp,
    resnet18,
    resnet20,
    resnet50d,
    simple_cnn,
    vgg11_bn,
    vit_tiny,
    wide_resnet,
)
from workers.science.errors import WrongShape
from workers.science.seeding import seeded_initialisation

Shape = tuple[int, int, int]
"""(C, H, W) of one image."""


@dataclass(frozen=True)
class Architecture:
    """A network by name.

    build        `(shape, classes) -> nn.Module`, on the CPU, float32; it ends in its `nn.Linear`, gives logits `[n, k]`
    summary      one line for the catalogue
    features     m, the number of features that enter the head
    min_side     the smallest image height and width that the network can take
    multiple_of  height and width must be divisible by it
    """

    build: Callable[[Shape, int], nn.Module]
    summary: str
    features: int
    min_side: int = 1
    multiple_of: int = 1


# `service/specs/catalog.py` has these facts without torch: `tests/contract/test_catalog.py` compares them.
ARCHITECTURES: dict[str, Architecture] = {
    "simple_cnn": Architecture(simple_cnn.build, "three small convolutions, for a laptop and for tests", 128, 8),
    "mlp": Architecture(mlp.build, "two hidden layers, for a laptop and for tests", 128),
    "resnet18": Architecture(resnet18.build, "ResNet-18 with the CIFAR stem: 3x3 first convolution, no max-pool", 512),
    "resnet20": Architecture(
        resnet20.build, "ResNet-20 for CIFAR, 16 to 64 channels, shortcuts without parameters", 64
    ),
    "wide_resnet28_4": Architecture(wide_resnet.build, "Wide ResNet-28-4, pre-activation, no dropout", 256),
    "densenet121": Architecture(densenet.build, "DenseNet-121 with its ImageNet stem", 1024, 29),
    "densenet121_cifar": Architecture(densenet.build_cifar, "DenseNet-121 with a 3x3 stem, no max-pool", 1024, 8),
    "vgg11_bn": Architecture(vgg11_bn.build, "VGG-11 with batch norm, pooled to 2x2, head 2048-256-256-k", 256, 32),
    "vit_tiny": Architecture(vit_tiny.build, "ViT-Ti with patches of 4x4 pixels (timm)", 192, 4, 4),
    "resnet50d": Architecture(resnet50d.build, "ResNet-50-D (timm)", 2048),
    "attention_resnet50d": Architecture(
        resnet50d.build_attention, "ResNet-50-D with efficient channel attention in every block (timm)", 2048
    ),
}


def build(name: str, shape: Shape, classes: int, seed: int) -> nn.Module:
    """The network `name` for images of `shape` (C, H, W) and `classes` classes, initialised from `seed` on the CPU.

    Equal arguments give equal weights, and the process's random state stays as it is. The caller sets eval mode.
    Raises `KeyError` for an unknown name and `WrongShape` for images or classes that the network cannot take.
    """
    architecture = ARCHITECTURES[name]
    channels, height, width = shape
    if classes < 2 or channels < 1:
        raise WrongShape(f"{name}: {classes} classes and {channels} channels; give at least 2 and 1")
    if min(height, width) < architecture.min_side:
        raise WrongShape(
            f"{name} takes images of at least {architecture.min_side}x{architecture.min_side} pixels, these are "
            f"{height}x{width}: choose a smaller network, such as simple_cnn, or larger images"
        )
    if height % architecture.multiple_of or width % architecture.multiple_of:
        raise WrongShape(
            f"{name} takes images whose sides are multiples of {architecture.multiple_of}, these are {height}x{width}: "
            "choose another network or pad the images"
        )
    with seeded_initialisation(seed):
        return architecture.build(shape, classes)

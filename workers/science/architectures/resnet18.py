"""ResNet-18 (He et al. 2016) with the CIFAR stem: 3x3 first convolution of stride 1, no max-pool."""

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """11,173,962 parameters for 3 channels and 10 classes; m = 512."""
    from torchvision.models import resnet18  # here: it takes a second to import, and a worker may never need it

    model: nn.Module = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model

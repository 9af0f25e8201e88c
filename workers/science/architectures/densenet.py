"""DenseNet-121 (Huang et al. 2017) as torchvision builds it, with its own stem or one for small images."""

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The ImageNet stem (7x7, stride 2, max-pool), as the predecessor's code; 6,964,106 parameters at 3x32x32, k = 10.

    The images shrink by 32 on the way, with 1x1 features left of 32x32 images; m = 1024.
    """
    model = _densenet121(classes)
    if shape[0] != 3:
        _replace_stem(model, nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False))
    return model


def build_cifar(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A 3x3 convolution of stride 1 and no max-pool, as CIFAR networks have; m = 1024."""
    model = _densenet121(classes)
    _replace_stem(model, nn.Conv2d(shape[0], 64, 3, padding=1, bias=False))
    model.get_submodule("features").pool0 = nn.Identity()
    return model


def _densenet121(classes: int) -> nn.Module:
    from torchvision.models import densenet121  # here: it takes a second to import, and a worker may never need it

    model: nn.Module = densenet121(num_classes=classes)
    return model


def _replace_stem(model: nn.Module, stem: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(stem.weight)  # torchvision's initialisation of this network
    model.get_submodule("features").conv0 = stem

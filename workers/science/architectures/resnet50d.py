"""ResNet-50-D (He et al. 2019, "Bag of tricks") as timm builds it, without and with attention.

The attention is ECA (Wang et al. 2020), a channel gate in every block: the published `ecaresnet50d`. It is the smallest
change that puts attention into this network, 86 parameters, so that the two differ in nothing else.
"""

from torch import nn


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """23,547,754 parameters for 3 channels and 10 classes; timm's stem, which shrinks images by 4; m = 2048."""
    return _timm("resnet50d", shape, classes)


def build_attention(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """23,547,840 parameters for 3 channels and 10 classes; m = 2048."""
    return _timm("ecaresnet50d", shape, classes)


def _timm(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    import timm  # here: it takes a second to import, and a worker may never need it

    model: nn.Module = timm.create_model(name, in_chans=shape[0], num_classes=classes)
    return model

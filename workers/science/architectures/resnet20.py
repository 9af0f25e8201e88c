"""ResNet-20 for CIFAR (He et al. 2016, section 4.2): 16, 32 and 64 channels, three blocks of each."""

import itertools

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3x3 convolutions; where the size changes, the shortcut takes every second pixel and adds zero channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.new_channels = (1 if inputs == outputs else 2), outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, inputs, H, W]` -> `[n, outputs, H / stride, W / stride]`."""
        out = functional.relu(self.bn1(self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            half = self.new_channels // 2
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, half, half))
        return functional.relu(self.bn2(self.conv2(out)) + shortcut)


class MeanOverPixels(nn.Module):
    """Global average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, C, H, W]` -> `[n, C]`."""
        return x.mean((2, 3))


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """269,722 parameters for 3 channels and 10 classes; m = 64."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    stem = [nn.Conv2d(shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, MeanOverPixels(), nn.Linear(64, classes))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model

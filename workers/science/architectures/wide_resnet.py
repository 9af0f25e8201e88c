"""WRN-28-4 (Zagoruyko and Komodakis 2016): pre-activation, depth 28, widths 64, 128, 256, no dropout."""

from torch import Tensor, nn
from torch.nn.functional import relu

BLOCKS = 4  # per group: depth 28 = 6 * 4 + 4
WIDEN = 4


class Block(nn.Module):
    """BN-ReLU-conv twice, plus the shortcut; where the width changes, the shortcut too starts after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, inputs, H, W]` -> `[n, outputs, H / stride, W / stride]`."""
        active = relu(self.norm1(x))
        out: Tensor = self.conv2(relu(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Three groups of blocks of rising width, then the mean over pixels and the head."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        widths = [16, 16 * WIDEN, 32 * WIDEN, 64 * WIDEN]
        blocks: list[nn.Module] = []
        for group in range(3):
            inputs, outputs = widths[group], widths[group + 1]
            blocks.append(Block(inputs, outputs, stride=1 if group == 0 else 2))
            blocks.extend(Block(outputs, outputs, stride=1) for _ in range(BLOCKS - 1))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, C, H, W]` -> logits `[n, k]`."""
        out = relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(out.mean((2, 3)))
        return logits


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """5,849,050 parameters for 3 channels and 10 classes; m = 256."""
    return WideResNet(shape[0], classes)

"""Networks compiled by shape, so that the code of a batch, and its last bits, depend on nothing that ran before it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

LARGER = 4  # how many times as many images the next larger batch has that is compiled
SIZES = 3  # of batches: torch compiles a network eight times at most, for each size with and without gradients


def compiled(model: nn.Module, *, cuda_graphs: bool = False) -> nn.Module:
    """`model` compiled for each shape by itself; with `cuda_graphs`, a GPU runs the kernels of a pass as one graph.

    Earlier compilations of this process are dropped: torch compiles a class eight times, and silently leaves the ninth
    network uncompiled.
    """
    torch.compiler.reset()
    mode = "reduce-overhead" if cuda_graphs else None
    return torch.compile(model, dynamic=False, mode=mode)  # type: ignore[return-value]


class CompiledForBatches(nn.Module):
    """A network in eval mode, compiled for batches of `batch_size` images and of a fourth and a sixteenth of that.

    A batch of another size is padded with black images to the next size: attacks drop the images that they are done
    with, and each new size would be compiled. No image's logits depend on the others in its batch.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        super().__init__()
        self.body = compiled(model)
        self.sizes = sorted({max(batch_size // LARGER**i, 1) for i in range(SIZES)})
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, C, H, W]` -> logits `[n, k]`; more than `batch_size` images go in several batches."""
        most = self.sizes[-1]
        if len(x) > most:
            return torch.cat([self(part) for part in torch.split(x, most)])
        size = next(size for size in self.sizes if size >= len(x))
        black = (0, 0) * (x.dim() - 1) + (0, size - len(x))
        logits: Tensor = self.body(pad(x, black) if len(x) < size else x)
        return logits[: len(x)]

"""Faster forms of a network for taking gradients: stated options, part of a digest, checked against the network.

An attack may climb the prepared network; its examples are judged by the plain one in float32.
"""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from workers.science.compiling import CompiledForBatches
from workers.science.errors import NonFinite, ScienceError
from workers.science.heads import linear_head

PRECISIONS = ("float32", "bf16")
TOLERANCE = {"float32": 1e-3, "bf16": 0.25}
"""Largest difference allowed between prepared and plain logits, relative to the largest absolute plain logit."""


class _Prepared(nn.Module):
    def __init__(self, body: nn.Module, *, bf16: bool, channels_last: bool) -> None:
        super().__init__()
        self.body, self.bf16, self.channels_last = body, bf16, channels_last
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            logits: Tensor = self.body(x)
        return logits


class _Float32Head(nn.Linear):
    """The head stays in float32, so that equal bf16 features are the only loss."""

    def forward(self, phi: Tensor) -> Tensor:
        with torch.autocast(phi.device.type, enabled=False):
            return super().forward(phi.float())


def prepare(
    model: nn.Module,
    *,
    precision: str = "float32",
    channels_last: bool = False,
    fold_batch_norm: bool = False,
    compile: bool = False,
    batch_size: int = 256,
    probe: Tensor | None = None,
) -> nn.Module:
    """A copy of `model` that computes (almost) the same logits faster; `model` itself without any option.

    `precision` "bf16" runs all but the head under bf16 autocast; `fold_batch_norm` merges each batch norm that
    directly follows a convolution into it; `compile` compiles it for batches of up to `batch_size` images. With
    `probe [n, C, H, W]` the logits are compared, see `TOLERANCE`.
    Raises `ScienceError` if they differ, or if the network cannot be traced to find which layer follows which.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if precision == "float32" and not (channels_last or fold_batch_norm or compile):
        return model
    body = copy.deepcopy(model)
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    if fold_batch_norm:
        _fold_batch_norm(body)
    if channels_last:
        body = body.to(memory_format=torch.channels_last)
    if precision == "bf16":
        head = linear_head(body)
        head.__class__ = _Float32Head
        for layer in body.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer is not head:
                layer.to(torch.bfloat16)  # once, instead of by autocast in every forward pass
    prepared: nn.Module = _Prepared(body, bf16=precision == "bf16", channels_last=channels_last)
    if compile:
        prepared = CompiledForBatches(prepared, batch_size)
    if probe is not None:
        _compare(model, prepared, probe, TOLERANCE[precision])
    return prepared


def _fold_batch_norm(model: nn.Module) -> None:
    """In place. A plain batch norm is merged into a convolution that is used once, if nothing else reads its output."""
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        raise ScienceError(f"batch norm cannot be folded: the network cannot be traced ({error})") from error
    modules = dict(model.named_modules())
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or type(modules[str(node.target)]) is not nn.BatchNorm2d:
            continue
        before = node.args[0]
        if before.op != "call_module" or type(modules[str(before.target)]) is not nn.Conv2d or len(before.users) > 1:
            continue
        if calls.count(str(node.target)) > 1 or calls.count(str(before.target)) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        model.set_submodule(str(before.target), fuse_conv_bn_eval(conv, norm))
        model.set_submodule(str(node.target), nn.Identity())


@torch.no_grad()
def _compare(model: nn.Module, prepared: nn.Module, probe: Tensor, tolerance: float) -> None:
    plain = model(probe)
    finite = torch.isfinite(plain).all(1)  # images without finite logits compare nothing
    if not bool(finite.any()):
        raise NonFinite.of("a logit", ~finite)
    plain, fast = plain[finite], prepared(probe)[finite]
    difference = float((fast - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
    if not difference <= tolerance:
        raise ScienceError(f"the prepared network's logits differ by {difference:.2g} of the largest one")

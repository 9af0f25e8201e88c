"""The linear head of a network `f(x) = W phi(x) + b`: find it, look through it, scale it (README.md, "Scaling")."""

import copy

import torch
from torch import Tensor, nn

from workers.science.errors import NoLinearHead


def linear_head(model: nn.Module) -> nn.Linear:
    """The last `nn.Linear` of the network, whose input is phi and whose weight is the paper's penultimate layer.

    Raises `NoLinearHead` if there is none. `features_and_logits` checks that nothing follows it.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise NoLinearHead("no linear head: the network has no nn.Linear layer")
    return layers[-1]


def features_and_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """One forward pass: `phi [n, m]`, the input of the head, and the logits `z [n, k]`.

    Raises `NoLinearHead` if the network's output is not the head's output, as with a ReLU on the logits.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    handle = linear_head(model).register_forward_hook(lambda _layer, args, output: seen.append((args[0], output)))
    try:
        logits = model(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0][1] is not logits:
        raise NoLinearHead("no linear head: the network's output is not the output of its last nn.Linear layer")
    return seen[0][0], logits


def scale_head(model: nn.Module, scale: float, *, scale_bias: bool = True) -> nn.Module:
    """A copy of the network with `W <- s W` and, by default, `b <- s b`; the original stays as it is."""
    scaled = copy.deepcopy(model)
    head = linear_head(scaled)
    with torch.no_grad():
        head.weight.mul_(scale)
        if scale_bias and head.bias is not None:
            head.bias.mul_(scale)
    return scaled

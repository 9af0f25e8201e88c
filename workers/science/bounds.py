"""Upper bounds on the loss increase of an attack, and how often an attack breaks them (README.md, "Bounds").

With `r = ||phi(x)||`, `D_y = max_j ||w_j - w_y||`, `D = max_ij ||w_i - w_j||`, `log S = logsumexp_{j != y} z_j - z_y`
(the log odds of `cross_entropy`) and `||phi(xi) - phi(x)|| <= L d`:

    relayed           L^2 d^2 kappa / (2 r^2) + k m L^6 d^3 / (24 r^3)   as relayed from the paper: can be violated
    corrected Taylor  ||W^T (p - e_y)|| L d + L^2 d^2 relative_flatness / (2 r^2) + (D L d)^3 / (36 sqrt 3)
    certificate       softplus(D_y L d + log S) - softplus(log S)

Sources: arXiv 2510.14231 (relayed); derived for this project (the other two, never violated).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from workers.science.attacks.norms import geometry
from workers.science.closed_forms import Head, Softmax
from workers.science.cross_entropy import log_cost, log_odds, log_sigmoid, loss_increase, others, softplus
from workers.science.errors import NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.summaries import QUANTILES, Numbers, finite, label_of, mean, merged, quantile, summary
from workers.science.trajectory import Trajectory

# `service/specs/numbers/base.py` names numbers by these: `tests/contract/test_numbers.py` compares them.
BOUNDS = ("relayed_relative_sharpness", "relayed_relative_flatness", "corrected_taylor", "certificate")
GRAM_BYTES = 1 << 26
"""Of the matrices of a convolution whose eigenvalues are computed together: those of all frequencies are gigabytes."""
TINY = torch.finfo(torch.float64).tiny
"""Below it a float64 has fewer bits, and the increase and its bound are rounded apart."""


@dataclass(frozen=True)
class Anchor:
    """Of the clean images, all that the bounds need: `[n]` float64 each, `largest_distance = D` a number.

    `sharpness` and `flatness` are relative sharpness and relative flatness divided by `||phi||^2`, which phi = 0 has
    too; not logarithms. `slope = ||W^T (p - e_y)||`.
    """

    norm: Tensor
    sharpness: Tensor
    flatness: Tensor
    slope: Tensor
    label_distance: Tensor
    log_s: Tensor
    largest_distance: float
    classes: int
    features: int

    @classmethod
    def of(cls, phi: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> "Anchor":
        """From `phi [n, m]` and labels `y [n]` of the clean images, and the head `W [k, m]`, `b [k]` as attacked."""
        head = Head(weight, bias)
        z = head.logits(phi)
        softmax, log_s = Softmax.of(z), log_odds(z, y)
        pull = others(z, y).softmax(1) @ head.weight - head.weight[y]
        return cls(
            norm=torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64),
            sharpness=(softmax.log_trace + 2 * head.log_norm).exp(),
            flatness=softmax.log_weighted_spread(head).exp(),
            slope=log_sigmoid(log_s).exp() * pull.norm(dim=1),
            label_distance=head.squared_distances.sqrt().amax(1)[y],
            log_s=log_s,
            largest_distance=float(head.squared_distances.max().sqrt()),
            classes=weight.shape[0],
            features=weight.shape[1],
        )


@dataclass(frozen=True)
class Returned:
    """The way from each clean image to the example that the attack returned, by the plain network; on the CPU, of the
    finite examples.

    y `[n]` int64: label. phi `[n, m]` float32: features of the clean image. `[n]` float64: `feature_moved`
    `||phi(x_adv) - phi(x)||`, `l2` `||x_adv - x||` over C x H x W, `clean_log_odds` and `log_odds` against the label.
    """

    y: Tensor
    phi: Tensor
    feature_moved: Tensor
    l2: Tensor
    clean_log_odds: Tensor
    log_odds: Tensor


def relayed(at: Anchor, sharpness: Tensor, moved: Tensor, distance: Tensor) -> Tensor:
    """The bound as relayed from the paper, for `moved = L d` and `distance = d`, both `[..., n]`.

    `sharpness [n]` is `at.sharpness` or `at.flatness`. 0 if phi did not move, inf if it left 0.
    """
    lipschitz = torch.where(distance > 0, moved / distance, 0.0)
    ratio = torch.where(moved > 0, moved / at.norm * lipschitz, 0.0)
    return moved.square() * sharpness / 2 + at.classes * at.features * ratio**3 / 24


def corrected_taylor(at: Anchor, moved: Tensor) -> Tensor:
    """Second-order bound with its first-order term and a true remainder, for `moved [..., n] = L d`.

    >>> head = torch.eye(2), torch.zeros(2)
    >>> at = Anchor.of(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), *head)
    >>> bool(corrected_taylor(at, torch.tensor([1.0])) > certificate(at, torch.tensor([1.0])))
    True
    """
    third = (at.largest_distance * moved) ** 3 / (36 * math.sqrt(3))
    return at.slope * moved + moved.square() * at.flatness / 2 + third


def certificate(at: Anchor, moved: Tensor) -> Tensor:
    """The exact certificate, for `moved [..., n] = L d`: with two classes some phi attains it."""
    return log_cost(at.log_s, at.label_distance * moved).exp()


def radius(at: Anchor, e: float, lipschitz: float | Tensor) -> Tensor:
    """`[n]`: no image within this distance loses more than `e`, if `lipschitz` is an upper bound (else an estimate).

    In the norm of the Lipschitz constant, usually l2 over C x H x W. inf if nothing can raise the loss.

    >>> at = Anchor.of(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), torch.eye(2), torch.zeros(2))
    >>> round(float(certificate(at, radius(at, 0.1, 2.0) * 2.0)), 9)
    0.1
    """
    grown = torch.logaddexp(math.log(math.expm1(e)) - at.log_s, torch.full_like(at.log_s, e))
    return grown / (at.label_distance * lipschitz)


def bounds(at: Anchor, moved: Tensor, distance: Tensor) -> dict[str, Tensor]:
    """Every bound by name, `[..., n]`, with `L d` the realised `moved = ||phi(xi) - phi(x)||` and `distance = d`."""
    return {
        "relayed_relative_sharpness": relayed(at, at.sharpness, moved, distance),
        "relayed_relative_flatness": relayed(at, at.flatness, moved, distance),
        "corrected_taylor": corrected_taylor(at, moved),
        "certificate": certificate(at, moved),
    }


def violations(at: Anchor, moved: Tensor, distance: Tensor, increase: Tensor) -> dict[str, Tensor]:
    """`[..., n]` bool by bound: the loss `l` rose by `increase` and by more than the bound and
    1e-9 (min(l, 1) + |increase|).

    That is what logits that are 1e-9 wrong do to an increase: confident images, whose losses are far below 1e-9, are
    held to their bounds too. Never more than 1e-9 + 1e-9 |increase|.
    """
    allowed = TINY + 1e-9 * (softplus(at.log_s).clamp(max=1) + increase.abs())
    return {name: increase > bound + allowed for name, bound in bounds(at, moved, distance).items()}


def bound_numbers(trajectory: Trajectory, weight: Tensor, bias: Tensor | None) -> Numbers:
    """Of a path that starts at the clean image, with the head `weight [k, m]`, `bias [k]` as attacked.

    `bound_violated_{bound}`: the share of points whose loss rose by more than the bound (of the last two it must be
    0); the points are all iterates t >= 1 of all examples. `bound_n`: their number; `bound_n_examples`: that of the
    examples; `bound_violated_examples_{bound}`: the share of examples with any such point; `bound_{bound}_median`: of
    the bound at the last iterate. `lipschitz_path_{statistic}` and `lipschitz_path_max`;
    `estimated_radius_path_{e001 | e01 | log2 | logk}_{q}` with that largest one, in l2: L along the path is a lower
    estimate, so the radius is no certificate.
    """
    at = Anchor.of(trajectory.phi_0, trajectory.y, weight.cpu(), None if bias is None else bias.cpu())
    increase = loss_increase(trajectory.log_odds[0], trajectory.log_odds[1:])
    held = _held(at, trajectory.feature_moved[1:], trajectory.l2[1:], increase)
    return merged(held, _lipschitz_numbers(at, lipschitz_path(trajectory), "path"))


def returned_bound_numbers(returned: Returned, weight: Tensor, bias: Tensor | None) -> Numbers:
    """Of an attack without such a path: the `bound_` numbers of `bound_numbers`, where an example's one point is what
    the attack returned (`bound_n` equals `bound_n_examples`).

    `lipschitz_returned_...` and `estimated_radius_returned_...` are of L from the image to that point.
    """
    at = Anchor.of(returned.phi, returned.y, weight.cpu(), None if bias is None else bias.cpu())
    increase = loss_increase(returned.clean_log_odds, returned.log_odds)
    held = _held(at, returned.feature_moved[None], returned.l2[None], increase[None])
    went = returned.l2 > 0
    return merged(held, _lipschitz_numbers(at, returned.feature_moved[went] / returned.l2[went], "returned"))


def _held(at: Anchor, moved: Tensor, distance: Tensor, increase: Tensor) -> Numbers:
    """The `bound_` numbers of the points `[t, n]`."""
    numbers: Numbers = {"bound_n": increase.numel(), "bound_n_examples": increase.shape[1]}
    for name, broken in violations(at, moved, distance, increase).items():
        numbers[f"bound_violated_{name}"] = mean(broken)
        numbers[f"bound_violated_examples_{name}"] = mean(broken.any(0)) if broken.numel() else None
    for name, values in bounds(at, moved[-1:], distance[-1:]).items():
        numbers[f"bound_{name}_median"] = quantile(values, 0.5)
    return numbers


def _lipschitz_numbers(at: Anchor, lipschitz: Tensor, name: str) -> Numbers:
    """`lipschitz_{name}_{statistic}` and `_max` of `lipschitz [n]`; `estimated_radius_{name}_...` with the largest."""
    largest = quantile(lipschitz, 1.0)
    radii = radius_numbers(at, largest, f"estimated_radius_{name}") if largest else {}
    return merged(summary(lipschitz, f"lipschitz_{name}"), {f"lipschitz_{name}_max": largest}, radii)


def radius_numbers(at: Anchor, lipschitz: float | Tensor, name: str) -> Numbers:
    """`{name}_{e001 | e01 | log2 | logk}_{q}`: quantiles of `radius` for the four thresholds of the basin width."""
    thresholds = {"e001": 0.01, "e01": 0.1, "log2": math.log(2), "logk": math.log(at.classes)}
    return {
        f"{name}_{e}_{label_of(q)}": quantile(radius(at, value, lipschitz), q)
        for e, value in thresholds.items()
        for q in QUANTILES
    }


def lipschitz_path(trajectory: Trajectory) -> Tensor:
    """`[moved]`: largest `||phi(x_t) - phi(x_0)|| / ||x_t - x_0||_2` on the path of every example that moved.

    A lower estimate of a Lipschitz constant of phi, in units of phi per l2 of the image.
    """
    moved = trajectory.l2 > 0
    ratio = torch.where(moved, trajectory.feature_moved / trajectory.l2, 0.0)
    return ratio.amax(0)[moved.any(0)]


def lipschitz_jacobian(model: nn.Module, x: Tensor, *, seed: int = 0, iterations: int = 20) -> Tensor:
    """`[n]` float64: spectral norm of the Jacobian of phi at each of `x [n, C, H, W]`, by power iteration
    with products `J v` and `J^T u` of unit vectors, so that a Jacobian of any size that float32 holds has its norm.

    Local, and from below: neither a bound beyond x nor quite the norm at x. Raises `NonFinite`.
    """
    unit = geometry("l2").normalize
    start = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
    v = start.to(x).expand_as(x)  # of every image, so that the batch changes nothing
    size = x.new_zeros(len(x), dtype=torch.float64)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        phi = features_and_logits(model, x)[0]
        u = torch.zeros_like(phi, requires_grad=True)
        (back,) = torch.autograd.grad(phi, x, u, create_graph=True)  # J^T u, linear in u: its derivative along v is J v
    for _ in range(iterations):
        (forward,) = torch.autograd.grad(back, u, unit(v), retain_graph=True)
        size = torch.linalg.vector_norm(forward.flatten(1), dim=1, dtype=torch.float64)
        (v,) = torch.autograd.grad(phi, x, unit(forward), retain_graph=True)
    if not torch.isfinite(size).all():
        raise NonFinite("the Jacobian of the features is NaN or infinite")
    return size.detach()


def lipschitz_upper(model: nn.Module) -> float | None:
    """Upper bound of the Lipschitz constant of phi from image to features, l2 to l2, float64; loose.

    The product of the layers' spectral norms along the network's graph; branches that are added add, concatenated ones
    add in squares. Null if the network has a part that is not in `LIPSCHITZ`, such as attention, or no fixed graph.
    A convolution counts as one on the infinite plane, which bounds every zero padding and stride.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.diag(torch.tensor([3.0, -4.0])))
    >>> lipschitz_upper(net)
    4.0
    """
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, NotImplementedError):  # torch.fx raises each of these
        return None
    head = linear_head(model)
    bound: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        inputs = [bound.get(name) for name in node.all_input_nodes]
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "placeholder":
            bound[node] = 1.0 if not bound else None  # further inputs are options
        elif node.op == "call_module":
            module = model.get_submodule(node.target)
            if module is head:
                return None if inputs[0] is None else finite(inputs[0])
            rule = LIPSCHITZ.get(type(module).__name__)
            bound[node] = inputs[0] * rule(module) if rule is not None and inputs[0] is not None else None
        elif not inputs or None in inputs:
            bound[node] = None
        elif name in ("add", "iadd"):
            # all_input_nodes names x + x once
            bound[node] = sum(bound[a] for a in node.args if isinstance(a, fx.Node))
        elif name in ("cat", "concat"):
            bound[node] = math.hypot(*(bound[a] for a in node.args[0]))
        elif name in ("relu", "flatten", "mean") or (name == "adaptive_avg_pool2d" and node.args[1] in (1, (1, 1))):
            bound[node] = inputs[0]
        else:
            bound[node] = None
    return None


def _convolution(layer: nn.Conv2d) -> float:
    """Largest singular value over all frequencies. On a grid of N frequencies the largest is missed by no more than
    `cos(pi d / N)` per axis, d = (size - 1) / 2 (Duffin and Schaeffer 1938), which is divided out.
    """
    if layer.padding_mode != "zeros":
        return math.inf
    grid = [1 if size == 1 else max(16, 8 * size) for size in layer.kernel_size]
    missed = math.prod(math.cos(math.pi * (size - 1) / 2 / n) for size, n in zip(layer.kernel_size, grid, strict=True))
    largest: list[Tensor] = []
    for kernel in layer.weight.detach().double().chunk(layer.groups):
        matrices = torch.fft.rfft2(kernel, s=grid).permute(2, 3, 0, 1).flatten(0, 1)
        together = max(1, GRAM_BYTES // (min(matrices.shape[1:]) ** 2 * matrices.element_size()))
        for batch in matrices.split(together):
            gram = batch @ batch.mH if batch.shape[1] <= batch.shape[2] else batch.mH @ batch
            largest.append(torch.linalg.eigvalsh(gram).amax())
    return math.sqrt(float(torch.stack(largest).max())) / missed


def _overlap(layer: nn.MaxPool2d | nn.AvgPool2d) -> float:
    """Square root of the number of windows that share a pixel."""
    size, stride = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
    return math.sqrt(math.prod(math.ceil(a / b) for a, b in zip(size, stride, strict=True)))


LIPSCHITZ: dict[str, Callable[[Any], float]] = {
    "Linear": lambda layer: float(torch.linalg.matrix_norm(layer.weight.detach().double(), ord=2)),
    "Conv2d": _convolution,
    "BatchNorm2d": lambda layer: float(
        (layer.weight.detach().double() / (layer.running_var.double() + layer.eps).sqrt()).abs().max()
    ),
    "ReLU": lambda _: 1.0,
    "Tanh": lambda _: 1.0,
    "GELU": lambda _: 1.13,
    "Identity": lambda _: 1.0,
    "Dropout": lambda _: 1.0,
    "Flatten": lambda _: 1.0,
    "MaxPool2d": _overlap,
    "AvgPool2d": _overlap,
    "AdaptiveAvgPool2d": lambda layer: 1.0 if layer.output_size in (1, (1, 1)) else 2.0,
    "PoolTo2x2": lambda _: 2.0,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__name__ in LIPSCHITZ or super().is_leaf_module(m, module_qualified_name)

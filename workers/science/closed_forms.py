"""Sharpness of the penultimate layer in closed form, in the log domain and float64 (README.md, "Sharpness").

Per sample the Hessian of the cross-entropy with respect to the head's weight is `S(p) (x) phi phi^T` with
`S(p) = diag(p) - p p^T`. With the top class left out, `tau = 1 - p_top` and `q = p / tau` over the others:

    Tr S               = tau (p_top + 1 - tau sum q^2)
    relative_flatness  = ||phi||^2 tau (p_top sum_j q_j ||w_j - w_top||^2 + tau/2 sum_ij q_i q_j ||w_i - w_j||^2)
    lambda_max(S)      = tau mu,  mu the largest root of  mu - a - sum_j c_j / (mu - q_j),
                         a = p_top - tau sum q^2,  c_j = q_j^2 (p_top - tau q_j)

Every sum has terms of one sign, so nothing cancels, and only `log tau` carries the scale: finite at s = 1000.
Sources: arXiv 2510.14231 (relative sharpness), Petzka et al. 2021 (relative flatness), Golub 1973 (secular equation).
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from workers.science.cross_entropy import log_odds, log_sigmoid, softplus
from workers.science.curvature import TopEigenvalue, lanczos
from workers.science.errors import NonFinite, WrongShape

LOG_MEASURES = (
    "log_hessian_trace",
    "log_relative_sharpness",
    "log_relative_sharpness_unsquared",
    "log_relative_flatness",
    "log_gauge_fixed_relative_sharpness",
    "log_top_eigenvalue",
)


class Head:
    """A linear head `z = W phi + b` in float64, with all that the closed forms need of it, computed once.

    `weight [k, m]`, `bias [k]` or None, scale already applied. Raises `WrongShape` for fewer than two classes and
    `NonFinite` for weights that are NaN or infinite. `log_norm` is `log ||W||_F`, `log_norm_centred` the same after
    subtracting the mean row, `squared_distances [k, k]` is `||w_i - w_j||^2`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.ndim != 2 or len(weight) < 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise WrongShape(f"a head needs a weight [k >= 2, m] and a bias [k], not {tuple(weight.shape)}")
        self.weight = weight.detach().double()
        self.bias = self.weight.new_zeros(len(weight)) if bias is None else bias.detach().double()
        norms = torch.stack([self.weight.norm(), (self.weight - self.weight.mean(0)).norm()]).log()
        distances = torch.cdist(self.weight, self.weight, compute_mode="donot_use_mm_for_euclid_dist")
        self.squared_distances = distances.square()
        off_diagonal = ~torch.eye(len(weight), dtype=torch.bool, device=weight.device)
        equal_rows = ((self.squared_distances == 0) & off_diagonal).any()
        finite = torch.isfinite(self.weight).all() & torch.isfinite(self.bias).all()
        # One read of all four, so that a GPU is waited for once.
        self.log_norm, self.log_norm_centred, equal, usable = torch.stack([*norms, equal_rows, finite]).tolist()
        self.has_equal_rows = bool(equal)
        if not usable:
            raise NonFinite("the head's weights are NaN or infinite")

    def logits(self, phi: Tensor) -> Tensor:
        """`W phi + b [n, k]` in float64, from `phi [n, m]`."""
        return torch.addmm(self.bias, phi.double(), self.weight.T)


@dataclass(frozen=True)
class Softmax:
    """The softmax of `logits [n, k]` with the top class left out, so that `1 - p_top` never cancels.

    `top [n]` its index, `log_odds [n] = log((1 - p_top) / p_top)`, `log_rest [n] = log(1 - p_top)`, and
    `q [n, k] = p / (1 - p_top)`, zero at the top class. Differentiable in the logits.
    """

    logits: Tensor
    top: Tensor
    log_odds: Tensor
    q: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "Softmax":
        """From `logits [n, k]`, k >= 2."""
        top_logit, top = logits.max(1, keepdim=True)
        below = (logits - top_logit).scatter_(1, top, -math.inf)
        second = below.amax(1, keepdim=True)
        weights = (below - second).exp()
        total = weights.sum(1, keepdim=True)
        return cls(logits, top[:, 0], (second + total.log())[:, 0], weights / total)

    @property
    def log_p_top(self) -> Tensor:
        """`log p_top [n]`."""
        return log_sigmoid(-self.log_odds)

    @property
    def log_rest(self) -> Tensor:
        """`log(1 - p_top) [n]`."""
        return log_sigmoid(self.log_odds)

    @property
    def log_trace(self) -> Tensor:
        """`log Tr S(p) [n]`."""
        inner = self.log_p_top.exp() + 1 - self.log_rest.exp() * self.q.square().sum(1)
        return self.log_rest + inner.log()

    def log_weighted_spread(self, head: Head) -> Tensor:
        """`log sum_{i<j} p_i p_j ||w_i - w_j||^2 [n]`; relative flatness without its `||phi||^2`."""
        if head.has_equal_rows:  # then the nearest classes may not count, and the others underflow in q
            return torch.cat([_log_spread_by_pairs(z, head) for z in torch.split(self.logits, 128)])
        D = head.squared_distances
        # the top class's q is 0: its row of D is added with weight p_top instead
        towards_top = (self.q * D[self.top]).sum(1)
        among_rest = ((self.q @ D) * self.q).sum(1)
        return self.log_rest + torch.log(self.log_p_top.exp() * towards_top + self.log_rest.exp() / 2 * among_rest)

    @property
    def log_top_eigenvalue(self) -> Tensor:
        """`log lambda_max(S(p)) [n]` by the secular equation (see the module).

        With `x = mu - max q > 0` the sum is replaced by `R + C / x`, equal in value and slope: one quadratic
        per iteration, from above after the first, quadratically convergent; eight reach the last bit.
        """
        p_top, tau = self.log_p_top.exp(), self.log_rest.exp()
        q_max, where = self.q.max(1, keepdim=True)
        c = self.q.square() * (p_top[:, None] - tau[:, None] * self.q).clamp_(min=0)
        gap = q_max - self.q
        h = p_top - tau * self.q.square().sum(1) - q_max[:, 0]
        x = _positive_root(h, c.gather(1, where)[:, 0])
        for _ in range(8):
            d = x[:, None] + gap
            ratio = c / d
            value = ratio.sum(1)
            slope = ratio.div_(d).sum(1)
            x = _positive_root(h + value - x * slope, x.square() * slope)
        return self.log_rest + torch.log(q_max[:, 0] + x)

    def cross_entropy(self, y: Tensor) -> Tensor:
        """`-log p_y [n]` for labels `y [n]`, as `log1p(sum_{j != y} exp(z_j - z_y))`: exact where `p_y` rounds to 1."""
        return softplus(log_odds(self.logits, y))


@dataclass(frozen=True)
class ClosedForms:
    """Per-sample values, all `[n]` float64, natural logarithms; -inf is an exact zero (phi = 0).

    The first six are `LOG_MEASURES`. By-products: `log_softmax_trace = log Tr S(p)`, `log_feature_norm = log ||phi||`,
    `log_rest = log(1 - p_top)`, `logits [n, k]`; of the head `log_weight_norm = log ||W||_F`.
    """

    log_hessian_trace: Tensor
    log_relative_sharpness: Tensor
    log_relative_sharpness_unsquared: Tensor
    log_relative_flatness: Tensor
    log_gauge_fixed_relative_sharpness: Tensor
    log_top_eigenvalue: Tensor
    log_softmax_trace: Tensor
    log_feature_norm: Tensor
    log_rest: Tensor
    logits: Tensor
    log_weight_norm: float

    @classmethod
    def of(cls, phi: Tensor, weight: Tensor, bias: Tensor | None, *, chunk: int = 2048) -> "ClosedForms":
        """All closed forms, from features `phi [n, m]` and a head `W [k, m]`, `b [k]`, scale applied.

        Memory beyond the result: `chunk * (m + 8 k)` float64. Raises `WrongShape`, or `NonFinite` for NaN or infinite
        features. Source: see the module.

        >>> phi = torch.tensor([[3.0, 4.0]])
        >>> W = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> forms = ClosedForms.of(phi, W, torch.tensor([-3.0, 0.0]))  # logits 0 0, so p = 1/2 1/2 and Tr S = 1/2
        >>> round(float(forms.log_hessian_trace.exp()), 9), round(float(forms.log_relative_flatness.exp()), 9)
        (12.5, 6.25)
        """
        head = Head(weight, bias)
        if phi.ndim != 2 or phi.shape[1] != head.weight.shape[1]:
            raise WrongShape(f"features {tuple(phi.shape)} do not fit a head {tuple(weight.shape)}")
        logits, columns = head.weight.new_empty(len(phi), len(head.weight)), head.weight.new_empty(5, len(phi))
        for start in range(0, len(phi), chunk):
            part = slice(start, start + chunk)
            *rows, logits[part] = _of_chunk(phi[part].detach(), head)
            columns[:, part] = torch.stack(rows)
        trace_softmax, spread, eigenvalue, norm, rest = columns
        if not torch.isfinite(logits).all():
            raise NonFinite("features or logits are NaN or infinite")
        trace = trace_softmax + 2 * norm
        return cls(
            log_hessian_trace=trace,
            log_relative_sharpness=trace + 2 * head.log_norm,
            log_relative_sharpness_unsquared=trace + head.log_norm,
            log_relative_flatness=spread + 2 * norm,
            log_gauge_fixed_relative_sharpness=trace + 2 * head.log_norm_centred,
            log_top_eigenvalue=eigenvalue + 2 * norm,
            log_softmax_trace=trace_softmax,
            log_feature_norm=norm,
            log_rest=rest,
            logits=logits,
            log_weight_norm=head.log_norm,
        )

    @property
    def confidence(self) -> Tensor:
        """`p_top [n]`; rounds to 1 where `log_rest` is still exact."""
        return -torch.expm1(self.log_rest)

    def cross_entropy(self, y: Tensor) -> Tensor:
        """`-log p_y [n]` for labels `y [n]`."""
        return Softmax.of(self.logits).cross_entropy(y)

    def select(self, mask: Tensor) -> "ClosedForms":
        """The samples where `mask [n]` is true."""
        names = [f.name for f in fields(self) if f.name != "log_weight_norm"]
        return replace(self, **{name: getattr(self, name)[mask] for name in names})


def log_dataset_top_eigenvalue(
    phi: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seed: int = 0,
    iterations: int = 200,
    tolerance: float = 1e-6,
    chunk: int = 2048,
) -> tuple[float, TopEigenvalue]:
    """`log lambda_max` of the mean Hessian `mean_n S(p_n) (x) phi_n phi_n^T [k m, k m]`, never formed.

    Lanczos on the power-iteration map `V -> mean_n S(p_n) V phi_n phi_n^T` (same limit, fewer products). Samples are
    weighted relative to the one with the largest `(1 - p_top) ||phi||^2`, so it does not underflow at a large scale.
    -inf if every phi is zero. The second value is the result of Lanczos, relative to that sample.
    The error of the value is of order `residual^2`: the default tolerance gives about 1e-10.
    """
    head = Head(weight, bias)
    softmax = [Softmax.of(head.logits(part)) for part in torch.split(phi, chunk)]
    log_norm = torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64).log()
    log_rest = torch.cat([s.log_rest for s in softmax])
    log_rest = log_rest.masked_fill(torch.isneginf(log_norm), -math.inf)  # phi = 0 adds nothing, however unsure it is
    largest = float((log_rest + 2 * log_norm).max()) if len(phi) else -math.inf
    if largest == -math.inf:
        return -math.inf, TopEigenvalue(0.0, 0.0, 0, True)
    if math.isnan(largest) or largest == math.inf:
        raise NonFinite("features or logits are NaN or infinite")
    unit = (log_rest - log_rest.max()).exp() * math.exp(float(log_rest.max()) - largest) / len(phi)

    def product(V: Tensor) -> Tensor:
        out = torch.zeros_like(V)
        for part, s, w in zip(torch.split(phi, chunk), softmax, torch.split(unit, chunk), strict=True):
            features = part.double()
            a = features @ V.T
            a -= a.gather(1, s.top[:, None])
            mean = (s.q * a).sum(1, keepdim=True)
            out_logits = s.q * (a - s.log_rest.exp()[:, None] * mean)
            out_logits.scatter_(1, s.top[:, None], -s.log_p_top.exp()[:, None] * mean)
            out += (out_logits * w[:, None]).T @ features
        return out

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(head.weight.shape, generator=generator, dtype=torch.float64).to(head.weight.device)
    top = lanczos(product, start, iterations=iterations, tolerance=tolerance)
    return (math.log(top.value) + largest if top.value > 0 else -math.inf), top


def _of_chunk(phi: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    s = Softmax.of(head.logits(phi))
    norm = torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64).log()
    return s.log_trace, s.log_weighted_spread(head), s.log_top_eigenvalue, norm, s.log_rest, s.logits


def _log_spread_by_pairs(logits: Tensor, head: Head) -> Tensor:
    s = Softmax.of(logits)
    log_p = (logits - logits.gather(1, s.top[:, None])) + s.log_p_top[:, None]
    pairs = log_p[:, :, None] + log_p[:, None, :] + head.squared_distances.log()
    return pairs.flatten(1).logsumexp(1) - math.log(2)


def _positive_root(h: Tensor, c: Tensor) -> Tensor:
    """The positive root of `x - h - c / x`, for `c >= 0`; at least 1e-300, so that `c / x` stays a number."""
    root = (h.square() + 4 * c).sqrt_()
    return torch.where(h > 0, (root + h) / 2, 2 * c / (root - h).clamp_(min=1e-300)).clamp_(min=1e-300)

"""Square attack (Andriushchenko et al. 2020): random search with squares. It needs no gradient, so nothing masks it."""

import math

import torch
from torch import Tensor, nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    Outcomes,
    index_of,
    misclassified,
    per_example,
    refuse_observer,
)
from workers.science.attacks.losses import margin
from workers.science.attacks.norms import geometry
from workers.science.seeding import moved, uniform_per_example

CHUNK = 500
"""Queries whose random numbers are drawn at once."""


def square(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    queries: int = 5000,
    p_init: float = 0.8,
) -> AttackOutput:
    """At most `queries` forward passes per example, each a proposal that is kept if the margin loss rises.

    `p_init` is the share of the image that the first squares cover; it halves at the published share of the queries.
    Examples leave when broken. Positions and signs are drawn per example, where the published code shares positions
    within the batch. It has no trajectory: raises `ValueError` for an observer; other errors as in `pgd`.
    """
    refuse_observer(inputs, "square")
    if queries < 1 or eps < 0 or not 0 < p_init <= 1:
        raise ValueError("square needs queries >= 1, eps >= 0 and 0 < p_init <= 1")
    propose = {"linf": _propose_linf, "l2": _propose_l2}.get(norm)
    if propose is None:
        raise ValueError(f"unknown norm {norm!r}; there are linf, l2")
    x, y = inputs.x.detach(), inputs.y
    outcomes = Outcomes(x, takes_gradients=False)
    outcomes.classify(model, y)
    alive = outcomes.robust()
    x_0, y_0 = x[alive], y[alive]
    channels, height, width = x.shape[1:]

    first = _uniform(inputs, alive, (channels * (height * width + 1) + 1,), "square start")
    x_best = _stripes(x_0, eps, first) if norm == "linf" else _tiles(x_0, eps, first)
    best = torch.full((len(alive),), -torch.inf, device=x.device, dtype=x.dtype)
    x_new, drawn = x_best, first
    for query in range(queries):
        if not len(alive):
            break
        if query > 0:
            if (query - 1) % CHUNK == 0:
                drawn = _uniform(inputs, alive, (CHUNK, 5 + channels), f"square {query}")
            x_new = propose(x_0, x_best, eps, _share(p_init, query - 1, queries), drawn[:, (query - 1) % CHUNK])
        logits = outcomes.look(model, x_new, alive)
        wrong = outcomes.see(alive, x_new, misclassified(logits, y_0), judged=True)
        value = margin(logits, y_0)
        better = value > best
        best, x_best = torch.where(better, value, best), torch.where(per_example(better, x_new), x_new, x_best)
        if bool(wrong.any()):
            keep = ~wrong
            alive, x_0, y_0, x_best, best, drawn = (v[keep] for v in (alive, x_0, y_0, x_best, best, drawn))
        inputs.report(query + 1, queries)
    outcomes.keep(alive, x_best)
    return outcomes.output(norm, eps)


def _uniform(inputs: AttackInput, alive: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """`[m, *shape]` in [0, 1), for the examples at the positions `alive [m]`."""
    drawn = uniform_per_example(inputs.seed, index_of(alive, inputs.index), 0, shape, stream=stream)
    return moved(drawn, inputs.x.device).to(inputs.x)


def _share(p_init: float, query: int, queries: int) -> float:
    """The published schedule, made for 10,000 queries and stretched to as many as there are."""
    at = int(query / queries * 10_000)
    return p_init / 2.0 ** sum(at > limit for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))


def _side(share: float, x: Tensor, least: int = 1) -> int:
    height, width = x.shape[-2:]
    return min(max(round(math.sqrt(share * height * width)), least), height, width)


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(u)


def _stripes(x: Tensor, eps: float, u: Tensor) -> Tensor:
    """Vertical stripes of +-eps."""
    channels, width = x.shape[1], x.shape[3]
    return (x + eps * _signs(u[:, : channels * width].reshape(-1, channels, 1, width))).clamp(0, 1)


def _corners(x: Tensor, side: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns `[n, side]` of a square in each image, at the place given by `u [n, 2]` in [0, 1)."""
    along = torch.arange(side, device=x.device)
    room = moved(torch.tensor([size - side + 1 for size in x.shape[-2:]]), x.device)
    corner = (u * room).long().minimum(room - 1)
    return corner[:, :1] + along, corner[:, 1:] + along


def _window(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[n, 1, H, W] bool: the square."""
    (height, width), device = x.shape[-2:], x.device
    in_rows = (torch.arange(height, device=device)[None, :, None] == rows[:, None]).any(2)
    in_columns = (torch.arange(width, device=device)[None, :, None] == columns[:, None]).any(2)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def _propose_linf(x: Tensor, x_best: Tensor, eps: float, share: float, u: Tensor) -> Tensor:
    """One square of a new sign per channel."""
    window = _window(x, *_corners(x, _side(share, x), u[:, :2]))
    delta = (x_best - x) + window * (2 * eps * _signs(u[:, 5:])[:, :, None, None])
    return (x + delta.clamp(-eps, eps)).clamp(0, 1)


def _propose_l2(x: Tensor, x_best: Tensor, eps: float, share: float, u: Tensor) -> Tensor:
    """Move the content of a second square to the first, and add a bump of a new sign."""
    side = _side(share, x, 3)
    side -= 1 - side % 2
    rows, columns = _corners(x, side, u[:, :2])
    examples = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    patch = (examples, channels, rows[:, None, :, None], columns[:, None, None, :])
    elsewhere = _window(x, *_corners(x, side, u[:, 2:4]))
    both = elsewhere | _window(x, rows, columns)

    delta = x_best - x
    unused = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / x.shape[1]
    budget = (unused + (delta * both).square().sum((2, 3), keepdim=True)).sqrt()
    bump = _bump(side, x)
    bump = torch.where(u[:, 4, None, None] < 0.5, bump, bump.T)[:, None] * _signs(u[:, 5:])[:, :, None, None]
    new = bump + delta[patch] / (1e-12 + delta[patch].square().sum((2, 3), keepdim=True).sqrt())
    new = new / (1e-12 + new.square().sum((2, 3), keepdim=True).sqrt()) * budget
    delta = delta.masked_fill(elsewhere, 0)
    delta[patch] = new
    return _to_sphere(x, delta, eps)


def _tiles(x: Tensor, eps: float, u: Tensor) -> Tensor:
    """A bump of random sign, per channel, on each tile of a five by five grid (less where tiles would be below 3)."""
    n, channels, height, width = x.shape
    side = min(max(height // 5, 3), height, width)
    down, across = height // side, width // side
    signs = _signs(u[:, : channels * down * across].reshape(n, channels, down, across))
    bump = _bump(side, x)
    bump = torch.where(u[:, -1, None, None] < 0.5, bump, bump.T)
    tiled = bump.repeat(1, down, across)[:, None] * signs.repeat_interleave(side, 2).repeat_interleave(side, 3)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta = torch.zeros_like(x)
    delta[:, :, top : top + down * side, left : left + across * side] = tiled
    return _to_sphere(x, delta, eps)


def _to_sphere(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    ball = geometry("l2")
    return (x + ball.project(ball.normalize(delta) * eps, eps)).clamp(0, 1)


def _bump(side: int, like: Tensor) -> Tensor:
    """[side, side]: a positive and a negative pyramid side by side, of l2 norm 1 (the paper's eta)."""
    upper = side // 2
    bump = torch.cat([_pyramid(upper, side), -_pyramid(side - upper, side)])
    return moved(bump / bump.square().sum().sqrt(), like.device).to(like)


def _pyramid(height: int, width: int) -> Tensor:
    out = torch.zeros(height, width)
    row, column = height // 2, width // 2
    for level in range(max(height // 2 + 1, width // 2 + 1)):
        rows = slice(max(row - level, 0), min(row + level + 1, height))
        columns = slice(max(column - level, 0), min(column + level + 1, width))
        out[rows, columns] += 1 / (level + 1) ** 2
    return out / out.square().sum().sqrt() if height else out

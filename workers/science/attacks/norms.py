"""The holes in the attack loop that depend on the norm: where to start, which way is steepest, what lies in the ball.

Images are `[n, C, H, W]` in [0, 1]; the l2 norm runs over C x H x W. Sizes are `[n]`.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from workers.science.attacks.base import AttackInput, per_example
from workers.science.seeding import moved, normal_per_example, uniform_per_example


class Norm(Protocol):
    """One geometry. Stateless."""

    def random_start(self, like: Tensor, eps: float, *, seed: int, index: Tensor, restart: int) -> Tensor:
        """A random perturbation `[n, C, H, W]` in the ball, of the example and the restart alone."""

    def normalize(self, gradient: Tensor) -> Tensor:
        """The direction of steepest ascent, of size 1; a zero gradient stays zero."""

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """The nearest point of the ball of radius eps."""

    def size(self, delta: Tensor) -> Tensor:
        """The norm `[n]` of each perturbation, in the precision of `delta`."""


class Linf:
    """The largest change of a pixel."""

    def random_start(self, like: Tensor, eps: float, *, seed: int, index: Tensor, restart: int) -> Tensor:
        """Uniform in the box."""
        return eps * (2 * moved(uniform_per_example(seed, index, restart, like.shape[1:]), like.device).to(like) - 1)

    def normalize(self, gradient: Tensor) -> Tensor:
        """The sign of each pixel's derivative."""
        return gradient.sign()

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Each pixel's change, cut to [-eps, eps]."""
        return delta.clamp(-eps, eps)

    def size(self, delta: Tensor) -> Tensor:
        """The largest absolute change `[n]`."""
        return delta.abs().flatten(1).amax(1)


class L2:
    """The Euclidean norm over C x H x W."""

    def random_start(self, like: Tensor, eps: float, *, seed: int, index: Tensor, restart: int) -> Tensor:
        """Gaussian direction, radius `eps u^(1/n)`: uniform in the ball."""
        direction = self.normalize(
            moved(normal_per_example(seed, index, restart, like.shape[1:]), like.device).to(like)
        )
        u = moved(uniform_per_example(seed, index, restart, (1,), stream=RADIUS), like.device).to(like)
        return direction * per_example(eps * u.squeeze(1) ** (1 / math.prod(like.shape[1:])), like)

    def normalize(self, gradient: Tensor) -> Tensor:
        """Divided by the largest absolute entry first, so that the squares of tiny gradients do not underflow."""
        dims = tuple(range(1, gradient.ndim))
        largest = gradient.abs().amax(dims, keepdim=True)
        unit = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
        norm: Tensor = torch.linalg.vector_norm(unit, dim=dims, keepdim=True)
        return unit / norm.clamp_min(1.0)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Scaled back to the sphere of radius eps if it lies outside."""
        # squares of float32 underflow only below 1e-19, where a step moves no pixel
        norm: Tensor = torch.linalg.vector_norm(delta, dim=tuple(range(1, delta.ndim)), keepdim=True)
        return delta * (eps / norm.clamp_min(1e-30)).clamp_max(1.0)

    def size(self, delta: Tensor) -> Tensor:
        """The Euclidean norm `[n]`."""
        norm: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        return norm


def random_point(ball: Norm, eps: float, inputs: AttackInput, restart: int) -> Tensor:
    """A random point `[n, C, H, W]` of the ball around each image, clipped to [0, 1]."""
    x = inputs.x.detach()
    return (x + ball.random_start(x, eps, seed=inputs.seed, index=inputs.index, restart=restart)).clamp(0, 1)


RADIUS = "radius"

NORMS: dict[str, Norm] = {"linf": Linf(), "l2": L2()}


def geometry(name: str) -> Norm:
    """The norm of that name. Raises `ValueError` for an unknown one."""
    if name not in NORMS:
        raise ValueError(f"unknown norm {name!r}; there are {', '.join(NORMS)}")
    return NORMS[name]

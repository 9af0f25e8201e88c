"""Threat models: an attack's ball and its knowledge of the network. Numbers compare within one threat model only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from service.model.json import JsonMapping
from service.model.query import Comparison, Node, Value

Adversary = Literal["white_box", "black_box", "transfer", "noise"]

ADVERSARIES: Mapping[str, Adversary] = MappingProxyType(
    {
        **dict.fromkeys(("pgd", "fgsm", "apgd", "autoattack", "cw"), "white_box"),
        "square": "black_box",
        "transfer": "transfer",
        "noise": "noise",
    }
)
"""By the attack's type. Noise does not search: an example that it does not break may still not be robust."""


@dataclass(frozen=True)
class ThreatModel:
    """The ball of the allowed perturbations, with the adversary; `norm` and `eps` are None without a ball."""

    adversary: Adversary
    norm: str | None = None
    eps: float | None = None

    @property
    def ball(self) -> str | None:
        """As `linf 8/255` or `l2 0.5`: one text for one ball, None if there is none.

        >>> ThreatModel("white_box", "linf", 8 / 255).ball
        'linf 8/255'
        """
        return None if self.norm is None or self.eps is None else ball_of(self.norm, self.eps)


def threat_model(attack: JsonMapping) -> ThreatModel:
    """The threat model of an attack's stored spec. A transfer's ball is that of the attack that makes its examples."""
    adversary = ADVERSARIES[attack["type"]]
    ball = attack.get("attack", attack)
    if attack.get("kind") == "gaussian":  # noise without a ball: its norm and eps bound nothing
        return ThreatModel(adversary)
    return ThreatModel(adversary, ball.get("norm"), ball.get("eps"))


def of_adversaries() -> list[Node]:
    """The filters that keep attacks in a ball and no noise: a ranking of networks counts only these."""
    return [Comparison("threat_model", "is not null"), Comparison("adversary", "!=", (Value("noise"),))]


def ball_of(norm: str, eps: float) -> str:
    """One text for one ball, as `linf 8/255`."""
    return f"{norm} {_radius(eps)}"


def _radius(eps: float) -> str:
    grey_levels = round(255 * eps)
    if 0 < grey_levels < 255 and grey_levels / 255 == eps:
        return f"{grey_levels}/255"
    return repr(float(eps)).removesuffix(".0")

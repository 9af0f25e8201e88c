"""The attacks that a job can ask for, with their parameters and bounds, and the paper's presets.

Definitions: science/README.md, "Attacks".
"""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from service.model.json import JsonObject
from service.specs.base import Number, Scale, Spec, Truth, Whole, of_images, without_effect
from service.specs.names import Architecture, NamedRecipe

Norm = Literal["linf", "l2"]
Eps = Annotated[Number, Field(ge=0, le=1000, description="Radius of the ball, in units of [0,1] images.")]
StepSize = Annotated[Number, Field(gt=0, le=1000, description="Length of one step, in the same units as eps.")]
Steps = Annotated[Whole, Field(ge=1, le=10_000)]
Restarts = Annotated[Whole, Field(ge=1, le=100)]
Loss = Literal["cross_entropy", "stable_cross_entropy", "rescaled_cross_entropy", "margin", "dlr"]


class Numerics(Spec):
    """How gradients are taken. Other than the defaults are faster and give almost the same pixels: part of the digest.

    What an attack finds is always judged by the plain network in float32.
    """

    precision: Literal["float32", "bf16"] = "float32"
    channels_last: Truth = False
    fold_batch_norm: Truth = False
    compile: Truth = False


class InBall(Numerics):
    """An attack within the ball of radius `eps` around the image."""

    norm: Norm
    eps: Eps

    @field_validator("eps", "step_size", check_fields=False)
    @classmethod
    def _in_units_of_images(cls, value: float, info: ValidationInfo) -> float:
        return of_images(value) if info.data.get("norm") == "linf" else value


class Pgd(InBall):
    """Projected gradient descent (Madry et al. 2018): step, projection on the ball, clipping to [0,1]."""

    type: Literal["pgd"] = "pgd"
    step_size: StepSize
    steps: Steps
    random_start: Truth = False
    restarts: Restarts = 1
    targeted: Truth = False
    loss: Loss = "cross_entropy"
    judge: Literal["final", "any_step"] = "final"


class Fgsm(InBall):
    """The fast gradient sign method (Goodfellow et al. 2015): one step of eps."""

    type: Literal["fgsm"] = "fgsm"
    loss: Loss = "cross_entropy"
    targeted: Truth = False


class Apgd(InBall):
    """Auto-PGD (Croce & Hein 2020), whose step size adapts."""

    type: Literal["apgd"] = "apgd"
    steps: Steps = 100
    restarts: Restarts = 1
    rho: Annotated[Number, Field(gt=0, lt=1)] = 0.75
    loss: Literal["cross_entropy", "dlr", "margin"] = "cross_entropy"
    targeted: Truth = False
    targets: Annotated[Whole, Field(ge=1, le=1000)] = 9

    @model_validator(mode="after")
    def _targets_of_a_targeted_attack(self) -> Self:
        if not self.targeted:
            without_effect(self, "targets")
        return self


class Square(InBall):
    """The square attack (Andriushchenko et al. 2020): random search, no gradients."""

    type: Literal["square"] = "square"
    queries: Annotated[Whole, Field(ge=1, le=1_000_000)] = 5000
    p_init: Annotated[Number, Field(gt=0, le=1)] = 0.8


class AutoAttack(InBall):
    """A re-implementation of `fra31/auto-attack` 0.1, version "standard" (Croce & Hein 2020), not the original code.

    The ensemble: APGD-CE, targeted APGD-DLR, targeted FAB, square; k >= 4 classes.
    """

    type: Literal["autoattack"] = "autoattack"


class Cw(Numerics):
    """The l2 attack of Carlini & Wagner (2017) at a fixed c; it minimises the distance and has no ball."""

    type: Literal["cw"] = "cw"
    c: Annotated[Number, Field(gt=0, le=1e6)] = 10.0
    kappa: Annotated[Number, Field(ge=0, le=1e6)] = 20.0
    lr: Annotated[Number, Field(gt=0, le=10)] = 0.01
    steps: Steps = 25


class Noise(InBall):
    """Random noise, the control path: gaussian images in no ball, or uniform in the ball of `norm` and `eps`."""

    type: Literal["noise"] = "noise"
    kind: Literal["gaussian", "uniform"] = "gaussian"
    norm: Norm = "linf"
    eps: Eps = 8 / 255
    points: Annotated[Whole, Field(ge=2, le=1000)] = 10
    draws: Annotated[Whole, Field(ge=1, le=100)] = 1

    @model_validator(mode="after")
    def _ball_of_uniform_noise(self) -> Self:
        if self.kind == "gaussian":
            without_effect(self, "norm", "eps")
        return self


SourceAttack = Annotated[Pgd | Fgsm | Apgd, Field(discriminator="type")]


class Source(Spec):
    """Another network, trained on the job's data set: by the job's own recipe where none is given."""

    architecture: Architecture
    recipe: NamedRecipe | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    replicate: Annotated[Whole, Field(ge=0, lt=2**31)] = 0


class Transfer(Spec):
    """Examples that `attack` makes on the network `source`, at `source_scale`, judged on this job's at its scale.

    Without a `source` they are made on the job's own network.
    """

    type: Literal["transfer"] = "transfer"
    attack: SourceAttack
    source_scale: Scale = 1.0
    source: Source | None = None

    @property
    def norm(self) -> Norm:
        return self.attack.norm

    @property
    def eps(self) -> float:
        return self.attack.eps


AnyAttack = Pgd | Fgsm | Apgd | Square | AutoAttack | Cw | Noise | Transfer
Attack = Annotated[AnyAttack, Field(discriminator="type")]

# `workers/science/attacks` has the functions: `tests/contract/test_catalog.py` compares them, and their parameters.
ATTACKS: dict[str, type[AnyAttack]] = {
    "pgd": Pgd,
    "fgsm": Fgsm,
    "apgd": Apgd,
    "square": Square,
    "autoattack": AutoAttack,
    "cw": Cw,
    "noise": Noise,
    "transfer": Transfer,
}

PGD_LINF = Pgd(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10)

PRESETS: dict[str, AnyAttack] = {
    "pgd_l2": Pgd(norm="l2", eps=0.025, step_size=0.001, steps=25),
    "pgd_l2_strong": Pgd(norm="l2", eps=0.5, step_size=0.01, steps=50),
    "pgd_linf": PGD_LINF,
    "pgd_linf_strong": Pgd(norm="linf", eps=0.1, step_size=2 / 255, steps=30),
    "pgd_linf_fine": Pgd(norm="linf", eps=8 / 255, step_size=0.25 / 255, steps=80),
    "fgsm": Fgsm(norm="linf", eps=8 / 255),
    "apgd": Apgd(norm="linf", eps=8 / 255),
    "apgd_dlr": Apgd(norm="linf", eps=8 / 255, loss="dlr"),
    "square": Square(norm="linf", eps=8 / 255),
    "autoattack": AutoAttack(norm="linf", eps=8 / 255),
    "cw": Cw(),
    "noise": Noise(),
    "noise_uniform": Noise(kind="uniform"),
    "transfer": Transfer(attack=PGD_LINF),
}

NUMERICS = frozenset(Numerics.model_fields)


def parameters(attack: AnyAttack) -> JsonObject:
    """The attack's own parameters, as its function in `workers/science/attacks` takes them."""
    return {name: getattr(attack, name) for name in type(attack).model_fields if name not in {"type", *NUMERICS}}

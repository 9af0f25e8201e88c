"""The sharpness measures that a job can ask for (science/README.md, "Sharpness" and "Further measures")."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.specs.base import Number, Spec, Whole, without_effect

Positive = Annotated[Number, Field(gt=0, le=1e6)]
Count = Annotated[Whole, Field(ge=1, le=100_000)]

# All of these come from the one measure that is always on, so naming one of them adds nothing.
CLOSED_FORM_QUANTITIES = (
    "hessian_trace",
    "relative_sharpness",
    "relative_sharpness_unsquared",
    "relative_flatness",
    "gauge_fixed_relative_sharpness",
    "top_eigenvalue",
)


class ClosedForms(Spec):
    """All closed forms of the penultimate layer, in the log domain: one pass over the job's samples."""

    type: Literal["closed_forms"] = "closed_forms"


class OnImages(Spec):
    """A measure on the first `images` of its split in the job's order, whatever the job's samples are."""

    images: Count = 1024


class InGroups(OnImages):
    """A measure that averages over groups of `m` images."""

    m: Count = 128

    @model_validator(mode="after")
    def _one_group(self) -> Self:
        """Whatever more than all images there are in a group, there is one."""
        if self.m >= self.images:
            without_effect(self, m=max(self.images, type(self).model_fields["m"].default))
        return self


class HessianTraceNetwork(OnImages):
    """Hutchinson's trace of the whole network's Hessian, and each layer's share of it."""

    type: Literal["hessian_trace_network"] = "hessian_trace_network"
    probes: Count = 100


class TopEigenvalueNetwork(OnImages):
    """Largest eigenvalue of the whole network's Hessian, by Lanczos."""

    type: Literal["top_eigenvalue_network"] = "top_eigenvalue_network"
    iterations: Count = 50
    tolerance: Positive = 1e-4


class SamSharpness(InGroups):
    """Loss increase at the worst nearby weights, to first order (Foret et al. 2021)."""

    type: Literal["sam_sharpness"] = "sam_sharpness"
    rho: Positive = 0.05


class AsamSharpness(InGroups):
    """The same in weights relative to their size (Kwon et al. 2021)."""

    type: Literal["asam_sharpness"] = "asam_sharpness"
    rho: Positive = 0.5
    eta: Annotated[Number, Field(ge=0, le=1e6)] = 0.01


class AdaptiveAverage(OnImages):
    """Mean loss increase under relative weight noise, plain and with normalised logits (Andriushchenko et al. 2023)."""

    type: Literal["adaptive_average"] = "adaptive_average"
    rho: Positive = 0.1
    draws: Count = 10


class AdaptiveWorst(InGroups):
    """Worst loss increase in a relative weight box, plain and with normalised logits (Andriushchenko et al. 2023)."""

    type: Literal["adaptive_worst"] = "adaptive_worst"
    rho: Positive = 0.002
    steps: Count = 20


class FisherRao(OnImages):
    """The Fisher-Rao norm (Liang et al. 2019)."""

    type: Literal["fisher_rao"] = "fisher_rao"


class PacBayesFlatness(OnImages):
    """1 / sigma^2 of the weight noise that costs `drop` of accuracy (Jiang et al. 2020)."""

    type: Literal["pac_bayes_flatness"] = "pac_bayes_flatness"
    drop: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    draws: Count = 10
    bisections: Annotated[Whole, Field(ge=1, le=60)] = 15


class InputGradientNorm(OnImages):
    """Norm of the loss's gradient at the test images."""

    type: Literal["input_gradient_norm"] = "input_gradient_norm"
    images: Count = 10_000


class InputCurvature(OnImages):
    """Largest curvature of the loss in the test images."""

    type: Literal["input_curvature"] = "input_curvature"
    iterations: Count = 20


class Lipschitz(OnImages):
    """Lipschitz constant of the features: an upper bound by layers, and the Jacobian's norm at the test images."""

    type: Literal["lipschitz"] = "lipschitz"
    iterations: Count = 20
    images: Count = 256


class Detector(OnImages):
    """Can PGD's images be told by their sharpness? A decision stump, also against an attack that hides it."""

    type: Literal["detector"] = "detector"
    eps: Annotated[Number, Field(gt=0, le=1)] = 8 / 255
    step_size: Annotated[Number, Field(gt=0, le=1)] = 2 / 255
    steps: Count = 10
    images: Count = 1000


Measure = Annotated[
    ClosedForms
    | HessianTraceNetwork
    | TopEigenvalueNetwork
    | SamSharpness
    | AsamSharpness
    | AdaptiveAverage
    | AdaptiveWorst
    | FisherRao
    | PacBayesFlatness
    | InputGradientNorm
    | InputCurvature
    | Lipschitz
    | Detector,
    Field(discriminator="type"),
]

# `workers/science/sharpness` has the functions: `tests/contract/test_catalog.py` compares them, and their parameters.
MEASURES: dict[str, type[Spec]] = {
    "closed_forms": ClosedForms,
    "hessian_trace_network": HessianTraceNetwork,
    "top_eigenvalue_network": TopEigenvalueNetwork,
    "sam_sharpness": SamSharpness,
    "asam_sharpness": AsamSharpness,
    "adaptive_average": AdaptiveAverage,
    "adaptive_worst": AdaptiveWorst,
    "fisher_rao": FisherRao,
    "pac_bayes_flatness": PacBayesFlatness,
    "input_gradient_norm": InputGradientNorm,
    "input_curvature": InputCurvature,
    "lipschitz": Lipschitz,
    "detector": Detector,
}
FURTHER_MEASURES = tuple(name for name in MEASURES if name != "closed_forms")

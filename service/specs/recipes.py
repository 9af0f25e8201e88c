"""The recipes that a job can ask for (science/README.md, "Training"). `standard` is the paper's."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from service.model.json import JsonObject
from service.model.names import DIGEST_PATTERN, TEXT_PATTERN
from service.specs.base import Number, Spec, Truth, Whole, of_images, without_effect

Positive = Annotated[Number, Field(gt=0, le=1e6)]
OpenFraction = Annotated[Number, Field(gt=0, lt=1)]
FILLED_IN = "Filled in when the job is accepted."


class Recipe(Spec):
    """What every recipe shares: SGD with momentum and a cosine schedule, on augmented batches.

    Augmentation fields left out take what suits the data set (`catalog.DATASETS`), and are then part of the digest.
    """

    epochs: Annotated[Whole, Field(ge=1, le=10_000)] = 100
    batch_size: Annotated[Whole, Field(ge=2, le=65_536)] = 128
    lr: Positive = 0.1
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    crop_padding: Annotated[Whole, Field(ge=0, le=64)] | None = None
    flip: Truth | None = None
    rotation_degrees: Annotated[Number, Field(ge=0, le=180)] | None = None
    train_samples: Annotated[Whole, Field(ge=2, lt=2**31)] | None = Field(
        default=None, description="Train on the first so many of one fixed permutation; all when left out."
    )
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    channels_last: Truth = False
    compile: Truth = False
    cuda_graphs: Truth = Field(default=False, description="With `compile`, on a GPU: each pass is one CUDA graph.")

    @model_validator(mode="after")
    def _options_without_effect(self) -> Self:
        """The cosine schedule begins at `lr`."""
        if self.epochs == 1:
            without_effect(self, "schedule")
        if not self.compile:
            without_effect(self, "cuda_graphs")
        return self


class Standard(Recipe):
    """Cross-entropy, the paper's recipe."""

    name: Literal["standard"] = "standard"


class LabelSmoothing(Recipe):
    """Cross-entropy with smoothed labels."""

    name: Literal["label_smoothing"] = "label_smoothing"
    smoothing: OpenFraction = 0.1


class Margin(Recipe):
    """Multi-class hinge on the margin, `max_{j!=y}(1 + z_j - z_y)_+`."""

    name: Literal["margin"] = "margin"


class AdversarialSteps(Recipe):
    """PGD-linf in the training loop.

    The defaults are the paper's; `PRESETS` has the literature's.
    """

    eps: Annotated[Number, AfterValidator(of_images), Field(ge=0, le=1)] = 8 / 255
    step_size: Annotated[Number, AfterValidator(of_images), Field(gt=0, le=1)] = 2 / 255
    steps: Annotated[Whole, Field(ge=1, le=1000)] = 10
    keep: Literal["last", "best"] = Field(
        default="last", description="The weights of the last epoch, or of the one most robust on held-out images."
    )
    held_out: Annotated[Whole, Field(ge=0, lt=2**31)] = Field(
        default=0,
        description="With `keep: best`, so many training images are not trained on: the last of the fixed permutation.",
    )

    @model_validator(mode="after")
    def _steps_in_no_ball(self) -> Self:
        """With eps 0 each step ends at the image."""
        if self.eps == 0:
            without_effect(self, "step_size", "steps")
        return self

    @model_validator(mode="after")
    def _best_of_held_out_images(self) -> Self:
        if (self.keep == "best") != (self.held_out > 0):
            raise ValueError(
                "keep best needs held_out, the number of training images that choose the epoch, and only it"
            )
        return self


class Adversarial(AdversarialSteps):
    """Cross-entropy on PGD-linf examples only (Madry et al. 2018)."""

    name: Literal["adversarial"] = "adversarial"


class Trades(AdversarialSteps):
    """Cross-entropy plus beta times the divergence of adversarial from clean predictions (Zhang et al. 2019)."""

    name: Literal["trades"] = "trades"
    beta: Positive = 6.0
    start_std: Annotated[Number, Field(ge=0, le=1)] = 0.001


class Sam(Recipe):
    """Sharpness-aware minimisation (Foret et al. 2021)."""

    name: Literal["sam"] = "sam"
    rho: Positive = 0.05


class RelativeFlatness(Recipe):
    """Cross-entropy plus `strength` times relative flatness."""

    name: Literal["relative_flatness"] = "relative_flatness"
    strength: Positive = 1e-3


class Imported(Spec):
    """Nothing is trained: weights that are there, of a registered checkpoint or of an earlier training.

    Jobs name the `checkpoint`; the task that comes of it names its weights, so equal weights are one network, unless
    they were registered with different expectations: these are tasks that end differently.
    """

    name: Literal["imported"] = "imported"
    checkpoint: Annotated[str, Field(min_length=1, max_length=100, pattern=TEXT_PATTERN)] | None = Field(
        default=None, description="The name of a registered checkpoint, or the SHA-256 of weights: see /v1/networks."
    )
    weights_sha256: Annotated[str, Field(pattern=DIGEST_PATTERN)] | None = Field(default=None, description=FILLED_IN)
    expected_clean_accuracy: Annotated[Number, Field(ge=0, le=1)] | None = Field(default=None, description=FILLED_IN)
    tolerance: Annotated[Number, Field(ge=0, lt=1)] | None = Field(default=None, description=FILLED_IN)


AnyRecipe = Annotated[
    Standard | LabelSmoothing | Margin | Adversarial | Trades | Sam | RelativeFlatness | Imported,
    Field(discriminator="name"),
]

# `workers/science/recipes` has the functions: `tests/contract/test_catalog.py` compares them, and their parameters.
RECIPES: dict[str, type[Recipe]] = {
    "standard": Standard,
    "label_smoothing": LabelSmoothing,
    "margin": Margin,
    "adversarial": Adversarial,
    "trades": Trades,
    "sam": Sam,
    "relative_flatness": RelativeFlatness,
}
"""The recipes that train."""

OF_LITERATURE: JsonObject = {"weight_decay": 5e-4, "keep": "best", "held_out": 1000}

PRESETS: dict[str, Recipe] = {
    "adversarial_literature": Adversarial(**OF_LITERATURE),
    "trades_literature": Trades(**OF_LITERATURE),
}
"""Names for whole recipes: the weight decay that Rice et al. (2020) and Pang et al. (2021) train CIFAR with, and the
epoch most robust on 1,000 held-out training images (Rice et al.)."""

KNOWN: dict[str, type[Spec]] = {**RECIPES, "imported": Imported}


def parameters(recipe: Recipe) -> JsonObject:
    """The parameters of the recipe's loss, beyond what every recipe has."""
    of_training = {"name", "keep", "held_out", *Recipe.model_fields}
    return {name: getattr(recipe, name) for name in type(recipe).model_fields if name not in of_training}

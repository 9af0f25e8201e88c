"""The tasks that workers compute and jobs share. Their digest is their identity (docs/architecture.md, "The nouns").

A change of a default or of a number's meaning bumps the `version` of that kind and type (`versions.py`).
"""

from typing import Annotated, Literal

from pydantic import Field

from service.model.names import DIGEST_PATTERN
from service.specs.attacks import Apgd, Attack, Eps, Norm, Pgd, Steps, StepSize
from service.specs.base import Order, Scale, Spec, Truth, Whole
from service.specs.measures import Measure
from service.specs.recipes import AnyRecipe

Digest = Annotated[str, Field(pattern=DIGEST_PATTERN)]
Version = Annotated[Whole, Field(ge=1)]
MarginTwin = Annotated[Pgd | Apgd, Field(discriminator="type")]


class DatasetRef(Spec):
    """A data set by name; a lab's own (`npz:NAME`) also by the SHA-256 of its files."""

    name: str
    train_sha256: Digest | None = None
    test_sha256: Digest | None = None


class TrainTask(Spec):
    """Train a network; makes a checkpoint."""

    kind: Literal["train"] = "train"
    version: Version = 1
    architecture: str
    dataset: DatasetRef
    recipe: AnyRecipe
    seed: Whole = 0
    replicate: Whole = 0


class MeasureTask(Spec):
    """One sharpness measure of a checkpoint at a scale; `samples` as in an attack."""

    kind: Literal["measure"] = "measure"
    version: Version = 1
    checkpoint: Digest
    measure: Measure
    scale: Scale = 1.0
    scale_bias: Truth = True
    samples: Whole
    order: Order = "permutation"


class AttackTask(Spec):
    """One attack on a checkpoint at a scale, with its trajectory, on the first `samples` test images.

    `source` is the training of the network that a transfer's examples are made on, where it is another one.
    With `arrays` the trajectory of every example is kept as an artifact (safetensors), beside its quantiles.
    """

    kind: Literal["attack"] = "attack"
    version: Version = 1
    checkpoint: Digest
    attack: Attack
    scale: Scale = 1.0
    scale_bias: Truth = True
    attack_seed: Whole = 0
    samples: Whole
    order: Order = "permutation"
    source: Digest | None = None
    arrays: Truth = False


class ControlTask(Spec):
    """The panel of controls of a checkpoint and an attack geometry, at s = 1, on the first `samples` test images.

    `twin` is the attack with the margin loss, where that is another one than PGD from the image in this geometry.
    """

    kind: Literal["control"] = "control"
    version: Version = 1
    checkpoint: Digest
    norm: Norm
    eps: Eps
    step_size: StepSize
    steps: Steps
    samples: Whole
    order: Order = "permutation"
    twin: MarginTwin | None = None


Task = Annotated[TrainTask | MeasureTask | AttackTask | ControlTask, Field(discriminator="kind")]

"""JobSpec: one benchmark cell, as a user writes it and as it is fully spelled out."""

import re
from collections import Counter
from functools import lru_cache
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails

from service.model.names import OWN_DATASET, REGISTERED
from service.specs import catalog
from service.specs.attacks import ATTACKS, PRESETS, Attack
from service.specs.base import Order, Scale, Spec, Truth, Whole, across
from service.specs.canonical import canonical
from service.specs.fitting import Images, misfits
from service.specs.measures import CLOSED_FORM_QUANTITIES, MEASURES, Measure
from service.specs.names import Architecture, NamedRecipe, check_known
from service.specs.recipes import AnyRecipe, Imported, Standard

SAMPLES = 1000  # the default
AUGMENTATION = ("crop_padding", "flip", "rotation_degrees")
OWN_DATASET_NAME = re.compile(OWN_DATASET + REGISTERED.pattern)


def _dataset(value: object) -> object:
    if not (isinstance(value, str) and OWN_DATASET_NAME.fullmatch(value)):
        check_known("dataset", value, catalog.DATASETS, f"{OWN_DATASET}NAME (after `uncanny data add NAME DIR`)")
    return value


def _attack(value: object) -> object:
    if isinstance(value, str):
        check_known("attack", value, PRESETS, *(f"{{type: {name}, ...}}" for name in ATTACKS))
        return PRESETS[value]
    if isinstance(value, dict):
        check_known("attack type", value.get("type"), ATTACKS)
    return value


def _measures(value: object) -> object:
    """Names become specs. Closed forms are always measured, so naming them or one of their quantities adds nothing."""
    if not isinstance(value, (list, tuple)):
        return value
    specs = [{"type": item} if isinstance(item, str) else item for item in value]
    for item in specs:
        if isinstance(item, dict):
            check_known("measure", item.get("type"), [*MEASURES, *CLOSED_FORM_QUANTITIES])
    closed = {"closed_forms", *CLOSED_FORM_QUANTITIES}
    return tuple(item for item in specs if not (isinstance(item, dict) and item.get("type") in closed))


JobAttack = Annotated[Attack, BeforeValidator(_attack, json_schema_input_type=Attack | str)]
JobMeasures = Annotated[tuple[Measure, ...], BeforeValidator(_measures, json_schema_input_type=list[Measure | str])]


class JobSpec(Spec):
    """One benchmark cell: train `architecture` on `dataset`, scale its head by `scale`, measure it and attack it."""

    architecture: Architecture
    dataset: Annotated[str, BeforeValidator(_dataset), Field(examples=["cifar10", "npz:my_images"])]
    scale: Scale = 1.0
    attack: JobAttack
    scale_bias: Truth = True
    attack_seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    recipe: NamedRecipe = Standard()
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    measures: JobMeasures = ()
    samples: Annotated[
        Whole,
        Field(
            ge=1,
            le=1_000_000,
            description="The first so many of one fixed permutation; left out: 1,000, or all of a smaller test set.",
        ),
    ] = SAMPLES
    order: Annotated[Order, Field(description="The first samples of one fixed permutation, or of the file.")] = (
        "permutation"
    )
    arrays: Truth = Field(default=False, description="Keep every example's trajectory as an artifact (safetensors).")
    replicate: Annotated[Whole, Field(ge=0, lt=2**31, description="Another number forces an independent rerun.")] = 0

    @model_validator(mode="before")
    @classmethod
    def _samples_left_out(cls, written: object) -> object:
        """Fill in the default. Only planning knows the size of a lab's own data set."""
        if not isinstance(written, dict) or "samples" in written or not isinstance(written.get("dataset"), str):
            return written
        dataset = catalog.DATASETS.get(written["dataset"])
        return written if dataset is None else {**written, "samples": min(SAMPLES, dataset.test)}

    @model_validator(mode="before")
    @classmethod
    def _checkpoint(cls, written: object) -> object:
        """`"checkpoint": NAME_OR_DIGEST` in place of recipe and seed is short for the recipe that imports it."""
        if not isinstance(written, dict) or written.get("checkpoint") is None:
            return written
        if twice := [name for name in ("recipe", "seed") if name in written]:
            raise ValueError(f"`checkpoint` stands in place of `{twice[0]}`: leave one of the two out")
        others = {name: value for name, value in written.items() if name != "checkpoint"}
        return {**others, "recipe": {"name": "imported", "checkpoint": written["checkpoint"]}}

    @field_validator("samples")
    @classmethod
    def _enough_images(cls, samples: int, info: ValidationInfo) -> int:
        dataset = info.data.get("dataset", "")
        images = catalog.DATASETS.get(dataset)
        if images is not None and samples > images.test:
            raise across(f"{dataset} has {images.test} test images, {samples} were asked for")
        return samples

    @field_validator("scale_bias")
    @classmethod
    def _nothing_is_scaled(cls, scale_bias: bool, info: ValidationInfo) -> bool:
        """At s = 1 both conventions are one job; a transfer's source has a scale of its own."""
        scales = (info.data.get("scale"), getattr(info.data.get("attack"), "source_scale", 1.0))
        return scale_bias or scales == (1.0, 1.0)

    @field_validator("measures")
    @classmethod
    def _once_each(cls, measures: tuple[Measure, ...]) -> tuple[Measure, ...]:
        """In one order, so that jobs which ask for the same are equal."""
        twice = [kind for kind, count in Counter(measure.type for measure in set(measures)).items() if count > 1]
        if twice:
            raise ValueError(
                f"{twice[0]} is there with several parameters, and a result has one number of each name: ask for the "
                "others in a job of their own (all else that they need is shared)"
            )
        return tuple(sorted(set(measures), key=canonical))

    @model_validator(mode="after")
    def _suits_its_images(self) -> Self:
        """Only planning knows shape and classes of a lab's own data set, and checks them then."""
        info = catalog.DATASETS.get(self.dataset)
        images = Images(info.shape, info.classes, info.train) if info else None
        problems = misfits(self.architecture, self.recipe, self.attack, images)
        if problems:
            errors = [
                InitErrorDetails(type=across(sentence), loc=path, input=self.attack) for path, sentence in problems
            ]
            raise ValidationError.from_exception_data("JobSpec", errors)
        return self

    def augmented(self, recipe: AnyRecipe) -> AnyRecipe:
        """The recipe with its augmentation spelled out: fields that were left out get what suits the data set."""
        return _augmented(recipe, self.dataset)

    def as_asked(self, recipe: AnyRecipe) -> AnyRecipe:
        """The shortest recipe for this training: without augmentation fields, if they are what suits the data set."""
        if isinstance(recipe, Imported):
            return recipe
        shorter = recipe.model_copy(update=dict.fromkeys(AUGMENTATION))
        return shorter if self.augmented(shorter) == self.augmented(recipe) else recipe

    def __str__(self) -> str:
        attack = getattr(self.attack, "norm", "")
        name = f"{self.attack.type} {attack}".strip()
        return f"job({self.architecture}, {self.dataset}, s={self.scale:g}, {name}, seed={self.seed})"


@lru_cache(maxsize=1000)
def _augmented(recipe: AnyRecipe, dataset: str) -> AnyRecipe:
    if isinstance(recipe, Imported):
        return recipe
    suits = catalog.DATASETS.get(dataset, catalog.DatasetInfo((0, 0, 0), 0, 0, 0, ""))
    left_out = (name for name in AUGMENTATION if getattr(recipe, name) is None)
    return recipe.model_copy(update={name: getattr(suits, name) for name in left_out})

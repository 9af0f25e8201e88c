"""Whether a job suits images of one shape with so many classes, checked before anything is computed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from service.specs import catalog
from service.specs.attacks import PRESETS, AnyAttack, Apgd, AutoAttack, Fgsm, Pgd, Transfer
from service.specs.recipes import AnyRecipe, Imported

Problem = tuple[tuple[str, ...], str]
"""The path of a field of a job, and a sentence."""


@dataclass(frozen=True)
class Images:
    """The images of a data set: `shape` (C, H, W), how many classes they have, and how many are to `train` on."""

    shape: tuple[int, int, int]
    classes: int
    train: int


def misfits(architecture: str, recipe: AnyRecipe, attack: AnyAttack, images: Images | None) -> list[Problem]:
    """Why `attack` on a network of this architecture and recipe cannot be computed; empty if it can.

    Without `images`, as for a lab's own data set before planning, only checks that need none are made.
    """
    problems = [
        *_of_network(("architecture",), architecture, images),
        *_of_training(("recipe",), recipe, images),
    ]
    path: tuple[str, ...] = ("attack",)
    attacked, climbed = attack, architecture
    if isinstance(attack, Transfer):
        if attack.source is not None:
            climbed = attack.source.architecture
            problems += _of_network(("attack", "source", "architecture"), climbed, images)
            problems += _of_training(("attack", "source", "recipe"), attack.source.recipe, images)
        path, attacked = ("attack", "attack"), attack.attack
    if getattr(attacked, "fold_batch_norm", False) and not catalog.ARCHITECTURES[climbed].batch_norm:
        problems.append(((*path, "fold_batch_norm"), f"{climbed} has no batch norm to fold"))
    if images is not None:
        problems += ((_as_named(attack, where), sentence) for where, sentence in _of_attack(path, attacked, images))
    return problems


def _as_named(attack: AnyAttack, where: tuple[str, ...]) -> tuple[str, ...]:
    """A preset is one name, so an error points at the whole attack."""
    return where[:1] if attack in PRESETS.values() else where


def _of_network(path: tuple[str, ...], name: str, images: Images | None) -> Iterator[Problem]:
    if images is None:
        return
    least, multiple = catalog.ARCHITECTURES[name].min_side, catalog.ARCHITECTURES[name].multiple_of
    _, height, width = images.shape
    if min(height, width) < least:
        sentence = f"{name} takes images of at least {least}x{least} pixels, these are {height}x{width}"
        yield path, f"{sentence}: choose another network, such as resnet18, or larger images"
    elif height % multiple or width % multiple:
        sentence = f"{name} takes images whose sides are multiples of {multiple}, these are {height}x{width}"
        yield path, f"{sentence}: choose another network, or pad the images"


def _of_training(path: tuple[str, ...], recipe: AnyRecipe | None, images: Images | None) -> Iterator[Problem]:
    """A batch needs two images, and none is both trained on and held out."""
    if images is None or recipe is None or isinstance(recipe, Imported):
        return
    wanted, held_out = recipe.train_samples, getattr(recipe, "held_out", 0)
    if wanted is not None and wanted + held_out > images.train:
        apart = f" and {held_out:,} held out" if held_out else ""
        yield (
            (*path, "train_samples"),
            f"{wanted:,} images to train on{apart} were asked for, of {images.train:,} training images",
        )
    elif wanted is None and images.train - held_out < 2:
        left = max(images.train - held_out, 0)
        where = (*path, "held_out") if held_out else path
        yield where, f"{left} of {images.train:,} training images are left to train on, and a batch needs two"


def _of_attack(path: tuple[str, ...], attack: AnyAttack, images: Images) -> Iterator[Problem]:
    least, part, where = _classes(attack)
    if images.classes < least:
        yield (*path, *where), f"{part} needs at least {least} classes, the data set has {images.classes}"
    if isinstance(attack, Apgd) and attack.targeted:
        others, default = images.classes - 1, type(attack).model_fields["targets"].default
        if attack.targets > others and attack.targets != default:  # the default is "9, or all that there are"
            yield (*path, "targets"), f"{attack.targets} targets, but an image has {others} wrong classes"
    if getattr(attack, "norm", None) == "l2":
        diameter = math.sqrt(math.prod(images.shape))
        for length in ("eps", "step_size"):
            if (value := getattr(attack, length, 0.0)) > diameter:
                shape = "x".join(map(str, images.shape))
                yield (
                    (*path, length),
                    f"{value:g} is more than {diameter:.4g}, the l2 distance between the two {shape} images that are "
                    "furthest apart",
                )


def _classes(attack: AnyAttack) -> tuple[int, str, tuple[str, ...]]:
    """How many classes an attack needs, which part of it needs them, and the path of the field that says so."""
    if isinstance(attack, AutoAttack):
        return 4, "autoattack", ("type",)
    if isinstance(attack, (Pgd, Fgsm, Apgd)) and attack.loss == "dlr":
        return (4, "the targeted dlr loss", ("loss",)) if attack.targeted else (3, "the dlr loss", ("loss",))
    return 2, attack.type, ("type",)

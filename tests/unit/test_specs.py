"""What a job may say, and how what it may not say is refused: with the field named and, for names, those there are."""

import json
import math
import re
import time
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from api.http.schemas.jobs import JobSubmission
from service.errors import InvalidQuery
from service.model.query import Comparison, Value
from service.specs import AttackTask, ControlTask, JobSpec, MeasureTask, TrainTask, canonical, digest, problems
from service.specs.attacks import ATTACKS, PRESETS, Apgd, Fgsm, Pgd, Source, Transfer
from service.specs.base import number
from service.specs.catalog import ARCHITECTURES, DATASETS
from service.specs.fitting import Images, misfits
from service.specs.measures import MEASURES
from service.specs.recipes import RECIPES, Imported, Standard
from service.store.conditions import literal_of

JOB: dict[str, Any] = {"architecture": "resnet18", "dataset": "cifar10", "attack": "pgd_linf"}
PGD: dict[str, Any] = {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10}


def refused(**changed: Any) -> list[tuple[str, str]]:
    """The problems of a job that is wrong in what `changed` says."""
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({**JOB, **changed})
    return problems(caught.value)


def test_presets_are_names_of_attacks() -> None:
    assert JobSpec.model_validate(JOB).attack == Pgd(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10)
    for name, attack in PRESETS.items():
        assert JobSpec.model_validate({**JOB, "attack": name}).attack == attack


@pytest.mark.parametrize("name", ["adversarial", "trades"])
def test_the_literatures_recipes_have_names(name: str) -> None:
    spelled_out = {"name": name, "weight_decay": 5e-4, "keep": "best", "held_out": 1000}
    by_name, by_parameters = (
        JobSpec.model_validate({**JOB, "recipe": recipe}) for recipe in (f"{name}_literature", spelled_out)
    )
    assert digest(by_name) == digest(by_parameters)
    assert by_name.recipe.name == name
    with pytest.raises(ValidationError, match="known are: adversarial, adversarial_literature"):
        JobSpec.model_validate({**JOB, "recipe": "adversarial_litrature"})


@pytest.mark.parametrize("written", ["8/255", " 8 / 255 ", "0.03137254901960784", 8 / 255])
def test_numbers_may_be_fractions(written: Any) -> None:
    assert Fgsm(norm="l2", eps=written).eps == 0.03137254901960784


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**30))
def test_a_fraction_is_the_nearest_float(top: int, bottom: int) -> None:
    eps = abs(top) % (1000 * bottom + 1)
    assert Fgsm(norm="l2", eps=f"{eps}/{bottom}").eps == eps / bottom


@pytest.mark.parametrize(
    ("field", "wrong", "known"),
    [
        ("architecture", "resnet19", ARCHITECTURES),
        ("architecture", ["resnet18"], ARCHITECTURES),
        ("architecture", None, ARCHITECTURES),
        ("dataset", "cifar11", DATASETS),
        ("dataset", "npz:", ["npz:NAME"]),
        ("dataset", "npz:../../etc", ["npz:NAME"]),
        ("dataset", "npz:" + "x" * 101, ["npz:NAME"]),
        ("dataset", "npz:NAME (after `uncanny data add NAME DIR`)", DATASETS),
        ("attack", "pgd", [*PRESETS, "{type: pgd, ...}"]),
        ("attack", "{type: pgd, ...}", PRESETS),
        ("attack", {"type": "pdg"}, ATTACKS),
        ("attack", {}, ATTACKS),
        ("recipe", "adam", RECIPES),
        ("recipe", {"name": "adam"}, RECIPES),
        ("measures", ["flatness"], MEASURES),
        ("measures", [{"type": "flatness"}], MEASURES),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(field: str, wrong: Any, known: Any) -> None:
    [(pointer, sentence)] = refused(**{field: wrong})
    assert pointer == f"/{field}"
    assert sentence.startswith("unknown ")
    assert all(name in sentence for name in known)


@pytest.mark.parametrize(
    "wrong",
    [
        "9/0", "0/0", "1/2/3", "", "/", "nan", "inf", "-inf", "1e999", "eight", "8/x", float("nan"), float("inf"),
        True, False, None, [1], {}, -1, "-1/255", 1001, 10**400, "1" * 5000, "1/" + "9" * 5000, f"{10**400}/3",
    ],
    ids=lambda wrong: repr(wrong)[:12],
)  # fmt: skip
def test_what_is_no_eps(wrong: Any) -> None:
    [(pointer, sentence)] = refused(attack={**PGD, "eps": wrong})
    assert pointer == "/attack/eps"
    assert len(sentence) < 200


@pytest.mark.parametrize(
    "attack",
    [{**PGD, "eps": 8}, {"type": "fgsm", "norm": "linf", "eps": "8"}, {"type": "noise", "kind": "uniform", "eps": 8}],
    ids=lambda attack: attack["type"],
)
def test_eps_in_units_of_0_to_255_is_refused_with_what_was_meant(attack: dict[str, Any]) -> None:
    [(pointer, sentence)] = refused(attack=attack)
    assert pointer == "/attack/eps"
    assert "pixels are in [0, 1]" in sentence
    assert '"8/255"' in sentence


def test_so_is_a_step_and_both_are_lengths_in_l2() -> None:
    [(pointer, sentence)] = refused(attack={**PGD, "step_size": 2})
    assert (pointer, '"2/255"' in sentence) == ("/attack/step_size", True)
    assert JobSpec.model_validate({**JOB, "attack": {**PGD, "norm": "l2", "eps": 8, "step_size": 2}}).attack


def test_so_are_those_of_a_training_on_attacked_images() -> None:
    [(pointer, sentence)] = refused(recipe={"name": "adversarial", "eps": 8})
    assert (pointer, '"8/255"' in sentence) == ("/recipe/eps", True)
    assert refused(recipe={"name": "adversarial", "eps": -1})[0][0] == "/recipe/eps"


@pytest.mark.parametrize("wrong", [0, "0", -0.0, 1e-4, 10_001, "1e5", True, "5 / 0"])
def test_what_is_no_scale(wrong: Any) -> None:
    [(pointer, _)] = refused(scale=wrong)
    assert pointer == "/scale"


@pytest.mark.parametrize("written", [10, "10"])
def test_a_whole_number_however_it_is_written(written: Any) -> None:
    """Each is the same job, with the same digest."""
    body = {**JOB, "attack": {**PGD, "steps": written}, "recipe": {"name": "sam", "epochs": written}, "seed": written}
    body |= {"samples": written, "measures": [{"type": "sam_sharpness", "images": written}], "replicate": written}
    plain = json.loads(json.dumps(body).replace(json.dumps(written), "10"))
    job = JobSpec.model_validate(body)
    assert (canonical(job), job) == (canonical(JobSpec.model_validate(plain)), JobSpec.model_validate(plain))
    assert '"seed":10' in canonical(job)
    assert JobSubmission.model_validate({**body, "priority": written}).priority == 10


WITH_MORE = [10.0, "10.0", " 10 ", "1e1", "20/2"]
NOT_WHOLE = [True, 2.5, "2.5", 0, "0", -1, "-1", 10_001, "10_001", None, 10**400, 1e300, "1" * 5000, [10], ""]


@pytest.mark.parametrize("wrong", [*NOT_WHOLE, "1_0", "+10", "\u0661\u0660", "0x10", "ten", "010", *WITH_MORE])
def test_what_is_no_number_of_steps(wrong: Any) -> None:
    [(pointer, _)] = refused(attack={**PGD, "steps": wrong})
    assert pointer == "/attack/steps"


@pytest.mark.parametrize(
    ("changed", "pointer"),
    [
        ({"seed": -1}, "/seed"),
        ({"seed": 2**31}, "/seed"),
        ({"samples": 0}, "/samples"),
        ({"samples": 10_001}, "/samples"),
        ({"dataset": "digits", "samples": 501}, "/samples"),
        ({"replicate": True}, "/replicate"),
        ({"sclae": 5}, "/sclae"),
        ({"pgd": 5}, "/pgd"),
        ({"attack": {**PGD, "step": 1}}, "/attack/step"),
        ({"attack": {**PGD, "margin": 1}}, "/attack/margin"),
        ({"attack": {**PGD, "loss": "hinge"}}, "/attack/loss"),
        ({"attack": {k: v for k, v in PGD.items() if k != "eps"}}, "/attack/eps"),
        ({"attack": {"type": "transfer", "attack": {**PGD, "eps": "9/0"}}}, "/attack/attack/eps"),
        ({"attack": {"type": "transfer", "attack": "pgd_linf"}}, "/attack/attack"),
        ({"attack": {"type": "transfer", "attack": {"type": "cw"}}}, "/attack/attack"),
        (
            {"attack": {"type": "transfer", "attack": PGD, "source": {"architecture": "x"}}},
            "/attack/source/architecture",
        ),
        ({"recipe": {"epochs": 0}}, "/recipe/epochs"),
        ({"recipe": {"name": "sam", "rho": 0}}, "/recipe/rho"),
        ({"recipe": {"rho": 1}}, "/recipe/rho"),
        ({"recipe": {"crop_padding": True}}, "/recipe/crop_padding"),
        ({"measures": "sam_sharpness"}, "/measures"),
        ({"measures": ["sam_sharpness", {"type": "sam_sharpness", "rho": 0}]}, "/measures/1/rho"),
        ({"measures": [3]}, "/measures/0"),
        ({"measures": ["sam_sharpness", {"type": "sam_sharpness", "rho": 0.5}]}, "/measures"),
    ],
)
def test_the_pointer_is_where_the_user_wrote_it(changed: dict[str, Any], pointer: str) -> None:
    assert [found for found, _ in refused(**changed)] == [pointer]


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = refused(scale=0, seed=-1, attack={**PGD, "eps": "9/0", "steps": 0})
    assert {pointer for pointer, _ in found} == {"/scale", "/seed", "/attack/eps", "/attack/steps"}


@pytest.mark.parametrize("huge", ["1e999999999", "1e-999999999", "9" * 4000 + "/7", "x" * 1_000_000])
def test_no_number_is_worth_waiting_for(huge: str) -> None:
    started = time.process_time()
    assert refused(scale=huge)
    assert time.process_time() - started < 0.1


def test_a_long_value_is_not_repeated_at_length() -> None:
    [(_, sentence)] = refused(architecture="x" * 1_000_000)
    assert len(sentence) < 1000


def test_closed_forms_are_always_on_so_naming_them_adds_nothing() -> None:
    named = JobSpec.model_validate(
        {**JOB, "measures": ["closed_forms", "relative_sharpness", {"type": "top_eigenvalue"}]}
    )
    assert named == JobSpec.model_validate(JOB)


def test_a_recipe_may_be_a_name_or_only_what_differs() -> None:
    assert JobSpec.model_validate({**JOB, "recipe": "sam"}).recipe == RECIPES["sam"]()
    assert JobSpec.model_validate({**JOB, "recipe": {"epochs": 3}}).recipe == RECIPES["standard"](epochs=3)


def test_augmentation_suits_the_data_set_unless_it_is_spelled_out() -> None:
    def augmentation(dataset: str, **recipe: Any) -> tuple[int | None, bool | None, float | None]:
        job = JobSpec.model_validate({**JOB, "dataset": dataset, "recipe": recipe, "samples": 100})
        chosen = job.augmented(job.recipe)
        assert not isinstance(chosen, Imported)
        return chosen.crop_padding, chosen.flip, chosen.rotation_degrees

    assert augmentation("cifar10") == (4, True, 0.0)
    assert augmentation("cifar100") == (4, True, 15.0)
    assert augmentation("npz:mine") == (0, False, 0.0)
    assert augmentation("cifar10", flip=False, crop_padding=0) == (0, False, 0.0)


def test_specs_are_values() -> None:
    job = JobSpec.model_validate(JOB)
    assert hash(job) == hash(JobSpec.model_validate({**JOB, "scale": "1.0"}))
    with pytest.raises(ValidationError, match="frozen"):
        job.scale = 2.0  # type: ignore[misc]
    assert str(job) == "job(resnet18, cifar10, s=1, pgd linf, seed=0)"


NUMBERS: dict[str, float | None] = {
    "8/255": 8 / 255, " 8/255": 8 / 255, "8 / 255": 8 / 255, "1/1020": 0.25 / 255, "-0/7": 0.0, "0/7": 0.0,
    "8.0/255": None, "8/255.0": None, "0.25/255": None, ".5/.25": None, "8e0/255": None, "08/255": None, "1/0": None,
    "1e-3": 0.001, "1E+2": 100.0, "-0.0": 0.0, "0e-400": 0.0, "5e-324": 5e-324,
    "1e-400": None, "-1e-400": None, "1/" + "9" * 400: None, "0." + "0" * 400 + "1": None, "1e400": None,
    "1_0": None, "\u0661": None, "\uff11": None, "0x10": None, "0b1": None, "inf": None, "-Infinity": None, "nan": None,
    "+1": None, "010": None, ".5": 0.5, ".": None, "1.": None,
    "1e3/2": None, "8//255": None, "8/255\n": None, "8\xa0/255": None,
    "true": None, "yes": None, "on": None,
}  # fmt: skip
"""What texts say as numbers, None where they say none."""


@pytest.mark.parametrize("text", NUMBERS, ids=ascii)
def test_one_rule_says_which_texts_are_numbers(text: str) -> None:
    expected = NUMBERS[text]
    asked = Comparison("attack.eps", "=", (Value(text),))
    if expected is None:
        with pytest.raises(ValueError, match=r"not a number|too small|float64|divides by zero"):
            number(text)
        with pytest.raises(ValidationError):
            Fgsm(norm="l2", eps=text)
        with pytest.raises(InvalidQuery):
            literal_of("number", asked, asked.values[0])
    else:
        assert math.copysign(1, number(text)) == 1
        assert number(text) == Fgsm(norm="l2", eps=text).eps == literal_of("number", asked, asked.values[0]) == expected


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_that_we_print_is_read_as_the_same(value: float) -> None:
    assert number(repr(value)) == number(json.dumps(value)) == value


def test_the_fraction_that_a_refusal_proposes_is_one() -> None:
    [(_, sentence)] = refused(attack={**PGD, "eps": 8.5})
    [proposed] = re.findall('"(.*?)"', sentence)
    assert JobSpec.model_validate({**JOB, "attack": {**PGD, "eps": proposed}}).attack.eps == 8.5 / 255  # type: ignore[union-attr]


def test_numbers_and_truth_values_never_stand_for_each_other() -> None:
    kinds: list[type[BaseModel]] = [JobSpec, JobSubmission, *ATTACKS.values(), *RECIPES.values(), *MEASURES.values()]
    kinds += [TrainTask, MeasureTask, AttackTask, ControlTask, Source]
    seen = set()
    for kind in kinds:
        for name, field in kind.model_fields.items():
            annotated: Any = Annotated[field.annotation, *field.metadata, None]
            scalar = TypeAdapter(annotated)
            if re.search(r"\bbool\b", str(field.annotation)):
                wrongs: tuple[Any, ...] = (0, 1, 1.0, "true", "false", "yes", "on", "1", "")
            elif re.search(r"\b(int|float)\b", str(field.annotation)):
                wrongs = (True, False, "true", "")
            else:
                continue
            seen.add((kind, name))
            for wrong in wrongs:
                with pytest.raises(ValidationError):
                    scalar.validate_python(wrong)
    assert {(Pgd, "targeted"), (Pgd, "fold_batch_norm"), (Pgd, "eps"), (Pgd, "steps"), (JobSpec, "scale_bias")} <= seen
    assert {(RECIPES["sam"], "flip"), (RECIPES["sam"], "crop_padding"), (AttackTask, "arrays")} <= seen


L2 = {**PGD, "norm": "l2", "eps": 1, "step_size": 1}


@pytest.mark.parametrize(
    ("changed", "pointer", "said"),
    [
        ({"architecture": "vgg11_bn"}, "/architecture", "at least 32x32 pixels, these are 8x8"),
        ({"architecture": "densenet121"}, "/architecture", "at least 29x29 pixels, these are 8x8"),
        ({"architecture": "vgg11_bn", "dataset": "mnist"}, "/architecture", "these are 28x28"),
        ({"attack": {**L2, "eps": 8.01}}, "/attack/eps", "8.01 is more than 8, the l2 distance"),
        ({"attack": {**L2, "step_size": "8.01"}}, "/attack/step_size", "8.01 is more than 8"),
        ({"attack": {"type": "noise", "kind": "uniform", "norm": "l2", "eps": 9}}, "/attack/eps", "more than 8"),
        ({"attack": {"type": "transfer", "attack": {**L2, "eps": 9}}}, "/attack/attack/eps", "more than 8"),
        ({"attack": {**PGD, "fold_batch_norm": True}}, "/attack/fold_batch_norm", "mlp has no batch norm"),
        (
            {"attack": {"type": "transfer", "attack": PGD, "source": {"architecture": "vgg11_bn"}}},
            "/attack/source/architecture",
            "at least 32x32",
        ),
        (
            {
                "architecture": "resnet18",
                "attack": {
                    "type": "transfer",
                    "attack": {**PGD, "fold_batch_norm": True},
                    "source": {"architecture": "vit_tiny"},
                },
            },
            "/attack/attack/fold_batch_norm",
            "vit_tiny has no batch norm",
        ),
        (
            {"attack": {"type": "apgd", "norm": "linf", "eps": 0.1, "targeted": True, "targets": 10}},
            "/attack/targets",
            "10 targets, but an image has 9 wrong classes",
        ),
        (
            {"recipe": {"name": "standard", "train_samples": 1298}},
            "/recipe/train_samples",
            "1,298 images to train on were asked for, of 1,297 training images",
        ),
        (
            {"recipe": {"name": "trades", "keep": "best", "held_out": 298, "train_samples": 1000}},
            "/recipe/train_samples",
            "1,000 images to train on and 298 held out were asked for, of 1,297 training images",
        ),
        (
            {"recipe": {"name": "adversarial", "keep": "best", "held_out": 1296}},
            "/recipe/held_out",
            "1 of 1,297 training images are left to train on, and a batch needs two",
        ),
        (
            {
                "attack": {
                    "type": "transfer",
                    "attack": PGD,
                    "source": {"architecture": "mlp", "recipe": {"name": "sam", "train_samples": 2000}},
                },
            },
            "/attack/source/recipe/train_samples",
            "2,000 images to train on were asked for",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict[str, Any], pointer: str, said: str) -> None:
    [(found, sentence)] = refused(**{"architecture": "mlp", "dataset": "digits", **changed})
    assert found == pointer
    assert said in sentence


def test_what_just_goes_together_is_accepted() -> None:
    job = {"architecture": "mlp", "dataset": "digits", "attack": {**L2, "eps": 8, "step_size": "8.0"}}
    for recipe in (
        {"train_samples": 1297},
        {"name": "trades", "keep": "best", "held_out": 297, "train_samples": 1000},
        {"name": "adversarial", "keep": "best", "held_out": 1295},
    ):
        assert JobSpec.model_validate({**job, "recipe": recipe})
    assert JobSpec.model_validate(job)
    attack = {**PGD, "fold_batch_norm": True}
    made_on_another = {"type": "transfer", "attack": attack, "source": {"architecture": "resnet18"}}
    assert JobSpec.model_validate({**job, "attack": made_on_another})
    assert JobSpec.model_validate({**job, "architecture": "vgg11_bn", "dataset": "cifar10", "attack": attack})


@pytest.mark.parametrize("attack", [{}, {"source": {"architecture": "mlp"}}])
@pytest.mark.parametrize("preset", [*PRESETS, "targeted", "targeted_dlr"])
def test_attacks_need_as_many_classes_as_their_loss_looks_at(preset: str, attack: dict[str, Any]) -> None:
    chosen: Any = PRESETS.get(preset, PRESETS["apgd"])
    if preset == "targeted_dlr":
        chosen = chosen.model_copy(update={"loss": "dlr"})
    if preset.startswith("targeted"):
        chosen = chosen.model_copy(update={"targeted": True})
    least = {"apgd_dlr": 3, "autoattack": 4, "targeted_dlr": 4}.get(preset, 2)
    if isinstance(chosen, Pgd | Fgsm | Apgd):
        chosen = Transfer(attack=chosen, **attack) if attack else chosen
    for classes in range(2, 6):
        found = misfits("mlp", Standard(), chosen, Images((3, 8, 8), classes, 100))
        assert bool(found) == (classes < least), (classes, found)
        if found:
            [(path, sentence)] = found
            assert f"needs at least {least} classes, the data set has {classes}" in sentence
            assert "/".join(path) in {"attack", "attack/loss", "attack/attack/loss"}

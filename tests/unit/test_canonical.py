"""Digests name results for years: these literals may be added to, never changed (docs/architecture.md)."""

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from service.specs import (
    AttackTask,
    ControlTask,
    DatasetRef,
    JobSpec,
    MeasureTask,
    Sweep,
    TrainTask,
    canonical,
    digest,
    fields,
)
from service.specs.attacks import ATTACKS, PRESETS, Fgsm, Noise, Pgd, Source, Transfer
from service.specs.measures import MEASURES, ClosedForms
from service.specs.plan import plan_job
from service.specs.recipes import RECIPES, Recipe, Standard

CHECKPOINT = "c" * 64
CIFAR10 = DatasetRef(name="cifar10")

# The job of docs/architecture.md, as a user writes it.
DESIGN_JOB = {
    "architecture": "resnet18",
    "dataset": "cifar10",
    "scale": 5,
    "attack": {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10},
    "recipe": {"name": "standard", "epochs": 100},
    "seed": 0,
    "measures": ["relative_sharpness"],
    "samples": 1000,
}
DESIGN_TASKS = {
    "train": "4d41a2f0865011e4318336f7c056f4edc9d973f151d913a73c48c579ac79a90c",
    "closed_forms": "29c8b55fbf63076605b34a0cc0255ad40c3a10f266f9952489252a77fae546e0",
    "attack": "8d70af3d5ec86832be3573a2337517f1fa82edbb3d9806401aa0d606bc2ee67d",
    "baseline": "b847b50879c14314376da49040b07ba7f0748a81a18cfdcee48d588c9409e41f",
    "control": "28eef64c8d06c614194ca7544c0ebb323ec4b2a683e071f94850f50e480cc9ec",
}

# Each preset at s = 5 on 1,000 samples.
PRESET_DIGESTS = {
    "pgd_l2": "99538740d9966effd6f9c12ff077a258ed3a02ef43c5f0f32b4700d7384751b0",
    "pgd_l2_strong": "c53b9745622b20598119b597c7366e898e37cf041d67f5b651f64652a14a21d2",
    "pgd_linf": "7cb5edc5d71c71640e0d43dbde2ee03818b1cd2f1f90b47043642bb83bc42cb7",
    "pgd_linf_strong": "b8899e760ecf00f94408b55bc44b179e396090f290c6293c456c71a6c75102a0",
    "pgd_linf_fine": "efbd77078e5188384491c024110925946c8db08283a751869aa7427a1d0f1d03",
    "fgsm": "3239c7ee99a7e34da19a39d2ba8f779d145f3370c213650d8ab760036cf2ca04",
    "apgd": "f0fde40c268517fbf3e93d992f9d01b8bdb52c51b1d9964dd246a74e8f26bc3d",
    "apgd_dlr": "02601a5ca56a365481c319c1c142c83d03714394a92ead68b6fd401f6fd6bced",
    "square": "8a45762ae2172fc2103fcddae4dbe3ed68622c74651ef0126fa32a40f8560a83",
    "autoattack": "e0185c4c82df732ad5c6bd2f85b01422b4518510c550b67794a9bfcde567d74e",
    "cw": "1761efae9f111b6c24bc9ea08fde11e151ac21f97f5caea0ee7a0b03645b733c",
    "noise": "79e55af547bfb452f8bb4abc6c8a2f7b8862d29a84d155647b61c022d378ec05",
    "noise_uniform": "c8b7581ae255f74fa61e390d2acf31586836ed062587daf283492f1ce9c7ad2e",
    "transfer": "ee398f9f95fee5e105d884bda438b150e8b0538dbc51aeb53a6d82dd797cf4d7",
}
RECIPE_DIGESTS = {
    "standard": "3efad0da159e14d98ef25caac157ce45529cda9f32a509ebbc88cdc3e83b40ae",
    "label_smoothing": "381b28c6ff33224b0a3d504d8ee8664782a1abfc318e54b19a41397ed3ea7687",
    "margin": "aaa2e0e191068bba33702ab63b9869985dac74cd41955f0df960c3269869ce48",
    "adversarial": "258d0daa90af6a897e50d033602df8137ce57d8780d635aea5a3a7391692692f",
    "trades": "d2f479cb9e68f925c0b4f9ba8fcd3954b8753f350fba9e89a3ab46df6f190d7c",
    "sam": "752bc745337b6cf1ecd7d68757964fa54d2a0814d9043f8034399c53840233d9",
    "relative_flatness": "d3d8c0eda66f3dc8df8796c441f33a1c9e84d0cb51ab5e90129821d4bfe88965",
}
CLOSED_FORMS_DIGEST = "0635069540ac6c052a2c9561333a1bb62d0ef1fcc6e0bce862b5d05eee8c2c45"
OWN_DATASET_DIGEST = "f1f0619683df0b7d474f971d4721a8e3ea5b211352083dbac067475910a1d81f"

# Fields at their default are left out of a digest, so a default that changes would silently change what a digest
# means: it needs a new `version` of the task. New fields are added here with the default that they begin with.
NUMERICS = {"precision": "float32", "channels_last": False, "fold_batch_norm": False, "compile": False}
EIGHT, TWO = 8 / 255, 2 / 255
FROZEN: dict[str, dict[str, Any]] = {
    "TrainTask": {"seed": 0, "replicate": 0},
    "MeasureTask": {"scale": 1.0, "scale_bias": True, "order": "permutation"},
    "AttackTask": {
        "scale": 1.0, "scale_bias": True, "attack_seed": 0, "order": "permutation", "source": None, "arrays": False,
    },
    "ControlTask": {"order": "permutation", "twin": None},
    "DatasetRef": {"train_sha256": None, "test_sha256": None},
    "Source": {"recipe": None, "seed": 0, "replicate": 0},
    "Recipe": {
        "epochs": 100, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine",
        "crop_padding": None, "flip": None, "rotation_degrees": None, "train_samples": None, "precision": "float32",
        "channels_last": False, "compile": False, "cuda_graphs": False,
    },
    "LabelSmoothing": {"smoothing": 0.1},
    "Adversarial": {"eps": EIGHT, "step_size": TWO, "steps": 10, "keep": "last", "held_out": 0},
    "Trades": {
        "eps": EIGHT, "step_size": TWO, "steps": 10, "keep": "last", "held_out": 0, "beta": 6.0, "start_std": 0.001,
    },
    "Sam": {"rho": 0.05},
    "RelativeFlatness": {"strength": 1e-3},
    "Pgd": {
        **NUMERICS, "random_start": False, "restarts": 1, "targeted": False, "loss": "cross_entropy", "judge": "final",
    },
    "Fgsm": {**NUMERICS, "loss": "cross_entropy", "targeted": False},
    "Apgd": {
        **NUMERICS, "steps": 100, "restarts": 1, "rho": 0.75, "loss": "cross_entropy", "targeted": False, "targets": 9,
    },
    "Square": {**NUMERICS, "queries": 5000, "p_init": 0.8},
    "AutoAttack": NUMERICS,
    "Cw": {**NUMERICS, "c": 10.0, "kappa": 20.0, "lr": 0.01, "steps": 25},
    "Noise": {**NUMERICS, "kind": "gaussian", "norm": "linf", "eps": EIGHT, "points": 10, "draws": 1},
    "Transfer": {"source_scale": 1.0, "source": None},
    "HessianTraceNetwork": {"images": 1024, "probes": 100},
    "TopEigenvalueNetwork": {"images": 1024, "iterations": 50, "tolerance": 1e-4},
    "SamSharpness": {"images": 1024, "rho": 0.05, "m": 128},
    "AsamSharpness": {"images": 1024, "rho": 0.5, "eta": 0.01, "m": 128},
    "AdaptiveAverage": {"images": 1024, "rho": 0.1, "draws": 10},
    "AdaptiveWorst": {"images": 1024, "rho": 0.002, "steps": 20, "m": 128},
    "FisherRao": {"images": 1024},
    "PacBayesFlatness": {"images": 1024, "drop": 0.1, "draws": 10, "bisections": 15},
    "InputGradientNorm": {"images": 10_000},
    "InputCurvature": {"images": 1024, "iterations": 20},
    "Lipschitz": {"images": 256, "iterations": 20},
    "Detector": {"images": 1000, "eps": EIGHT, "step_size": TWO, "steps": 10},
}  # fmt: skip


def attack_task(**changed: Any) -> AttackTask:
    return AttackTask(
        **{"checkpoint": CHECKPOINT, "attack": PRESETS["pgd_linf"], "scale": 5, "samples": 1000, **changed}
    )


def test_tasks_of_the_job_in_the_design() -> None:
    """Those of version 1, whatever the version is now; and a bumped version is another digest."""
    plan = plan_job(JobSpec.model_validate(DESIGN_JOB), CIFAR10)
    specs = {part: getattr(plan, part).spec for part in DESIGN_TASKS}
    first = {part: digest(spec.model_copy(update={"version": 1})) for part, spec in specs.items()}
    assert first == DESIGN_TASKS
    for part, spec in specs.items():
        assert getattr(plan, part).digest == digest(spec)
        assert (digest(spec) == first[part]) == (spec.version == 1)
    assert digest(plan.job) == "afdfcb94d098fe2a707d1ab294c8eb84911833738874470786eb0a3335e4adcd"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    assert digest(attack_task(attack=PRESETS[name])) == PRESET_DIGESTS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    task = TrainTask.model_validate({"architecture": "resnet18", "dataset": CIFAR10, "recipe": {"name": name}})
    assert digest(task) == RECIPE_DIGESTS[name]


def test_closed_forms() -> None:
    task = MeasureTask(checkpoint=CHECKPOINT, measure=ClosedForms(), scale=5, samples=1000)
    assert digest(task) == CLOSED_FORMS_DIGEST


def test_a_labs_own_images_are_named_by_their_bytes() -> None:
    own = DatasetRef(name="npz:mine", train_sha256="a" * 64, test_sha256="b" * 64)
    assert digest(TrainTask(architecture="mlp", dataset=own, recipe=Standard())) == OWN_DATASET_DIGEST


def test_defaults_are_frozen() -> None:
    kinds: list[type[BaseModel]] = [
        TrainTask, MeasureTask, AttackTask, ControlTask, DatasetRef, Source, Recipe,
        *RECIPES.values(), *ATTACKS.values(), *MEASURES.values(),
    ]  # fmt: skip
    for kind in kinds:
        inherited = Recipe.model_fields if issubclass(kind, Recipe) and kind is not Recipe else {}
        identity = {"version", "type", "name"} | (set() if kind is Noise else {"kind"})
        found = {
            name: field.get_default(call_default_factory=True)
            for name, field in kind.model_fields.items()
            if not field.is_required() and name not in identity
        }
        assert {name: found[name] for name in found if name not in inherited} == FROZEN.get(kind.__name__, {}), kind


def test_the_canonical_form_can_be_looked_at() -> None:
    task = attack_task()
    assert fields(task) == {
        "kind": "attack",
        "version": 1,
        "checkpoint": CHECKPOINT,
        "attack": {"type": "pgd", "norm": "linf", "eps": EIGHT, "step_size": TWO, "steps": 10},
        "scale": 5.0,
        "samples": 1000,
    }
    assert canonical(task) == (
        '{"attack":{"eps":0.03137254901960784,"norm":"linf","step_size":0.00784313725490196,"steps":10,"type":"pgd"},'
        f'"checkpoint":"{CHECKPOINT}","kind":"attack","samples":1000,"scale":5.0,"version":1}}'
    )


def test_fractions_and_decimals_are_the_same_number() -> None:
    written = [{**DESIGN_JOB["attack"], "eps": eps} for eps in ("8/255", 0.03137254901960784, "0.03137254901960784")]  # type: ignore[dict-item]
    assert len({digest(JobSpec.model_validate({**DESIGN_JOB, "attack": attack})) for attack in written}) == 1


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, "0", "-0.0", "0/7", "-0e-400"])
def test_there_is_one_zero(zero: Any) -> None:
    assert canonical(Fgsm(norm="l2", eps=zero)) == '{"eps":0.0,"norm":"l2","type":"fgsm"}'


def test_jobs_that_ask_for_the_same_have_one_digest() -> None:
    """The order of measures, repeated ones, and whether a bias is scaled by 1, are no part of what is computed."""
    job = {**DESIGN_JOB, "scale": 1}
    measures: list[Any] = ["sam_sharpness", {"type": "lipschitz", "images": 8}, "fisher_rao"]
    same: list[dict[str, Any]] = [
        {"measures": order} for order in (measures, measures[::-1], [*measures, "fisher_rao"])
    ]
    same += [{"measures": measures, "scale_bias": False}]
    assert len({digest(JobSpec.model_validate({**job, **change})) for change in same}) == 1
    plans = [plan_job(JobSpec.model_validate({**job, **change}), CIFAR10) for change in same]
    assert len({plan.measures for plan in plans}) == 1
    source = {"type": "transfer", "attack": DESIGN_JOB["attack"], "source_scale": 5}
    for change in ({"scale": 5}, {"attack": source}):  # here something is scaled
        two = [JobSpec.model_validate({**job, **change, "scale_bias": scale_bias}) for scale_bias in (True, False)]
        assert digest(two[0]) != digest(two[1])


def test_any_other_value_of_any_field_changes_the_digest() -> None:
    changed: list[AttackTask] = [
        attack_task(**change)
        for change in (
            {"checkpoint": "d" * 64}, {"scale": 2.5}, {"scale_bias": False}, {"samples": 999}, {"attack_seed": 1},
            {"source": "e" * 64}, {"arrays": True}, {"attack": PRESETS["fgsm"]}, {"order": "file"},
        )
    ]  # fmt: skip
    pgd = {"norm": "l2", "eps": 0.1, "step_size": 0.1, "steps": 3, "random_start": True, "restarts": 2} | {
        "targeted": True, "loss": "margin", "judge": "any_step", "precision": "bf16", "channels_last": True,
        "fold_batch_norm": True, "compile": True,
    }  # fmt: skip
    assert set(pgd) == set(Pgd.model_fields) - {"type"}
    for name, value in pgd.items():
        changed.append(attack_task(attack=PRESETS["pgd_linf"].model_copy(update={name: value})))
    digests = [digest(task) for task in (attack_task(), *changed)]
    assert len(set(digests)) == len(digests)


def test_writing_a_default_out_changes_nothing() -> None:
    spelled = Pgd(norm="linf", eps=EIGHT, step_size=TWO, steps=10, restarts=1, random_start=False, judge="final")
    assert digest(attack_task(attack=spelled, attack_seed=0, scale_bias=True)) == digest(attack_task())


def test_a_new_option_with_a_default_changes_no_old_digest() -> None:
    class LaterPgd(Pgd):
        momentum: float = 0.0

    class LaterTask(AttackTask):
        attack: LaterPgd
        warm_start: bool = False

    old = {"checkpoint": CHECKPOINT, "attack": PRESETS["pgd_linf"].model_dump(), "scale": 5, "samples": 1000}
    assert digest(LaterTask.model_validate(old)) == digest(attack_task())
    assert digest(LaterTask.model_validate({**old, "warm_start": True})) != digest(attack_task())


def test_another_version_is_another_digest() -> None:
    class NextTask(AttackTask):
        version: Literal[2] = 2

    assert digest(NextTask.model_validate(attack_task().model_dump() | {"version": 2})) != digest(attack_task())


def test_kinds_never_meet() -> None:
    pgd = PRESETS["pgd_linf"]
    assert isinstance(pgd, Pgd)
    made_by = Transfer(attack=pgd)
    assert len({digest(attack_task(attack=attack)) for attack in (pgd, made_by, Noise(), PRESETS["cw"])}) == 4


def test_a_spec_and_its_stored_json_have_the_same_digest() -> None:
    sweep = Sweep(
        name="all",
        base={"architecture": "mlp", "dataset": "digits", "samples": 100},
        grid={"attack": list(PRESETS), "recipe": list(RECIPES), "measures": [[name] for name in MEASURES]},
    )
    for job in sweep.cells():
        assert digest(JobSpec.model_validate_json(job.model_dump_json())) == digest(job)
        for planned in plan_job(job, DatasetRef(name="digits")).tasks.values():
            stored = json.loads(planned.spec_json)
            assert digest(type(planned.spec).model_validate(stored)) == planned.digest


WITHOUT_EFFECT: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (ATTACKS["noise"], {}, {"norm": "l2"}),
    (ATTACKS["noise"], {"draws": 3}, {"draws": 3, "eps": 0.3}),
    (ATTACKS["apgd"], {"norm": "linf", "eps": 0.1}, {"norm": "linf", "eps": 0.1, "targets": 3}),
    (RECIPES["sam"], {"epochs": 1}, {"epochs": 1, "schedule": "constant"}),
    (RECIPES["adversarial"], {"eps": 0}, {"eps": 0, "steps": 3, "step_size": 0.5}),
    (RECIPES["trades"], {"eps": 0, "start_std": 0.1}, {"eps": 0, "start_std": 0.1, "steps": 3}),
    (MEASURES["sam_sharpness"], {"images": 64}, {"images": 64, "m": 64}),
    (MEASURES["asam_sharpness"], {"images": 64}, {"images": 64, "m": 5000}),
    (MEASURES["adaptive_worst"], {"images": 500, "m": 500}, {"images": 500, "m": 501}),
]
WITH_EFFECT: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (ATTACKS["noise"], {"kind": "uniform"}, {"kind": "uniform", "norm": "l2"}),
    (
        ATTACKS["apgd"],
        {"norm": "linf", "eps": 0.1, "targeted": True},
        {"norm": "linf", "eps": 0.1, "targeted": True, "targets": 3},
    ),
    (RECIPES["sam"], {"epochs": 2}, {"epochs": 2, "schedule": "constant"}),
    (RECIPES["trades"], {"eps": 0}, {"eps": 0, "start_std": 0.1}),
    (RECIPES["adversarial"], {"eps": 0.1}, {"eps": 0.1, "steps": 3}),
    (MEASURES["sam_sharpness"], {"images": 65}, {"images": 65, "m": 64}),
]


@pytest.mark.parametrize(("kind", "one", "other"), WITHOUT_EFFECT)
def test_an_option_without_effect_changes_no_digest(kind: Any, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Nor does it once the spec was stored and is read again."""
    specs = [kind(**one), kind(**other)]
    assert specs[0] == specs[1]
    assert digest(specs[0]) == digest(specs[1]) == digest(kind.model_validate_json(specs[1].model_dump_json()))


@pytest.mark.parametrize(("kind", "one", "other"), WITH_EFFECT)
def test_the_same_option_changes_it_where_it_has_an_effect(
    kind: Any, one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert digest(kind(**one)) != digest(kind(**other))

"""Whatever a job may ask of the two networks with attention is computed and finite.

Tiny, but as a worker runs it: each recipe, attack, measure and bound, and each way in which gradients are taken.
"""

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

from service.lab.artifacts import Artifacts
from service.model.executor import ArtifactRef, Bundle, Grant, Outcome, Succeeded
from service.specs import DatasetRef, JobSpec
from service.specs.attacks import ATTACKS, Loss
from service.specs.measures import MEASURES
from service.specs.plan import JobPlan, PlannedTask, plan_job
from service.specs.recipes import RECIPES
from workers import run
from workers.context import Context

NETWORKS = {  # with a recipe that gets four of five digits right within a minute
    "vit_tiny": {"epochs": 8, "train_samples": 512, "batch_size": 32, "lr": 0.01},
    "attention_resnet50d": {"epochs": 4, "train_samples": 256, "batch_size": 16, "lr": 0.03},
}
PGD = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.05, "steps": 2}
NUMERICS = ({"precision": "bf16"}, {"channels_last": True}, {"fold_batch_norm": True})
LOSSES = get_args(Loss)
ATTACKS_TRIED: dict[str, dict[str, Any]] = {
    **{f"pgd {loss}": {**PGD, "loss": loss} for loss in LOSSES},
    **{f"pgd targeted {loss}": {**PGD, "loss": loss, "targeted": True} for loss in ("cross_entropy", "dlr")},
    **{f"pgd {'+'.join(options)}": {**PGD, **options} for options in NUMERICS},
    "pgd l2": {**PGD, "norm": "l2", "restarts": 2, "judge": "any_step"},
    "fgsm": {"type": "fgsm", "norm": "linf", "eps": 0.1},
    "apgd": {"type": "apgd", "norm": "linf", "eps": 0.1, "steps": 3},
    "apgd dlr": {"type": "apgd", "norm": "l2", "eps": 0.5, "steps": 3, "loss": "dlr", "targeted": True, "targets": 2},
    "square": {"type": "square", "norm": "linf", "eps": 0.1, "queries": 5},
    "autoattack": {"type": "autoattack", "norm": "linf", "eps": 0.1},
    "cw": {"type": "cw", "steps": 2},
    "noise": {"type": "noise", "points": 2},
    "transfer": {"type": "transfer", "attack": PGD, "source_scale": 5},
}
CHEAPER = {"images": 32, "m": 16, "draws": 2, "probes": 2, "iterations": 2, "steps": 2, "bisections": 2}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # AutoAttack takes 7,000 passes of one image


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = tmp_path_factory.mktemp("combinations")
    return Context(Artifacts(str(root / "artifacts")), root / "data")


def planned(architecture: str, **changes: Any) -> JobPlan:
    recipe = {"epochs": 1, "train_samples": 16, "batch_size": 8, "lr": 0.01, **changes.pop("recipe", {})}
    base = {"architecture": architecture, "dataset": "digits", "scale": 5, "samples": 4, "attack": "fgsm"}
    return plan_job(JobSpec.model_validate({**base, "recipe": recipe, **changes}), DatasetRef(name="digits"))


def done(context: Context, plan: JobPlan, task: PlannedTask, checkpoint: ArtifactRef | None = None) -> Outcome:
    bundle = Bundle("b", (Grant("t", 1, task.digest, task.stored_spec),), plan.train.stored_spec, checkpoint)
    last = list(run.execute(bundle, context))[-1]
    assert isinstance(last, Succeeded), last
    return last.outcome


@pytest.fixture(scope="module")
def trained(context: Context) -> dict[str, ArtifactRef]:
    plans = {name: planned(name, recipe=recipe) for name, recipe in NETWORKS.items()}
    return {name: done(context, plan, plan.train).artifacts[0] for name, plan in plans.items()}


def assert_finite(value: Any, where: str = "") -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            assert_finite(inner, f"{where}/{name}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            assert_finite(inner, f"{where}/{i}")
    elif isinstance(value, float):
        assert math.isfinite(value), where


def test_every_attack_is_tried() -> None:
    assert {attack["type"] for attack in ATTACKS_TRIED.values()} == set(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS_TRIED)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_attacks_with_their_trajectory_bounds_and_controls(
    architecture: str, attack: str, context: Context, trained: dict[str, ArtifactRef]
) -> None:
    """Where attack and network do not go together, the job is refused with the option named, and nothing is run."""
    asked = ATTACKS_TRIED[attack]
    if architecture == "vit_tiny" and asked.get("fold_batch_norm"):
        with pytest.raises(ValidationError, match="vit_tiny has no batch norm to fold"):
            planned(architecture, attack=asked)
        return
    plan = planned(architecture, attack=asked, samples=1 if asked["type"] == "autoattack" else 4)
    found = done(context, plan, plan.attack, trained[architecture])
    assert_finite([found.numbers, found.curves])
    assert 0 <= float(found.numbers["robust_accuracy"] or 0) <= float(found.numbers["clean_accuracy"] or 0)
    assert any(name.startswith("bound_violated_") for name in found.numbers)
    if attack in ("pgd cross_entropy", "pgd l2"):
        assert plan.control is not None
        assert_finite(done(context, plan, plan.control, trained[architecture]).numbers)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_measures(architecture: str, measure: str, context: Context, trained: dict[str, ArtifactRef]) -> None:
    cheaper: dict[str, float] = {
        name: value for name, value in CHEAPER.items() if name in MEASURES[measure].model_fields
    }
    if measure == "detector":  # which needs images that flip
        cheaper |= {"images": 64, "eps": 0.2, "step_size": 0.1}
    plan = planned(architecture, measures=[{"type": measure, **cheaper}])
    for task in (plan.closed_forms, *plan.measures):
        found = done(context, plan, task, trained[architecture])
        assert_finite([found.numbers, found.curves])
        assert any(isinstance(value, float) and value != 0 for value in found.numbers.values())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_recipes(architecture: str, recipe: str, context: Context) -> None:
    cheaper = {"steps": 1} if "steps" in RECIPES[recipe].model_fields else {}
    plan = planned(architecture, recipe={"name": recipe, **cheaper})
    found = done(context, plan, plan.train)
    assert_finite([found.numbers, found.curves])
    assert found.artifacts[0].kind == "checkpoint"

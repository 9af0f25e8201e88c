"""Which tasks a job needs, and which of them jobs share."""

import gc
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from service.specs import AttackTask, ControlTask, DatasetRef, JobSpec, Sweep
from service.specs.attacks import Apgd, Pgd
from service.specs.plan import JobPlan, plan_job

DIGITS = DatasetRef(name="digits")
BASE: dict[str, Any] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 100}
SCALES = [0.25, 0.5, 1, 2.5, 5, 10, 50]


def plan(**changed: Any) -> JobPlan:
    return plan_job(JobSpec.model_validate({**BASE, **changed}), DIGITS)


def test_a_job_needs_a_training_a_measure_two_attacks_and_a_panel() -> None:
    found = plan(scale=5)
    assert Counter(task.spec.kind for task in found.tasks.values()) == {
        "train": 1, "measure": 1, "attack": 2, "control": 1,
    }  # fmt: skip
    assert next(iter(found.tasks.values())) is found.train
    assert {task.parents for task in found.tasks.values()} == {(), (found.train.digest,)}
    assert isinstance(found.baseline.spec, AttackTask)
    assert found.baseline.spec.scale == 1.0


def test_at_scale_one_the_attack_is_its_own_baseline() -> None:
    found = plan(scale=1)
    assert found.attack == found.baseline
    assert len(found.tasks) == 4


def test_at_scale_one_both_conventions_of_the_bias_are_one_task() -> None:
    assert plan(scale=1, scale_bias=False).tasks.keys() == plan(scale=1).tasks.keys()
    assert plan(scale=5, scale_bias=False).attack.digest != plan(scale=5).attack.digest


def test_but_not_where_the_source_of_a_transfer_is_scaled() -> None:
    moved = {"type": "transfer", "attack": {"type": "fgsm", "norm": "linf", "eps": 0.1}, "source_scale": 100}
    plain, alone = (plan(scale=1, attack=moved, scale_bias=bias) for bias in (True, False))
    assert plain.attack.digest != alone.attack.digest
    assert isinstance(alone.attack.spec, AttackTask)
    assert alone.attack.spec.scale_bias is False
    at_five = plan(scale=5, attack=moved, scale_bias=False)
    assert at_five.baseline.digest == alone.attack.digest, "the baseline is the same attack but for the scale"
    unscaled = {**moved, "source_scale": 1}
    one, other = (plan(scale=1, attack=unscaled, scale_bias=bias) for bias in (True, False))
    assert one.attack.digest == other.attack.digest


def test_the_demos_sweep_is_28_jobs_and_2_trainings() -> None:
    grid = {"architecture": ["mlp", "simple_cnn"], "scale": SCALES, "attack": ["pgd_l2", "pgd_linf"]}
    jobs = Sweep(name="demo", base=BASE, grid=grid).cells()
    tasks = {digest: task for job in jobs for digest, task in plan_job(job, DIGITS).tasks.items()}
    assert len(jobs) == 28
    assert Counter(task.spec.kind for task in tasks.values()) == {
        "train": 2, "measure": 14, "attack": 28, "control": 4,
    }  # fmt: skip


@pytest.mark.parametrize("changed", [{"seed": 1}, {"replicate": 1}, {"recipe": "sam"}, {"architecture": "simple_cnn"}])
def test_another_training_shares_nothing(changed: dict[str, Any]) -> None:
    assert not plan(**changed).tasks.keys() & plan().tasks.keys()


@pytest.mark.parametrize("changed", [{"attack_seed": 1}, {"attack": "pgd_l2"}, {"samples": 99}])
def test_another_attack_shares_the_training(changed: dict[str, Any]) -> None:
    assert plan(**changed).train == plan().train
    assert plan(**changed).attack != plan().attack


def test_another_order_of_the_images_is_in_every_task_but_the_training() -> None:
    found, usual = plan(scale=5, order="file", measures=["sam_sharpness"]), plan(scale=5, measures=["sam_sharpness"])
    assert found.train == usual.train
    assert found.tasks.keys() & usual.tasks.keys() == {found.train.digest}
    assert {getattr(task.spec, "order", None) for task in found.tasks.values()} == {None, "file"}
    assert plan(scale=5, order="permutation").tasks == plan(scale=5).tasks


def test_the_panel_is_shared_by_all_scales_and_sample_counts_beyond_its_own() -> None:
    assert plan(scale=5, samples=300).control == plan(scale=50, samples=400).control
    assert plan(samples=100).control != plan(samples=300).control


@pytest.mark.parametrize("attack", ["cw", "noise", {"type": "fgsm", "norm": "linf", "eps": 0}])
def test_without_a_ball_there_is_no_panel(attack: Any) -> None:
    assert plan(attack=attack).control is None


def test_the_panel_of_other_attacks_takes_ten_steps_of_a_quarter() -> None:
    control = plan(attack={"type": "fgsm", "norm": "l2", "eps": 0.4}).control
    assert control is not None
    assert isinstance(control.spec, ControlTask)
    assert (control.spec.norm, control.spec.eps, control.spec.step_size, control.spec.steps) == ("l2", 0.4, 0.1, 10)


@pytest.mark.parametrize(
    ("changed", "twin"),
    [
        ({}, None),
        ({"loss": "margin"}, None),
        ({"precision": "bf16"}, None),  # how gradients are taken is no other attack
        ({"restarts": 3}, {"restarts": 3}),
        ({"random_start": True}, {"random_start": True}),
        ({"targeted": True}, {"targeted": True}),
        ({"judge": "any_step"}, {"judge": "any_step"}),
    ],
)
def test_the_margin_twin_of_plain_pgd_is_the_panels_own(changed: dict[str, Any], twin: dict[str, Any] | None) -> None:
    geometry: dict[str, Any] = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 8}
    control = plan(attack={**geometry, **changed}).control
    assert control is not None
    assert isinstance(control.spec, ControlTask)
    wanted = None if twin is None else Pgd(**{**geometry, **twin, "loss": "margin"})
    assert control.spec.twin == wanted
    assert (control == plan(attack=geometry).control) == (twin is None)


def test_the_margin_twin_of_auto_pgd_is_auto_pgd() -> None:
    control = plan(attack={"type": "apgd", "norm": "linf", "eps": 0.1, "steps": 30, "loss": "dlr"}).control
    assert control is not None
    assert isinstance(control.spec, ControlTask)
    assert control.spec.twin == Apgd(norm="linf", eps=0.1, steps=30, loss="margin")
    others = [plan(attack={"type": kind, "norm": "linf", "eps": 0.1}).control for kind in ("fgsm", "square")]
    assert others[0] == others[1] != control


def test_measures_are_tasks_of_their_own_and_closed_forms_are_always_on() -> None:
    found = plan(measures=["sam_sharpness", "sam_sharpness", "relative_sharpness"])
    kinds = Counter(task.spec.measure.type for task in found.tasks.values() if task.spec.kind == "measure")
    assert kinds == {"closed_forms": 1, "sam_sharpness": 1}


def test_a_transfer_from_another_network_waits_for_that_network_too() -> None:
    attack = {"type": "fgsm", "norm": "linf", "eps": 0.1}
    found = plan(attack={"type": "transfer", "attack": attack, "source": {"architecture": "simple_cnn", "seed": 3}})
    assert found.source is not None
    assert found.source.digest == plan(architecture="simple_cnn", seed=3).train.digest
    assert found.attack.parents == (found.train.digest, found.source.digest)
    assert found.control is not None
    assert found.control.parents == (found.train.digest,)


def test_a_transfer_from_the_same_network_needs_no_other() -> None:
    attack = {"type": "fgsm", "norm": "linf", "eps": 0.1}
    own = plan(attack={"type": "transfer", "attack": attack})
    spelled = plan(attack={"type": "transfer", "attack": attack, "source": {"architecture": "mlp"}})
    assert own.tasks.keys() == spelled.tasks.keys()


def test_a_labs_own_images_are_known_by_their_bytes_not_by_their_name_alone() -> None:
    job = JobSpec.model_validate({**BASE, "dataset": "npz:mine"})
    first, second = (
        plan_job(job, DatasetRef(name="npz:mine", train_sha256=c * 64, test_sha256="b" * 64)) for c in "12"
    )
    assert not first.tasks.keys() & second.tasks.keys()


def test_what_planning_remembers_is_bounded() -> None:
    """Of jobs that share nothing, each thousand would stay with eight megabytes."""

    def plan_many(first_seed: int) -> int:
        for seed in range(first_seed, first_seed + 1000):
            for task in plan(seed=seed).tasks.values():
                assert task.spec_json
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = plan_many(1000)
        assert plan_many(2000) - before < 1 << 20
        assert before < 4 << 20
    finally:
        tracemalloc.stop()

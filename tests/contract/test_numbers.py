"""The dictionary of numbers has what really comes out of tasks, no more and no less, in the units that it says."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from api.http.schemas.results import Result
from service.lab.artifacts import Artifacts
from service.model.executor import ArtifactRef, Bundle, Grant, Numbers, Outcome, Succeeded
from service.model.observations import Count, intervals_of
from service.model.task_kinds import METHODS
from service.model.verdict import AttackBits, Controls, Evidence, judge, unpack
from service.settings import KINDS
from service.specs import DatasetRef, JobSpec, Task
from service.specs.attacks import PRESETS, AnyAttack, Transfer
from service.specs.measures import MEASURES
from service.specs.numbers import COLUMNS, GROUPS, METRICS, described, markdown
from service.specs.numbers.base import PARTS, Number
from service.specs.plan import JobPlan, PlannedTask, plan_job
from service.specs.recipes import Imported
from service.store.task_kinds import TASK_KINDS
from workers import run
from workers.context import Context
from workers.science.attacks import ATTACKS, WITH_TRAJECTORY
from workers.science.bounds import BOUNDS
from workers.science.detector import LAMBDAS
from workers.science.summaries import QUANTILES, label_of
from workers.science.trajectory import THRESHOLDS

ROOT = Path(__file__).parents[2]
DIGITS = DatasetRef(name="digits")
SMALL: dict[str, dict[str, Any]] = {
    "hessian_trace_network": {"probes": 2},
    "adaptive_average": {"draws": 2},
    "adaptive_worst": {"steps": 1},
    "pac_bayes_flatness": {"draws": 2, "bisections": 3},
    "detector": {"steps": 4, "eps": 0.3, "step_size": 0.1},
}
ADVERSARIAL = {"name": "adversarial", "epochs": 1, "train_samples": 200, "steps": 1, "keep": "best", "held_out": 50}
Seen = dict[str, list[Numbers]]
"""The numbers of each real outcome, by kind of task; those of measures and attacks also by `kind/type`."""


def planned(**changes: Any) -> JobPlan:
    base: dict[str, Any] = {"architecture": "mlp", "dataset": "digits", "scale": 5, "samples": 64, "attack": "pgd_linf"}
    base["recipe"] = {"epochs": 8, "crop_padding": 0}
    return plan_job(JobSpec.model_validate(base | changes), DIGITS)


def shorter(attack: AnyAttack) -> dict[str, Any]:
    """The same attack in a moment."""
    spec: dict[str, Any] = attack.model_dump(mode="json")
    spec |= {name: few for name, few in {"steps": 4, "queries": 4}.items() if name in spec}
    spec |= {"eps": 0.3} if spec.get("eps") else {}
    spec |= {"step_size": 0.1} if "step_size" in spec else {}
    return spec | ({"attack": shorter(attack.attack)} if isinstance(attack, Transfer) else {})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    folder, threads = tmp_path_factory.mktemp("numbers"), torch.get_num_threads()
    context = Context(Artifacts(str(folder / "artifacts")), folder / "data")
    torch.set_num_threads(1)

    def do(plan: JobPlan, task: PlannedTask, checkpoint: ArtifactRef | None = None) -> Outcome:
        grant = Grant("t", 1, task.digest, task.stored_spec)
        last = list(run.execute(Bundle("b", (grant,), plan.train.stored_spec, checkpoint), context))[-1]
        assert isinstance(last, Succeeded), last
        return last.outcome

    yield do
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def seen(done: Callable[..., Outcome]) -> Seen:
    """Every attack and measure once, a training of each sort, a panel, and the verdict on one job."""
    found: Seen = defaultdict(list)
    plan = planned(measures=[{"type": t, "images": 64, **SMALL.get(t, {})} for t in MEASURES if t != "closed_forms"])
    trained = done(plan, plan.train)
    checkpoint = trained.artifacts[0]
    of_best, registered = planned(recipe=ADVERSARIAL), Imported(weights_sha256=checkpoint.digest)
    of_registered = plan.job.model_copy(update={"recipe": Imported(checkpoint="it")})
    imported = plan_job(of_registered, DIGITS, {"it": registered})
    found["train"] = [outcome.numbers for outcome in (trained, *(done(p, p.train) for p in (of_best, imported)))]
    for task in (plan.closed_forms, *plan.measures):
        found[f"measure/{task.stored_spec['measure']['type']}"].append(done(plan, task, checkpoint).numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ATTACKS, "autoattack", partial(ATTACKS["autoattack"], steps=2, targets=1, queries=2))
        for name, attack in PRESETS.items():
            of_attack = planned(attack=shorter(attack))
            found[f"attack/{name}"].append(done(of_attack, of_attack.attack, checkpoint).numbers)
    assert plan.control is not None
    at_scale, at_one, control = (done(plan, task, checkpoint) for task in (plan.attack, plan.baseline, plan.control))
    found["control"] = [control.numbers]
    found["job"] = [judged(at_scale, at_one, control)]
    shares: dict[Count, int | None] = {"samples": 64, "n_clean_correct": 60, "test_samples": 500}
    found["job"].append(dict(intervals_of({**trained.numbers, **at_scale.numbers}, shares)))
    return found


def judged(at_scale: Outcome, at_one: Outcome, control: Outcome) -> Numbers:
    """The numbers of the verdict on an attack, with its counts by their names in a result."""

    def bits(outcome: Outcome) -> dict[str, Any]:
        return {name: unpack(of.n, of.packed) for name, of in outcome.bits.items()}

    def attack(outcome: Outcome) -> AttackBits:
        of = bits(outcome)
        return AttackBits(of["clean_correct"], of["robust"], of["zero_gradient"], 0, of["non_finite"])

    panel = {name.removeprefix("robust_"): of for name, of in bits(control).items()}
    controls, chance = Controls(panel, control.numbers), float(at_scale.numbers["majority_share"] or 0)
    verdict = judge(Evidence("pgd", 5.0, chance, attack(at_scale), attack(at_one), controls, panel["margin"]))
    fractions = ("masked_fraction", "masked_fraction_of_correct", "masked_n", "reverse_fraction")
    counts = {f"verdict_counts.{check}": counted for check, (counted, _) in verdict.counts.items()}
    return {**{name: getattr(verdict, name) for name in fractions}, **counts}


def named(kind: str, of: str | None = None) -> set[str]:
    return {name for group in GROUPS if group.kind == kind and of in (None, group.of) for name in group.names()}


def test_what_trainings_panels_and_verdicts_leave_is_in_the_dictionary_and_all_of_it_comes(seen: Seen) -> None:
    for kind in ("train", "control", "job"):
        assert {name for numbers in seen[kind] for name in numbers} == named(kind), kind


@pytest.mark.parametrize("measure", MEASURES)
def test_what_a_measure_leaves_is_in_the_dictionary_and_all_of_it_comes(measure: str, seen: Seen) -> None:
    [numbers] = seen[f"measure/{measure}"]
    assert numbers.keys() == named("measure", measure)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_attack_leaves_whole_groups_of_numbers_and_the_test_numbers_of_the_closed_forms(
    preset: str, seen: Seen
) -> None:
    [numbers], [closed_forms] = seen[f"attack/{preset}"], seen["measure/closed_forms"]
    groups = [group for group in GROUPS if group.kind == "attack" and {*group.names()} <= numbers.keys()]
    at_start = {name for name in closed_forms if not name.startswith("train_")}
    assert numbers.keys() == at_start.union(*(group.names() for group in groups))
    assert ("trajectory" in {group.name for group in groups}) == (PRESETS[preset].type in WITH_TRAJECTORY)


def test_some_attack_leaves_each_number_of_the_dictionary(seen: Seen) -> None:
    assert named("attack") <= {name for preset in PRESETS for name in seen[f"attack/{preset}"][0]}


def every_value() -> Iterator[tuple[str, str, Number]]:
    for group in GROUPS:
        for number in group.numbers:
            yield group.kind, group.of if group.kind == "measure" else "", number


def values_of(seen: Seen, kind: str, of: str, number: Number) -> list[tuple[str, float | int | None]]:
    outcomes = [numbers for key, each in seen.items() if key in (kind, f"{kind}/{of}") for numbers in each]
    if kind == "attack":
        outcomes = [numbers for preset in PRESETS for numbers in seen[f"attack/{preset}"]]
    names = set(number.names())
    return [(name, value) for numbers in outcomes for name, value in numbers.items() if name in names]


def test_every_value_is_in_its_range_and_null_only_where_the_dictionary_says_when(seen: Seen) -> None:
    for kind, of, number in every_value():
        for name, value in values_of(seen, kind, of, number):
            if value is None:
                assert number.null != "never", name
            else:
                assert number.unit.holds(value), (name, value, number.unit)


def test_some_real_outcome_has_a_value_for_every_entry(seen: Seen) -> None:
    for kind, of, number in every_value():
        assert any(value is not None for _, value in values_of(seen, kind, of, number)), (kind, of, number.name)


def test_a_name_stands_once_among_the_numbers_of_one_task() -> None:
    for kind in ("train", "control", "attack", "job"):
        names = [name for group in GROUPS if group.kind == kind for name in group.names()]
        assert len(names) == len(set(names))
    assert {group.of for group in GROUPS if group.kind == "measure"} == set(MEASURES)


def test_kinds_of_tasks_are_those_of_the_settings() -> None:
    specs = get_args(get_args(Task)[0])
    assert tuple(spec.model_fields["kind"].default for spec in specs) == KINDS
    assert tuple(METHODS) == tuple(TASK_KINDS) == KINDS
    assert {group.kind for group in GROUPS} == {*KINDS, "job"}


def test_parts_of_names_are_those_of_the_science() -> None:
    assert PARTS["quantile"] == tuple(label_of(q) for q in QUANTILES)
    assert PARTS["threshold"] == THRESHOLDS
    assert PARTS["bound"] == BOUNDS
    assert PARTS["strength"] == tuple(f"{strength:g}".replace(".", "") for strength in LAMBDAS)


def test_every_number_names_a_file_that_is_there() -> None:
    for group in GROUPS:
        assert (ROOT / group.file).is_file(), group.file


def test_every_column_is_of_a_number_and_the_schema_of_results_names_columns() -> None:
    for column in COLUMNS:
        assert column.number in named(column.kind)
    assert len(set(METRICS)) == len(METRICS)
    declared = {name for name, field in Result.model_fields.items() if field.annotation == float | None}
    assert declared <= {*METRICS, *named("job")}
    shown = Result.model_json_schema()["properties"]
    for number in described():
        for name in number["columns"]:
            assert number["formula"] in shown[name]["description"]


def test_the_page_of_the_science_is_the_dictionary() -> None:
    written = (ROOT / "workers/science/NUMBERS.md").read_text()
    assert written == markdown() + "\n", "python -m service.specs.numbers > workers/science/NUMBERS.md"


def test_the_dictionary_can_be_read() -> None:
    for entry in described():
        assert len(entry["formula"]) <= 110, entry["name"]
        assert not re.search(r"\s$|^\s|\n", entry["formula"])
        assert all(entry[field] for field in ("unit", "null", "source", "file", "of")), entry["name"]

"""A sweep's grid: distinct cells in order, refused fast where it is too much, and pointed at where it is wrong."""

import time
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidSpec
from service.limits import MAX_SWEEP_JOBS
from service.specs import JobSpec, Sweep

BASE: dict[str, Any] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 100}
PGD: dict[str, Any] = {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10}


def cells(**written: Any) -> list[JobSpec]:
    return Sweep.model_validate({"name": "s", "base": BASE, **written}).cells()


def refused(**written: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidSpec) as caught:
        cells(**written)
    return caught.value.errors


def test_the_last_axis_runs_fastest() -> None:
    found = cells(grid={"architecture": ["mlp", "simple_cnn"], "scale": [1, 5, 10]})
    assert [(job.architecture, job.scale) for job in found] == [
        (name, scale) for name in ("mlp", "simple_cnn") for scale in (1, 5, 10)
    ]


def test_a_4_x_2_x_7_x_2_sweep_is_112_jobs() -> None:
    scales = [0.25, 0.5, 1, 2.5, 5, 10, 50]
    architectures = ["resnet18", "wide_resnet28_4", "densenet121", "vgg11_bn"]
    axes = {"dataset": ["cifar10", "cifar100"], "scale": scales, "attack": ["pgd_l2", "pgd_linf"]}
    assert len(cells(grid={"architecture": architectures, **axes})) == 112


def test_equal_cells_are_one_however_they_are_written() -> None:
    assert len(cells(grid={"scale": [1, 1.0, "1", "5/5", 2, 2]})) == 2
    assert len(cells(grid={"attack": ["pgd_linf", PGD]})) == 1
    assert len(cells(grid={"scale": [1, 2]}, include=[{"scale": 2}, {"scale": "4/2"}])) == 2


def test_include_stands_on_base_and_exclude_is_taken_from_the_grid() -> None:
    grid = {"scale": [1, 5], "seed": [0, 1]}
    exclude = [{"scale": 5, "seed": 1}, {"scale": 5.0, "seed": 0}]
    found = cells(grid=grid, exclude=exclude, include=[{"scale": 50, "seed": 7}])
    assert [(job.scale, job.seed) for job in found] == [(1, 0), (1, 1), (50, 7)]


def test_a_whole_number_on_an_axis_is_one_however_it_is_written() -> None:
    assert [job.seed for job in cells(grid={"seed": ["1", 1, 2]})] == [1, 2]
    assert [job.samples for job in cells(grid={"samples": ["20"]})] == [20]
    assert [job.seed for job in cells(grid={"seed": ["1", 2, 3]}, exclude=[{"seed": 1}, {"seed": "3"}])] == [2]
    recipe = {"name": "sam", "epochs": 2}
    left = cells(grid={"recipe": [recipe, "standard"]}, exclude=[{"recipe": {**recipe, "epochs": "2"}}])
    assert [job.recipe.name for job in left] == ["standard"]
    sweep = Sweep.model_validate({"name": "s", "base": BASE, "grid": {"seed": [1]}})
    assert sweep.extended({"seed": ["1", "2"]}).grid == {"seed": [1, "2"]}
    for wrong in ("1_0", "2/2", 1.0):
        assert refused(grid={"seed": [wrong]})[0][0] == "/grid/seed/0"


def test_an_empty_pattern_excludes_nothing() -> None:
    assert len(cells(grid={"scale": [1, 5]}, exclude=[{}])) == 2


def test_dotted_axes_reach_inside() -> None:
    base = {**BASE, "attack": {"type": "transfer", "attack": PGD}, "recipe": {"name": "sam", "rho": 0.1}}
    found = cells(base=base, grid={"recipe.epochs": [1, 2], "attack.attack.eps": ["1/255", "2/255"]})
    assert [(job.recipe.epochs, job.attack.eps) for job in found] == [  # type: ignore[union-attr]
        (epochs, eps / 255) for epochs in (1, 2) for eps in (1, 2)
    ]
    assert {job.recipe.rho for job in found} == {0.1}  # type: ignore[union-attr]
    assert base["recipe"] == {"name": "sam", "rho": 0.1}


def test_a_dotted_axis_may_stand_before_the_field_that_it_reaches_inside() -> None:
    kinds, eps = [PGD, {**PGD, "norm": "l2"}], ["1/255", "2/255"]
    grid: dict[str, list[Any]] = {"attack.eps": eps, "attack": kinds}
    jobs = [JobSpec.model_validate({**BASE, "attack": {**kind, "eps": one}}) for one in eps for kind in kinds]
    assert cells(grid=grid) == jobs
    assert set(cells(grid=dict(reversed(grid.items())))) == set(jobs)


@pytest.mark.parametrize(
    ("written", "pointer"),
    [
        ({}, "/grid"),
        ({"grid": {"scale": []}}, "/grid/scale"),
        ({"grid": {"scale": [1, 0]}}, "/grid/scale/1"),
        ({"grid": {"architecture": ["mlp", "mpl"]}}, "/grid/architecture/1"),
        ({"grid": {"bogus": [1]}}, "/grid/bogus"),
        ({"grid": {"pgd": [1]}}, "/grid/pgd"),
        ({"grid": {"a/b~c": [1]}}, "/grid/a~1b~0c"),
        ({"grid": {"": [1]}}, "/grid/"),
        ({"grid": {"recipe.": [1]}}, "/grid/recipe."),
        ({"grid": {".epochs": [1]}}, "/grid/.epochs"),
        ({"grid": {"recipe.epochs": [1, 0]}}, "/grid/recipe.epochs/1"),
        ({"grid": {"recipe.name": ["adam"]}}, "/grid/recipe.name/0"),
        ({"grid": {"attack.eps": [1]}}, "/grid/attack.eps"),
        ({"grid": {"samples": [501]}}, "/grid/samples/0"),
        ({"grid": {"attack": [{**PGD, "eps": "9/0"}]}}, "/grid/attack/0/eps"),
        ({"grid": {"measures": [["sam_sharpness"], ["bogus"]]}}, "/grid/measures/1"),
        ({"base": {**BASE, "seed": -1}, "grid": {"scale": [1]}}, "/base/seed"),
        ({"base": {**BASE, "attack": {**PGD, "steps": 0}}, "grid": {"attack.eps": [1]}}, "/base/attack/steps"),
        ({"base": {**BASE, "recipe": {"name": "adam"}}, "grid": {"recipe.epochs": [1]}}, "/base/recipe"),
        ({"include": [{"scale": 1}, {"scale": 0}]}, "/include/1/scale"),
        ({"include": [{"bogus": 1}]}, "/include/0/bogus"),
        ({"grid": {"scale": [1]}, "exclude": [{"scael": 1}]}, "/exclude/0/scael"),
        ({"grid": {"scale": [1]}, "exclude": [{}, {"scale": 2}]}, "/exclude/1/scale"),
        ({"grid": {"scale": [1]}, "exclude": [{"scale": True}]}, "/exclude/0/scale"),
        (
            {"grid": {"measures": [[], ["sam_sharpness", {"type": "sam_sharpness", "rho": 0}]]}},
            "/grid/measures/1/1/rho",
        ),
        ({"grid": {"scale": [1]}, "include": [{"attack": {**PGD, "eps": 9}}]}, "/include/0/attack/eps"),
        ({"base": {**BASE, "attack": {**PGD, "eps": 9}}, "grid": {"seed": [0, 1]}}, "/base/attack/eps"),
        ({"grid": {"scale": [1]}, "exclude": [{"scale": 1}]}, "/grid"),
    ],
)
def test_the_pointer_is_where_the_user_wrote_it(written: dict[str, Any], pointer: str) -> None:
    assert [found for found, _ in refused(**written)] == [pointer]


@pytest.mark.parametrize(
    ("written", "pointer", "said"),
    [
        (
            {"grid": {"dataset": ["cifar10", "digits"], "samples": [500, 501]}},
            "/grid/samples/1",
            "digits has 500 test images, 501 were asked for (in the cell dataset 'digits', samples 501)",
        ),
        (
            {"grid": {"architecture": ["mlp", "vgg11_bn"], "dataset": ["cifar10", "digits"]}},
            "/grid/architecture/1",
            "(in the cell architecture 'vgg11_bn', dataset 'digits')",
        ),
        (
            {"base": {**BASE, "architecture": "vgg11_bn", "dataset": "cifar10"}, "include": [{"dataset": "digits"}]},
            "/base/architecture",
            "(in the cell dataset 'digits')",
        ),
        (
            {
                "base": {**BASE, "attack": {**PGD, "norm": "l2", "step_size": 1}},
                "grid": {"attack.norm": ["linf", "l2"], "attack.eps": [0.5, "9.0"]},
                "exclude": [{"attack.norm": "linf", "attack.eps": "9.0"}],
            },
            "/grid/attack.eps/1",
            "(in the cell attack.norm 'l2', attack.eps '9.0')",
        ),
        (
            {"grid": {"recipe.name": ["sam", "standard"], "recipe.rho": [0.1]}},
            "/grid/recipe.rho",
            "this kind of recipe has no 'rho' (in the cell recipe.name 'standard', recipe.rho 0.1)",
        ),
    ],
)
def test_what_only_a_cell_shows_is_said_with_the_cell(written: dict[str, Any], pointer: str, said: str) -> None:
    [(found, sentence)] = refused(**written)
    assert found == pointer
    assert said in sentence


def test_what_is_known_of_a_job_later_is_said_of_its_cell() -> None:
    sweep = Sweep.model_validate(
        {"name": "s", "base": {**BASE, "dataset": "npz:mine"}, "grid": {"scale": [1, 5]}, "include": [{"attack": PGD}]}
    )
    jobs, error = sweep.cells(), InvalidSpec([("/attack/eps", "too large"), ("/scale", "too small")])
    assert sweep.located(jobs[1], error).errors == [
        ("/base/attack/eps", "too large (in the cell scale 5)"),
        ("/grid/scale/1", "too small (in the cell scale 5)"),
    ]
    sweep = sweep.model_copy(update={"grid": {}})
    [job] = sweep.cells()
    assert [pointer for pointer, _ in sweep.located(job, error).errors] == ["/include/0/attack/eps", "/base/scale"]


def test_true_is_no_value_of_an_axis_that_has_1() -> None:
    sweep = Sweep.model_validate({"name": "s", "base": BASE, "grid": {"scale": [1, 5]}})
    with pytest.raises(InvalidSpec) as caught:
        sweep.extended({"scale": [True]}).cells()
    assert [pointer for pointer, _ in caught.value.errors] == ["/grid/scale/2"]


SAME: list[tuple[str, Any, Any, Any]] = [
    ("scale", 1, "1", 5),
    ("scale", 1.0, "3/3", 5),
    ("attack", "pgd_linf", PGD, "pgd_l2"),
    ("attack", {**PGD, "eps": 8 / 255}, {**PGD, "restarts": 1}, {**PGD, "restarts": 2}),
    ("attack", "transfer", {"type": "transfer", "attack": PGD, "source_scale": "1"}, "fgsm"),
    ("recipe", "standard", {"epochs": 100}, "sam"),
    ("recipe", {"name": "sam"}, {"name": "sam", "rho": "1/20"}, {"name": "sam", "rho": 0.1}),
    ("measures", ["fisher_rao", "sam_sharpness"], [{"type": "sam_sharpness", "rho": 0.05}, "fisher_rao"], []),
]


@pytest.mark.parametrize(("axis", "value", "same", "other"), SAME)
def test_axes_are_compared_by_what_their_values_mean(axis: str, value: Any, same: Any, other: Any) -> None:
    [kept] = cells(grid={axis: [value, other]}, exclude=[{axis: same}])
    assert [kept] == cells(grid={axis: [other]})
    sweep = Sweep.model_validate({"name": "s", "base": BASE, "grid": {axis: [value]}})
    assert sweep.extended({axis: [same]}).grid == sweep.grid
    assert sweep.extended({axis: [other, same]}).grid == {axis: [value, other]}


def test_dotted_axes_are_compared_by_what_their_values_mean() -> None:
    base = {**BASE, "attack": PGD}
    grid = {"attack.eps": ["8/255", "4/255"], "attack.random_start": [True, False]}
    exclude = [{"attack.eps": 8 / 255, "attack.random_start": True}, {"attack.eps": 4 / 255}]
    [left] = cells(base=base, grid=grid, exclude=exclude)
    assert (left.attack.eps, left.attack.random_start) == (8 / 255, False)  # type: ignore[union-attr]
    part = {name: value for name, value in PGD.items() if name != "eps"}  # of which the rest is on the other axis
    grid = {"attack": [part, {**part, "norm": "l2"}], "attack.eps": ["8/255"]}
    assert [job.attack.norm for job in cells(grid=grid, exclude=[{"attack": {**part, "step_size": 2 / 255}}])] == ["l2"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("axis", "values", "wrong"),
    [
        ("scale", [1, 5], True), ("scale", [1, 5], "one"), ("scale", [1, 5], [1]), ("scale_bias", [True, False], 1),
        ("seed", [0, 1], "1_0"), ("seed", [0, 1], "1.5"), ("seed", [0, 1], False), ("architecture", ["mlp"], "MLP"),
        ("attack", ["pgd_linf"], {**PGD, "eps": "9/255"}), ("attack", ["pgd_linf"], {**PGD, "random_start": 0}),
        ("recipe", ["standard"], {"epochs": True}), ("measures", [["fisher_rao"]], ["sam_sharpness"]),
    ],
)  # fmt: skip
def test_what_means_something_else_is_no_value_of_the_axis(axis: str, values: list[Any], wrong: Any) -> None:
    [(pointer, sentence)] = refused(grid={axis: values}, exclude=[{axis: wrong}])
    assert pointer == f"/exclude/0/{axis}"
    assert "is none of the values of the axis" in sentence
    sweep = Sweep.model_validate({"name": "s", "base": BASE, "grid": {axis: values}})
    assert sweep.extended({axis: [wrong]}).grid[axis] == [*values, wrong]


def test_cells_that_ask_for_the_same_are_one() -> None:
    measures = [["sam_sharpness", "fisher_rao"], ["fisher_rao", "sam_sharpness"], ["fisher_rao", "sam_sharpness"] * 2]
    assert len(cells(grid={"measures": measures, "scale_bias": [True, False]})) == 1
    assert len(cells(grid={"scale": [1, 5], "scale_bias": [True, False]})) == 3


def test_a_name_cannot_be_varied_from_within() -> None:
    [(_, sentence)] = refused(grid={"attack.eps": [1]})
    assert "spell `attack` out in `base`" in sentence


@pytest.mark.parametrize(
    "grid",
    [
        {"scale": [1] * 3200, "seed": [2] * 3200},
        {"scale": [1] * 10_000_000},
        {"scale": [1] * (MAX_SWEEP_JOBS + 1)},
        {f"axis{i}": [0] * 10 for i in range(10_000)},
        {f"axis{i}": [0] * 100_000 for i in range(50)},
    ],
    ids=["product", "axis", "one more", "more digits than Python prints", "more than a float holds"],
)
def test_a_huge_grid_is_refused_before_anything_is_built(grid: dict[str, list[int]]) -> None:
    sweep = Sweep.model_construct(name="huge", base=BASE, grid=grid, include=[], exclude=[])
    started = time.process_time()
    with pytest.raises(InvalidSpec) as caught:
        sweep.cells()
    assert time.process_time() - started < 0.1
    [(pointer, sentence)] = caught.value.errors
    assert pointer == "/grid"
    assert "a sweep has at most 100,000" in sentence


def test_how_many_is_said() -> None:
    [(_, sentence)] = refused(grid={"scale": [1] * 3200, "seed": [2] * 3125})
    assert sentence == "10,000,000 cells; a sweep has at most 100,000: split it"


def test_include_counts_too() -> None:
    sweep = Sweep.model_construct(
        name="huge", base=BASE, grid={}, include=[{"scale": 1}] * (MAX_SWEEP_JOBS + 1), exclude=[]
    )
    with pytest.raises(InvalidSpec, match="100,001 cells"):
        sweep.cells()


def test_excluding_by_the_thousand_is_refused() -> None:
    grid = {"scale": [1 + i / 1000 for i in range(100)], "seed": list(range(1000))}
    started = time.process_time()
    [(pointer, _)] = refused(grid=grid, exclude=[{"seed": seed} for seed in range(1000)])
    assert pointer == "/exclude"
    assert time.process_time() - started < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""}, {"name": "x" * 201}, {"name": "a\0b"}, {"priority": 101}, {"priority": True}, {"bogus": 1},
        {"grid": {"scale": 1}}, {"grid": [1]}, {"include": {}}, {"labels": {"a": 1}},
    ],
)  # fmt: skip
def test_what_is_no_sweep(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sweep.model_validate({"name": "s", "grid": {"scale": [1]}, **wrong})

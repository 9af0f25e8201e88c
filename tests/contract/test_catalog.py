"""The torch-free tables of the service say the same as those of the science. A new entry passes by being in both."""

import inspect
from dataclasses import asdict

import pytest
import torch
from torch import nn

from api.http.catalog import _described
from service.model.names import OWN_DATASET
from service.model.verdict import chance_of, wilson
from service.specs import catalog
from service.specs.attacks import ATTACKS, NUMERICS, PRESETS, Fgsm, Pgd
from service.specs.base import FRACTION, NUMBER
from service.specs.fitting import Images, misfits
from service.specs.measures import MEASURES, ClosedForms
from service.specs.recipes import RECIPES, Standard, parameters
from workers.science.__main__ import FRACTION as SHELL_FRACTION
from workers.science.__main__ import NUMBER as SHELL_NUMBER
from workers.science.__main__ import PRESETS as SHELL_PRESETS
from workers.science.architectures import ARCHITECTURES as NETWORKS
from workers.science.architectures import build
from workers.science.attacks import ATTACKS as ATTACK_FUNCTIONS
from workers.science.attacks import prepare
from workers.science.augmentation import default_augmentation
from workers.science.datasets import DATASETS
from workers.science.datasets.npz import PREFIX
from workers.science.errors import WrongShape
from workers.science.imported import is_at_chance
from workers.science.recipes import RECIPES as RECIPE_FUNCTIONS
from workers.science.sharpness import MEASURES as MEASURE_FUNCTIONS
from workers.science.summaries import majority_share

# Parameters that only exist inside a worker.
NOT_IN_ATTACK_SPECS = {"source", "source_attack", "source_scale", "params", "feature_loss"}
SLOW = pytest.mark.slow
DEEP = {"densenet121", "densenet121_cifar", "resnet50d", "attention_resnet50d"}
NOT_IN_MEASURE_SPECS = {"scale"}


def keywords(function: object) -> dict[str, object]:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD
    }


def test_architectures() -> None:
    shared = ("features", "summary", "min_side", "multiple_of")
    assert {name: [getattr(known, field) for field in shared] for name, known in catalog.ARCHITECTURES.items()} == {
        name: [getattr(network, field) for field in shared] for name, network in NETWORKS.items()
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_the_least_size_of_images_is_the_one_that_runs(name: str) -> None:
    """The network itself, without the check that `build` makes, trains and classifies there; a pixel less fails."""
    network, least = NETWORKS[name], catalog.ARCHITECTURES[name].min_side

    def runs(height: int, width: int) -> bool:
        model = network.build((1, height, width), 3)
        images = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0))
        model.train()(images).sum().backward()
        logits = model.eval()(images)
        return logits.shape == (2, 3) and bool(logits.isfinite().all())

    further = least + network.multiple_of
    assert runs(least, least)
    for height, width in ((least - 1, further), (further, least - 1)):
        if least > 1:
            with pytest.raises(RuntimeError, match=r"output size|input size|stride should not be zero"):
                runs(height, width)
        with pytest.raises(WrongShape):
            build(name, (1, height, width), 3, 0)
        assert misfits(name, Standard(), Fgsm(norm="linf", eps=0.1), Images((1, height, width), 3, 100))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    """The network would run and never see the last rows."""
    [(path, sentence)] = misfits("vit_tiny", Standard(), Fgsm(norm="linf", eps=0.1), Images((3, 8, 30), 10, 100))
    assert path == ("architecture",)
    assert "multiples of 4, these are 8x30" in sentence
    with pytest.raises(WrongShape, match="multiples of 4"):
        build("vit_tiny", (3, 8, 30), 10, 0)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW if name in DEEP else ()) for name in NETWORKS])
def test_batch_norm_is_folded_where_there_is_some(name: str) -> None:
    side = max(8, NETWORKS[name].min_side)
    model = build(name, (3, side, side), 10, 0).eval()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert catalog.ARCHITECTURES[name].batch_norm == (norms > 0)
    probe = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    folded = prepare(model, fold_batch_norm=True, probe=probe)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert left < norms or norms == 0
    refused = misfits(name, Standard(), Fgsm(norm="linf", eps=0.1, fold_batch_norm=True), None)
    assert [path for path, _ in refused] == [("attack", "fold_batch_norm")] * (norms == 0)


def test_datasets() -> None:
    assert list(catalog.DATASETS) == list(DATASETS)
    for name, known in catalog.DATASETS.items():
        read = DATASETS[name]
        assert (known.shape, known.classes, known.train, known.test) == (
            read.shape,
            read.classes,
            read.train,
            read.test,
        )
        assert asdict(default_augmentation(name)) == {
            "crop_padding": known.crop_padding,
            "flip": known.flip,
            "rotation_degrees": known.rotation_degrees,
        }


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_parameters_are_those_of_the_function(name: str) -> None:
    spec, function = ATTACKS[name], ATTACK_FUNCTIONS[name]
    offered = {
        field: info.default
        for field, info in spec.model_fields.items()
        if field not in {"type", *NUMERICS, "attack", "source_scale", "source"}
    }
    taken = {key: default for key, default in keywords(function).items() if key not in NOT_IN_ATTACK_SPECS}
    fixed = {"steps", "targets", "queries"} if name == "autoattack" else set()  # the standard ensemble is a standard
    assert set(offered) == set(taken) - fixed
    for field, info in spec.model_fields.items():
        if field in taken and not info.is_required():
            assert info.default == taken[field], field


def test_the_catalogue_says_of_which_code_autoattack_is_a_re_implementation() -> None:
    assert "A re-implementation of `fra31/auto-attack` 0.1" in _described(ATTACKS["autoattack"])["summary"]


def test_weights_at_chance_are_those_on_which_an_attack_would_have_nothing_correct() -> None:
    for right, n in ((5, 40), (15, 40), (20, 40), (40, 40), (0, 3)):
        y, correct = torch.arange(n) % 3, torch.arange(n) < right
        by_the_verdict = wilson(right, n)[0] <= chance_of(majority_share(y), 3)
        assert is_at_chance(correct, y) == by_the_verdict, (right, n)


def test_every_attack_of_the_science_can_be_asked_for() -> None:
    assert set(ATTACKS) == set(ATTACK_FUNCTIONS)


@pytest.mark.parametrize("name", MEASURES)
def test_measure_parameters_are_those_of_the_function(name: str) -> None:
    spec = MEASURES[name]
    offered = {field: info.default for field, info in spec.model_fields.items() if field != "type"}
    taken = {key: value for key, value in keywords(MEASURE_FUNCTIONS[name]).items() if key not in NOT_IN_MEASURE_SPECS}
    assert offered == taken
    assert spec is ClosedForms or offered["images"]


def test_every_measure_of_the_science_can_be_asked_for() -> None:
    assert list(MEASURES) == list(MEASURE_FUNCTIONS)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parameters_are_those_of_the_function(name: str) -> None:
    assert parameters(RECIPES[name]()) == dict(RECIPE_FUNCTIONS[name].params)


def test_every_recipe_of_the_science_can_be_asked_for() -> None:
    assert list(RECIPES) == list(RECIPE_FUNCTIONS)


def test_the_presets_are_those_of_the_paper() -> None:
    assert PRESETS["pgd_l2"] == Pgd(norm="l2", eps=0.025, step_size=0.001, steps=25)
    assert PRESETS["pgd_linf"] == Pgd(norm="linf", eps=8 / 255, step_size=2 / 255, steps=10)
    assert PRESETS["fgsm"] == Fgsm(norm="linf", eps=8 / 255)


def test_a_labs_own_data_set_is_written_alike() -> None:
    assert PREFIX == OWN_DATASET


def test_the_shell_reads_the_same_numbers() -> None:
    assert (SHELL_NUMBER.pattern, SHELL_FRACTION.pattern) == (NUMBER.pattern, FRACTION.pattern)


@pytest.mark.parametrize("name", SHELL_PRESETS)
def test_the_shell_knows_the_same_presets(name: str) -> None:
    spec = PRESETS[name]
    assert {field: getattr(spec, field) for field in SHELL_PRESETS[name]} == SHELL_PRESETS[name]

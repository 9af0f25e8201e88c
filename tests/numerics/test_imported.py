"""Weights made elsewhere: what is fitted computes what the original computes, and what does not fit is said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from service.model.verdict import AttackBits, Evidence, chance_of, judge
from workers.science import imported
from workers.science.architectures import build
from workers.science.errors import Misshapen, NegativeVariance, NonFinite, WrongAccuracy, WrongShape, WrongTensors
from workers.science.heads import features_and_logits
from workers.science.imported import Normalised, as_saved, fit, is_at_chance, require_accuracy
from workers.science.naming import match
from workers.science.summaries import majority_share
from workers.science.weights import load_weights, save_weights

SHAPE = (3, 16, 16)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def original() -> nn.Module:
    return build("simple_cnn", SHAPE, 7, seed=3).eval()


def fresh() -> nn.Module:
    return build("simple_cnn", SHAPE, 7, seed=4)


def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_renamed_keys_another_precision_and_missing_counters(
    original: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {
        f"module.{name}": value.to(dtype) if value.is_floating_point() else value
        for name, value in original.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    fitted = fit(fresh(), saved(tmp_path, state), keys={"module.": ""})
    assert fitted.converted_from == (() if dtype is torch.float32 else ("float64",))
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(fitted.model(x), original(x))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_half_precision_is_computed_in_float32_and_said(
    original: nn.Module, tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    halves = {name: v.to(dtype) if v.is_floating_point() else v for name, v in original.state_dict().items()}
    fitted = fit(fresh(), saved(tmp_path, halves))
    assert (fitted.converted_from, fitted.stripped_prefix) == ((name,), None)
    for tensor, value in fitted.model.state_dict().items():
        assert torch.equal(value, halves[tensor].to(value.dtype))
        assert value.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "net.", "_orig_mod.module.", "model.net.module."]
)
def test_a_prefix_that_all_names_have_is_stripped_and_said(original: nn.Module, tmp_path: Path, prefix: str) -> None:
    state = {prefix + name: value for name, value in original.state_dict().items()}
    fitted = fit(fresh(), saved(tmp_path, state))
    assert fitted.stripped_prefix == prefix
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(fitted.model(x), original(x))


def test_a_prefix_that_one_name_lacks_is_not_stripped(original: nn.Module, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in original.state_dict().items()}
    with pytest.raises(WrongTensors, match=r"under 'module\.' \(--key module\.=\)") as refused:
        fit(fresh(), saved(tmp_path, {**state, "epoch": torch.zeros(1)}))
    needed = [name for name in original.state_dict() if not name.endswith("num_batches_tracked")]
    assert (refused.value.missing, refused.value.copies) == (sorted(needed), ["module."])
    assert refused.value.unknown == sorted([*state, "epoch"])


def test_names_of_the_network_itself_are_no_prefix() -> None:
    own = {"model.weight": (2, 3), "model.bias": (2,)}
    assert match(own, own, {}).stripped_prefix is None
    wrapped = {f"model.{name}": shape for name, shape in own.items()}
    assert match(wrapped, own, {}).stripped_prefix == "model."


def test_the_counter_of_an_average_is_left_out(original: nn.Module, tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(original)
    fitted = fit(fresh(), saved(tmp_path, averaged.state_dict()))
    assert fitted.stripped_prefix == "module."
    assert torch.equal(fitted.model.state_dict()["0.weight"], original.state_dict()["0.weight"])


class TestTwoCopies:
    """Such as the weights and their average: which one is meant is for the user to say."""

    @pytest.fixture
    def path(self, original: nn.Module, tmp_path: Path) -> Path:
        average = build("simple_cnn", SHAPE, 7, seed=5).state_dict()
        state = {f"ema.module.{name}": value for name, value in average.items()}
        return saved(tmp_path, state | {f"model.{name}": value for name, value in original.state_dict().items()})

    @pytest.mark.parametrize("keys", [{}, {"ema.": ""}, {"model.": "", "ema.module.": ""}])
    def test_both_are_named(self, path: Path, keys: dict[str, str]) -> None:
        said = r"2 copies .* 'ema\.module\.' \(--key ema\.module\.=\) or 'model\.' \(--key model\.=\)"
        with pytest.raises(WrongTensors, match=said) as refused:
            fit(fresh(), path, keys=keys)
        assert refused.value.copies == ["ema.module.", "model."]

    @pytest.mark.parametrize(("prefix", "seed"), [("model.", 3), ("ema.module.", 5)])
    def test_the_one_that_is_named_is_taken(self, path: Path, prefix: str, seed: int) -> None:
        fitted = fit(fresh(), path, keys={prefix: ""})
        expected = build("simple_cnn", SHAPE, 7, seed=seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in fitted.model.state_dict().items())

    def test_one_of_them_without_a_prefix(self, original: nn.Module, tmp_path: Path) -> None:
        state = original.state_dict()
        path = saved(tmp_path, {**state, **{f"ema.{name}": value + 1 for name, value in state.items()}})
        with pytest.raises(WrongTensors, match=r"'' \(--key =\) or 'ema\.' \(--key ema\.=\)"):
            fit(fresh(), path)
        fitted = fit(fresh(), path, keys={"": ""})
        assert torch.equal(fitted.model.state_dict()["0.weight"], state["0.weight"])


def test_the_longest_prefix_counts(original: nn.Module, tmp_path: Path) -> None:
    names = list(original.state_dict())
    state = {f"net.{name}" if name != names[-1] else "net.head": v for name, v in original.state_dict().items()}
    fitted = fit(fresh(), saved(tmp_path, state), keys={"net.": "", "net.head": names[-1]})
    assert torch.equal(fitted.model.state_dict()[names[-1]], original.state_dict()[names[-1]])


def test_a_normalisation_is_a_layer_and_is_there_again_after_saving(original: nn.Module, tmp_path: Path) -> None:
    fitted = fit(fresh(), saved(tmp_path, original.state_dict()), mean=MEAN, std=STD).model
    x = torch.rand(4, *SHAPE)
    by_hand = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        assert torch.equal(fitted(x), original(by_hand))
        save_weights(tmp_path / "fitted", fitted)
        again = as_saved(fresh(), tmp_path / "fitted")
        load_weights(again, tmp_path / "fitted")
        assert isinstance(again, Normalised)
        phi, logits = features_and_logits(again.eval(), x)
        assert torch.equal(logits, fitted(x))
        assert phi.shape == (4, 128)


def test_weights_without_a_normalisation_are_left_as_they_are(original: nn.Module, tmp_path: Path) -> None:
    model = fresh()
    assert as_saved(model, saved(tmp_path, original.state_dict())) is model


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mean": MEAN}, "need 3 numbers each"),
        ({"mean": MEAN[:1], "std": STD[:1]}, "need 3 numbers each"),
        ({"mean": MEAN, "std": (0.2, 0.0, 0.2)}, "above 0"),
        ({"keys": {"": "theirs."}}, "of another network"),
    ],
)
def test_options_that_do_not_fit(original: nn.Module, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongShape, match=said):
        fit(fresh(), saved(tmp_path, original.state_dict()), **options)


def test_another_network_a_pickle_and_broken_weights(original: nn.Module, tmp_path: Path) -> None:
    path = saved(tmp_path, original.state_dict())
    with pytest.raises(WrongShape, match="check architecture, image shape and number of classes"):
        fit(build("simple_cnn", SHAPE, 8, seed=0), path)
    with pytest.raises(WrongShape, match="of another network"):
        fit(build("mlp", SHAPE, 7, seed=0), path)
    torch.save(original.state_dict(), tmp_path / "pickle.pt")
    with pytest.raises(WrongShape, match=r"a pickle .* is refused"):
        fit(fresh(), tmp_path / "pickle.pt")


def test_all_tensors_that_hold_no_numbers_are_named_with_their_counts(original: nn.Module, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in original.state_dict().items()}
    state["0.weight"].view(-1)[:3] = float("nan")
    state["1.bias"][0] = float("inf")
    said = rf"0\.weight \(3 of {state['0.weight'].numel()}\), 1\.bias \(1 of {len(state['1.bias'])}\)"
    with pytest.raises(NonFinite, match=said):
        fit(fresh(), saved(tmp_path, state))
    too_large = {"1.bias": torch.full_like(state["1.bias"], 1e300, dtype=torch.float64)}
    with pytest.raises(NonFinite, match=r"1\.bias"):  # as float32
        fit(fresh(), saved(tmp_path, {**original.state_dict(), **too_large}))


def test_a_negative_running_variance_is_refused(original: nn.Module, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in original.state_dict().items()}
    variances = [name for name in state if name.endswith("running_var")]
    state[variances[0]][:2] = -1e-6  # small enough for the square root of a batch norm
    state[variances[-1]][0] = -1.0
    with pytest.raises(NegativeVariance) as refused:
        fit(fresh(), saved(tmp_path, state))
    assert f"{variances[0]} (2 of {len(state[variances[0]])})" in str(refused.value)
    assert f"{variances[-1]} (1 of {len(state[variances[-1]])})" in str(refused.value)
    state[variances[0]][:2] = state[variances[-1]][0] = 0.0
    fit(fresh(), saved(tmp_path, state))


def test_all_that_is_missing_unknown_and_misshapen_is_listed(original: nn.Module, tmp_path: Path) -> None:
    state = original.state_dict()
    names = list(state)
    changed = {f"theirs.{name}" if name in names[:2] else name: value for name, value in state.items()}
    changed[names[-1]] = torch.zeros(8)
    changed[names[-2]] = torch.zeros(8, 128)
    with pytest.raises(WrongTensors) as refused:
        fit(fresh(), saved(tmp_path, changed))
    error = refused.value
    assert (error.missing, error.unknown) == (sorted(names[:2]), sorted(f"theirs.{name}" for name in names[:2]))
    assert error.misshapen == [
        Misshapen(names[-1], "(8,)", "(7,)"),
        Misshapen(names[-2], "(8, 128)", "(7, 128)"),
    ]
    for said in ("2 are missing (0.weight, 1.weight)", "2 are unknown", "2 are of another shape", "is (8, 128), the"):
        assert said in str(error)


def test_a_long_list_ends_with_how_many_more() -> None:
    names = [f"layer.{i:04}.weight" for i in range(1000)]
    error = WrongTensors(names, [], [])
    assert (str(error).count("layer."), len(str(error)) < 2300) == (105, True)
    assert "1000 are missing (layer.0000.weight, " in str(error)
    assert "layer.0104.weight and 895 more" in str(error)


@pytest.mark.parametrize(
    ("measured", "expected", "tolerance", "refused"),
    [
        (0.107, 0.95, 0.01, True),
        (0.95, 0.95, 0.01, False),
        (0.94, 0.95, 0.01, False),
        (0.9398, 0.95, 0.01, True),
        (0.9602, 0.95, 0.01, True),
        (0.5, 0.5, 0.0, False),
        (0.107, None, None, False),
    ],
)
def test_another_clean_accuracy_than_was_expected(
    measured: float, expected: float | None, tolerance: float | None, refused: bool
) -> None:
    if not refused:
        return require_accuracy(measured, 500, expected, tolerance)
    with pytest.raises(WrongAccuracy, match=r"all 500 test images is .* grey levels of 0 to 255") as error:
        require_accuracy(measured, 500, expected, tolerance)
    assert f"{measured:.1%}, and 95.0%" in str(error.value)
    return None


@pytest.mark.parametrize(
    ("right", "labels", "at_chance"),
    [
        (0, [50] * 10, True),
        (53, [50] * 10, True),  # 10.6 %; Wilson's interval begins at 8.2 %
        (66, [50] * 10, False),  # 13.2 %, from 10.5 % on
        (475, [50] * 10, False),
        (450, [450, 50], True),  # the best constant answer, which is right 90 % of the time
        (470, [450, 50], False),
        (500, [500], True),
    ],
)
def test_chance_is_the_best_constant_answer(right: int, labels: list[int], at_chance: bool) -> None:
    y = torch.arange(len(labels)).repeat_interleave(torch.tensor(labels))
    assert is_at_chance(torch.arange(len(y)) < right, y) is at_chance


@pytest.mark.parametrize("labels", [[50] * 10, [450, 50], [904, 96], [3, 1], [1], [7]])
def test_the_verdict_on_an_attack_has_the_same_rule_of_chance(labels: list[int]) -> None:
    """The science may not import the service's rule, so each right number of images is judged by both."""
    y = torch.arange(len(labels)).repeat_interleave(torch.tensor(labels))
    for right in range(len(y) + 1):
        correct = torch.arange(len(y)) < right
        bits = AttackBits(correct.numpy(), np.zeros(len(y), bool))
        verdict = judge(Evidence("pgd", 1.0, chance_of(majority_share(y), len(labels)), bits, bits))
        assert ("nothing_correct" in verdict.reasons) is is_at_chance(correct, y)


def test_two_names_that_become_one(original: nn.Module, tmp_path: Path) -> None:
    state = dict(original.state_dict())
    name = next(iter(state))
    state[f"module.{name}"] = state[name].clone()
    with pytest.raises(WrongShape, match="two tensors"):
        fit(fresh(), saved(tmp_path, state), keys={"module.": ""})


def test_no_tensor_of_another_network_is_read(
    original: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes tell it, and a file may be larger than the memory."""
    path, read = saved(tmp_path, original.state_dict()), []

    class Noted:
        def __init__(self, *arguments: Any, **more: Any) -> None:
            self._file: Any = safe_open(*arguments, **more)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            tensor: Tensor = self._file.get_tensor(name)
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(imported, "safe_open", Noted)
    for other in (build("mlp", SHAPE, 7, seed=0), build("simple_cnn", SHAPE, 8, seed=0)):
        with pytest.raises(WrongShape):
            fit(other, path)
    assert read == []
    fit(fresh(), path)
    assert len(read) == len(original.state_dict())

"""Weights made elsewhere: what is fitted computes what the original computes, and what does not fit is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from workers.science import imported
from workers.science.architectures import build
from workers.science.errors import NonFinite, WrongShape
from workers.science.heads import features_and_logits
from workers.science.imported import Normalised, as_saved, fit
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
    x = torch.rand(4, *SHAPE)
    with torch.no_grad():
        assert torch.equal(fitted(x), original(x))


def test_the_longest_prefix_counts(original: nn.Module, tmp_path: Path) -> None:
    names = list(original.state_dict())
    state = {f"net.{name}" if name != names[-1] else "net.head": v for name, v in original.state_dict().items()}
    fitted = fit(fresh(), saved(tmp_path, state), keys={"net.": "", "net.head": names[-1]})
    assert torch.equal(fitted.state_dict()[names[-1]], original.state_dict()[names[-1]])


def test_a_normalisation_is_a_layer_and_is_there_again_after_saving(original: nn.Module, tmp_path: Path) -> None:
    fitted = fit(fresh(), saved(tmp_path, original.state_dict()), mean=MEAN, std=STD)
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
        ({"keys": {"": "net."}}, "of another network"),
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
    state = {name: value.clone() for name, value in original.state_dict().items()}
    next(iter(state.values())).view(-1)[0] = float("nan")
    with pytest.raises(NonFinite):
        fit(fresh(), saved(tmp_path, state))


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
    opened = imported.safe_open

    class Noted:
        def __init__(self, *arguments: Any, **more: Any) -> None:
            self._file = opened(*arguments, **more)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self._file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(imported, "safe_open", Noted)
    for other in (build("mlp", SHAPE, 7, seed=0), build("simple_cnn", SHAPE, 8, seed=0)):
        with pytest.raises(WrongShape):
            fit(other, path)
    assert read == []
    fit(fresh(), path)
    assert len(read) == len(original.state_dict())

"""Compiled networks: batches of few sizes, and attacks that find what they find without."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.science import compiling
from workers.science.attacks import prepare
from workers.science.compiling import CompiledForBatches
from workers.science.evaluation import evaluate_attack

PGD = {"norm": "linf", "eps": 0.1, "step_size": 0.025, "steps": 5}
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": PGD,
    "apgd": {"norm": "linf", "eps": 0.1, "steps": 10},  # drops images as they are broken
    "square": {"norm": "linf", "eps": 0.1, "queries": 20},
}
N = 75


class Counting(nn.Module):
    """The sum of each image's pixels; remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x.flatten(1).sum(1, keepdim=True)


def test_batches_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that fill a batch up have no part in the answer or in its gradient."""
    monkeypatch.setattr(compiling, "compiled", lambda model: model)
    counting = Counting()
    network = CompiledForBatches(counting, 64)
    for n in (64, 63, 17, 16, 15, 4, 3, 1, 130):
        x = torch.rand(n, 1, 2, 2, requires_grad=True)
        logits = network(x)
        torch.testing.assert_close(logits, x.flatten(1).sum(1, keepdim=True))
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        assert gradient.shape == x.shape
        assert bool((gradient == 1).all())
    assert counting.sizes == [64, 64, 64, 16, 16, 4, 4, 4, 64, 64, 4]


def test_a_trajectory_of_a_compiled_network_is_refused(digits_net: Any) -> None:
    with pytest.raises(ValueError, match="not compiled"):
        evaluate_attack(
            digits_net.model, digits_net.x, digits_net.y, digits_net.index, attack="pgd", params=PGD, compile=True,
            observer_factory=lambda *_: None,  # type: ignore[arg-type]
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_a_compiled_network_finds_the_same(
    attack: str, digits_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, found = digits_net, {}
    for compile in (False, True):
        report = evaluate_attack(
            net.model, net.x[:N], net.y[:N], net.index[:N], attack=attack, params=ATTACKS[attack], batch_size=32,
            compile=compile,
        )  # fmt: skip
        found[compile] = report.bits["robust"]
    assert any(tmp_path.iterdir())  # what the compiler left
    assert 0 < int(found[True].sum()) < N
    assert int((found[True] != found[False]).sum()) <= 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_nothing_is_left_uncompiled_after_many_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts how often it compiles one class, also for other networks, and stops after eight."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for width in range(2, 12):
        torch._dynamo.utils.counters.clear()
        layer = nn.Sequential(nn.Flatten(), nn.Linear(width, 3))
        prepared = prepare(layer, compile=True, batch_size=4, probe=torch.rand(3, 1, 1, width))
        torch.testing.assert_close(prepared(torch.ones(4, 1, 1, width)), layer(torch.ones(4, 1, 1, width)))
        assert torch._dynamo.utils.counters["frames"]["ok"] >= 1, width

"""Planted broken defences get the right reason, at s = 1 and at another s; honest networks get none."""

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typed import linear

from service.model.verdict import AttackBits, Controls, Evidence, Verdict, chance_of, judge
from workers.science.attacks import ATTACKS, AttackInput, AttackOutput
from workers.science.controls import ControlReport, Geometry, run_controls
from workers.science.datasets import to_unit
from workers.science.evaluation import AttackReport, evaluate_attack
from workers.science.heads import scale_head

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a fixture trains a network

PGD_LINF = Geometry("linf", 8 / 255, 2 / 255, 10)
PGD_L2 = Geometry("l2", 0.025, 0.001, 25)
MIDDLE = Geometry("linf", 0.1, 0.02, 10)  # on digits: some break, some do not
LARGE = Geometry("linf", 0.3, 0.03, 20)  # on digits: all break
N = 80
HONEST = (
    *((name, geometry, 40) for name in ("digits_net", "robust_digits_net") for geometry in (PGD_LINF, PGD_L2)),
    *((name, geometry, N) for name in ("digits_net", "robust_digits_net") for geometry in (MIDDLE, LARGE)),
    *(("cifar_net", PGD_LINF, 40), ("cifar_net", PGD_L2, 20), ("robust_cifar_net", PGD_LINF, 40)),
)


def verdict(
    model: nn.Module, net: Any, geometry: Geometry, s: float = 1.0, attack: str = "pgd", **params: Any
) -> Verdict:
    """What the service says about `attack`, a PGD from the image, on `model` with its head scaled by s."""
    at_one = attacked(model, net, geometry, 1.0, attack, params)
    at_scale = at_one if s == 1 else attacked(model, net, geometry, s, attack, params)
    panel = run_controls(model, net.x, net.y, net.index, geometry)
    controls = as_controls(panel)
    twin = controls.robust["margin"]  # which is the attack itself with the margin loss
    chance = chance_of(at_scale.numbers["majority_share"], 10)
    return judge(Evidence("pgd", s, chance, stored(at_scale), stored(at_one), controls, twin))


def attacked(
    model: nn.Module, net: Any, geometry: Geometry, s: float, attack: str, params: dict[str, Any]
) -> AttackReport:
    return evaluate_attack(
        scale_head(model, s), net.x, net.y, net.index, attack=attack, params=asdict(geometry) | params, scale=s
    )


def stored(report: AttackReport) -> AttackBits:
    """As the store keeps it."""
    bits = {name: of.numpy() for name, of in report.bits.items()}
    outside = [report.numbers[name] or 0 for name in ("outside_ball", "outside_box")]
    outside_count, non_finite = int(sum(outside)), bits.get("non_finite")
    return AttackBits(bits["clean_correct"], bits["robust"], bits.get("zero_gradient"), outside_count, non_finite)


def as_controls(report: ControlReport) -> Controls:
    return Controls({name.removeprefix("robust_"): of.numpy() for name, of in report.bits.items()}, report.numbers)


class InFront(nn.Module):
    """A defence: something done to the images before the network sees them."""

    def __init__(self, net: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change = net, change
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.change(x))
        return logits


class TestHonest:
    @pytest.mark.parametrize(("name", "geometry", "n"), HONEST)
    def test_trained_networks(self, request: pytest.FixtureRequest, name: str, geometry: Geometry, n: int) -> None:
        net = request.getfixturevalue(name).first(n)
        found = verdict(net.model, net, geometry)
        assert (found.verdict, found.reasons) == ("trusted", ())
        assert set(found.checks.values()) == {"passed"}

    def test_a_linear_network_that_is_provably_robust(self, digits_net: Any) -> None:
        """Right by more than `eps ||w_y - w_j||_1` for every j: nothing in the ball can break it, and nothing does."""
        net, model = digits_net.first(N), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
        head, x = linear(model, 1), to_unit(net.x).flatten(1)
        means = torch.stack([x[net.y == label].mean(0) for label in range(10)])
        with torch.no_grad():  # the nearest class mean: 2 <x, mean> - |mean|^2
            head.weight.copy_(2 * means)
            head.bias.copy_(-means.square().sum(1))
            logits = model(x)
        geometry = Geometry("linf", 0.05, 0.0125, 10)
        reach = geometry.eps * (head.weight[net.y][:, None] - head.weight[None]).abs().sum(2)  # [n, k]
        gap = logits.gather(1, net.y[:, None]) - logits
        provable = (gap > reach).scatter(1, net.y[:, None], True).all(1)
        report = attacked(model, net, geometry, 1.0, "pgd", {})
        assert 0.2 < float(provable.double().mean()) < 0.9
        assert not bool((provable & ~report.bits["robust"]).any())
        assert int((report.bits["robust"] & ~provable).sum()) <= 0.05 * N
        assert verdict(model, net, geometry).reasons == ()


class TestBroken:
    @pytest.mark.parametrize("name", ["digits_net", "robust_digits_net"])
    def test_logits_scaled_by_100(self, request: pytest.FixtureRequest, name: str) -> None:
        """Both as the network's own defence and as the job's scale."""
        net = request.getfixturevalue(name).first(N)
        for found in (verdict(scale_head(net.model, 100.0), net, LARGE), verdict(net.model, net, LARGE, 100.0)):
            assert found.verdict == "invalid"
            assert {"zero_gradient", "masked"} <= set(found.reasons)
            assert {"not_converged", "outside_ball", "eps_zero", "train_mode", "random_forward"}.isdisjoint(
                found.reasons
            )
            assert found.masked_fraction is not None
            assert found.masked_fraction > 0.8

    def test_the_exact_step_at_the_same_scale_is_trusted(self, digits_net: Any) -> None:
        net = digits_net.first(N)
        for loss in ("stable_cross_entropy", "rescaled_cross_entropy"):
            assert verdict(net.model, net, LARGE, 100.0, loss=loss).reasons == ()

    @pytest.mark.parametrize("s", [1.0, 5.0])
    def test_batch_norm_in_train_mode(self, digits_net: Any, s: float) -> None:
        net, model = digits_net.first(N), copy.deepcopy(digits_net.model).train()
        found = verdict(model, net, LARGE, s)
        assert found.verdict == "invalid"
        assert "train_mode" in found.reasons
        assert {"random_forward", "zero_gradient", "outside_ball"}.isdisjoint(found.reasons)

    @pytest.mark.parametrize("s", [1.0, 5.0])
    def test_batch_norm_without_running_statistics(self, digits_net: Any, s: float) -> None:
        """In eval mode, and still every image is classified by the company it keeps."""
        net, model = digits_net.first(N), copy.deepcopy(digits_net.model)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
        found = verdict(model, net, LARGE, s)
        assert found.checks["train_mode"] == "invalid"
        assert found.checks["random_forward"] == "passed"

    @pytest.mark.parametrize("s", [1.0, 5.0])
    def test_normalisation_outside_the_model(self, digits_net: Any, s: float) -> None:
        """The images handed over have mean 0 and deviation 1: they are outside [0, 1] before any attack."""
        net = digits_net.first(N)
        x = (to_unit(net.x) - 0.305) / 0.37
        model = InFront(net.model, lambda images: images * 0.37 + 0.305)
        found = verdict(model, type(net)(model, x, net.y, net.index), MIDDLE, s)
        assert found.verdict == "invalid"
        assert set(found.reasons) == {"outside_ball", "eps_zero"}

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_an_attack_in_normalised_units(self, digits_net: Any, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step and a ball of eps after division by the deviation are 1 / .37 as large in pixels."""

        def normalised(
            model: nn.Module, inputs: AttackInput, *, eps: float, step_size: float, **rest: Any
        ) -> AttackOutput:
            output = ATTACKS["pgd"](model, inputs, eps=eps / 0.37, step_size=step_size / 0.37, **rest)
            return type(output)(**{**vars(output), "eps": eps})

        monkeypatch.setitem(ATTACKS, "pgd_normalised", normalised)
        net, geometry = digits_net.first(N), Geometry(norm, 0.1, 0.02, 10)
        found = verdict(net.model, net, geometry, attack="pgd_normalised")
        assert found.verdict == "invalid"
        assert found.reasons == ("outside_ball",)

    @pytest.mark.parametrize("s", [1.0, 5.0])
    @pytest.mark.parametrize("size", [1e-3, 0.2])
    def test_random_noise_in_forward(self, digits_net: Any, s: float, size: float) -> None:
        net, noise = digits_net.first(N), torch.Generator().manual_seed(0)
        model = InFront(net.model, lambda x: x + size * torch.randn(x.shape, generator=noise))
        found = verdict(model, net, MIDDLE, s)
        assert found.verdict == "invalid"
        assert "random_forward" in found.reasons
        assert {"train_mode", "zero_gradient", "outside_ball"}.isdisjoint(found.reasons)

    @pytest.mark.parametrize("s", [1.0, 5.0])
    def test_a_quantised_input(self, digits_net: Any, s: float) -> None:
        """No gradient comes through the rounding, for the margin neither: only a search without gradients tells."""
        net = digits_net.first(N)
        found = verdict(InFront(net.model, lambda x: (x * 15).round() / 15), net, LARGE, s)
        assert found.verdict == "invalid"
        assert {"zero_gradient", "weaker_than:square"} <= set(found.reasons) <= {
            "zero_gradient", "weaker_than:square", "weaker_than:noise",
        }  # fmt: skip
        assert found.checks["weaker_than:square"] == "invalid"
        assert found.checks["masked"] == "passed"

    def test_too_few_steps(self, digits_net: Any) -> None:
        net = digits_net.first(N)
        found = verdict(net.model, net, Geometry("linf", 0.1, 0.02, 3))
        assert "not_converged" in found.reasons
        assert {"zero_gradient", "outside_ball", "eps_zero", "train_mode", "random_forward"}.isdisjoint(found.reasons)

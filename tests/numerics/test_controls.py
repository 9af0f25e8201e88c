"""The panel of controls: its bits are the challengers' own, and each of its checks sees what it is there for."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.science.architectures import build
from workers.science.attacks import ATTACKS, AttackInput
from workers.science.controls import ControlReport, Geometry, Twin, run_controls
from workers.science.errors import NonFinite
from workers.science.heads import linear_head

pytestmark = pytest.mark.slow

N = 60
SMALL = Geometry("linf", 0.1, 0.02, 8)
GEOMETRIES = (SMALL, Geometry("l2", 0.8, 0.1, 10))
CHECKS = ("train_mode_modules", "random_forward_changed", "batch_dependent_changed", "eps_zero_changed")


def controls(net: Any, model: nn.Module | None = None, geometry: Geometry = SMALL, **options: Any) -> ControlReport:
    return run_controls(model or net.model, net.x[:N], net.y[:N], net.index[:N], geometry, **options)


@pytest.fixture(scope="module")
def panel(digits_net: Any) -> ControlReport:
    return controls(digits_net)


class InFront(nn.Module):
    """A defence: something done to the images before the network sees them."""

    def __init__(self, change: Callable[[Tensor], Tensor], net: nn.Module) -> None:
        super().__init__()
        self.change, self.net = change, net
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(self.change(x))
        return logits


def forgetful(model: nn.Module) -> nn.Module:
    """Batch norms that keep no running statistics: in eval mode too they take those of the batch."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return model


class TestPanel:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_bits_are_the_challengers_own(self, digits_net: Any, geometry: Geometry) -> None:
        bits = controls(digits_net, geometry=geometry).bits
        ball = {"norm": geometry.norm, "eps": geometry.eps}
        walk = {**ball, "step_size": geometry.step_size, "steps": geometry.steps}
        challengers: dict[str, tuple[str, dict[str, Any]]] = {
            "robust_fgsm": ("fgsm", ball),
            "robust_noise": ("noise", {**ball, "kind": "uniform", "draws": 5}),
            "robust_margin": ("pgd", {**walk, "loss": "margin"}),
            "robust_square": ("square", {**ball, "queries": 500}),
            "robust_pgd": ("pgd", walk),
            "robust_more_steps": ("pgd", {**walk, "steps": 4 * geometry.steps}),
        }
        assert set(bits) == {"clean_correct", *challengers}
        inputs = AttackInput(digits_net.x[:N], digits_net.y[:N], digits_net.index[:N])
        for name, (attack, params) in challengers.items():
            alone = ~ATTACKS[attack](digits_net.model, inputs, **params).broken
            if name == "robust_more_steps":
                alone &= bits["robust_pgd"]
            assert torch.equal(bits[name], alone), name

    @pytest.mark.parametrize(
        "twin",
        [
            Twin("apgd", {"norm": "linf", "eps": 0.1, "steps": 10, "loss": "margin"}),
            Twin("pgd", {"norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 8, "restarts": 3, "loss": "margin"}),
        ],
    )
    def test_a_twin_is_the_attack_that_was_asked_for(self, digits_net: Any, panel: ControlReport, twin: Twin) -> None:
        found = controls(digits_net, twin=twin).bits
        inputs = AttackInput(digits_net.x[:N], digits_net.y[:N], digits_net.index[:N])
        alone = ATTACKS[twin.attack](digits_net.model, inputs, **twin.params)
        assert torch.equal(found.pop("robust_twin"), ~alone.broken)
        assert all(torch.equal(bits, panel.bits[name]) for name, bits in found.items())

    def test_who_was_wrong_before_is_robust_under_nothing(self, panel: ControlReport) -> None:
        bits = panel.bits
        assert all(not bool((of & ~bits["clean_correct"]).any()) for of in bits.values())
        assert 0.1 < float(bits["robust_pgd"].double().mean()) < 0.95

    def test_neither_batches_nor_bytes_nor_the_process_matter(self, digits_net: Any, panel: ControlReport) -> None:
        before, state = copy.deepcopy(digits_net.model.state_dict()), torch.random.get_rng_state()
        seen: list[tuple[int, int]] = []
        as_bytes = (digits_net.x[:N] * 255).round().to(torch.uint8)
        report = run_controls(
            digits_net.model, as_bytes, digits_net.y[:N], digits_net.index[:N], SMALL,
            batch_size=25, on_progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
        assert report.numbers == panel.numbers
        assert all(torch.equal(report.bits[name], of) for name, of in panel.bits.items())
        assert torch.equal(state, torch.random.get_rng_state())
        assert all(torch.equal(before[key], value) for key, value in digits_net.model.state_dict().items())
        assert all(p.grad is None for p in digits_net.model.parameters())
        done, totals = zip(*seen, strict=True)
        assert sorted(set(done)) == list(done)
        assert set(totals) == {done[-1]}

    def test_nan_is_an_error_and_not_a_number(self, digits_net: Any) -> None:
        model = copy.deepcopy(digits_net.model)
        with torch.no_grad():
            linear_head(model).bias[0] = torch.nan
        with pytest.raises(NonFinite, match=f"for {N} of {N} images"):
            controls(digits_net, model)


class TestChecks:
    """Which of the four counts a network makes rise: those named, and no other."""

    def check(self, report: ControlReport, *raised: str) -> None:
        assert {name for name in CHECKS if report.numbers[name]} == set(raised)
        assert report.numbers["n"] == N

    def test_an_honest_network(self, digits_net: Any) -> None:
        for model in (digits_net.model, build("mlp", (1, 8, 8), 10, seed=0).eval()):
            self.check(controls(digits_net, model, geometry=GEOMETRIES[1]))

    def test_train_mode(self, digits_net: Any) -> None:
        model = copy.deepcopy(digits_net.model).train()
        self.check(controls(digits_net, model), "train_mode_modules", "batch_dependent_changed")

    def test_batch_statistics_in_eval_mode(self, digits_net: Any) -> None:
        report = controls(digits_net, forgetful(digits_net.model))
        self.check(report, "batch_dependent_changed")
        assert report.numbers["batch_dependent_changed"] == 16

    def test_batch_statistics_of_vectors(self, digits_net: Any) -> None:
        """PyTorch refuses a single vector there; neither the check nor an attack on the only one left falls over it."""
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 10))
        x, index, tiny = digits_net.x[:N], digits_net.index[:N], Geometry("linf", 1e-5, 1e-5, 1)
        model = forgetful(layers).eval()
        right = model(x).argmax(1)
        y = torch.where(torch.arange(N) < 1, right, (right + 1) % 10)
        report = run_controls(model, x, y, index, tiny)
        self.check(report, "batch_dependent_changed")
        assert report.bits["robust_more_steps"].tolist() == [True] + [False] * (N - 1)

    @pytest.mark.parametrize("size", [1e-4, 0.1])
    def test_random_forward(self, digits_net: Any, size: float) -> None:
        """It is also different alone than in its batch, and that is no batch norm's doing."""
        generator = torch.Generator().manual_seed(0)
        model = InFront(lambda x: x + size * torch.randn(x.shape, generator=generator), digits_net.model)
        report = controls(digits_net, model)
        assert report.numbers["random_forward_changed"] == N
        assert report.numbers["batch_dependent_changed"] == report.numbers["train_mode_modules"] == 0

    def test_images_beyond_the_unit_interval(self, digits_net: Any) -> None:
        """Normalised outside the model: clipping to [0, 1] destroys them, already at eps = 0."""
        model = InFront(lambda x: x * 0.37 + 0.3, digits_net.model)
        x = (digits_net.x[:N] - 0.3) / 0.37
        self.check(run_controls(model, x, digits_net.y[:N], digits_net.index[:N], SMALL), "eps_zero_changed")

    def test_a_quantised_input_passes_the_checks_and_falls_to_random_search(self, digits_net: Any) -> None:
        report = controls(digits_net, InFront(lambda x: (x * 15).round() / 15, digits_net.model))
        self.check(report)
        assert torch.equal(report.bits["robust_pgd"], report.bits["clean_correct"])
        assert torch.equal(report.bits["robust_margin"], report.bits["clean_correct"])
        assert int((report.bits["robust_pgd"] & ~report.bits["robust_square"]).sum()) > 0.2 * N

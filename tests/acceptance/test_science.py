"""The predictions of science/README.md (Scaling, Trajectory, Bounds), on networks trained here on real images."""

import math
import runpy
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typed import number

from workers.science.bounds import Anchor, bound_numbers, radius
from workers.science.closed_forms import ClosedForms
from workers.science.datasets import to_unit
from workers.science.evaluation import AttackReport, evaluate_attack
from workers.science.heads import features_and_logits, linear_head, scale_head
from workers.science.sharpness import MeasureInput
from workers.science.sharpness.detector import detector
from workers.science.trajectory import Recorder, Trajectory, analyse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a fixture trains a network

REPOSITORY = Path(__file__).resolve().parents[2]
SCALES = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 50.0, 100.0)
"""Those of the paper, and 100."""

PGD_LINF: dict[str, Any] = {"norm": "linf", "eps": 8 / 255, "step_size": 2 / 255, "steps": 10}
PGD_LINF_STRONG = {**PGD_LINF, "eps": 0.1, "steps": 30}
GENTLE: dict[str, dict[str, Any]] = {
    "linf": {"norm": "linf", "eps": 2 / 255, "step_size": 0.5 / 255, "steps": 10},
    "l2": {"norm": "l2", "eps": 0.2, "step_size": 0.04, "steps": 10},
}
"""Small enough that some images of CIFAR-10 withstand."""


def attack(net: Any, params: dict[str, Any], s: float = 1.0, name: str = "pgd") -> AttackReport:
    return evaluate_attack(scale_head(net.model, s), net.x, net.y, net.index, attack=name, params=params, scale=s)


def path(net: Any, params: dict[str, Any], s: float = 1.0, name: str = "pgd") -> Trajectory:
    model = scale_head(net.model, s)
    recorder = Recorder(linear_head(model).weight, linear_head(model).bias)
    evaluate_attack(model, net.x, net.y, net.index, attack=name, params=params, scale=s, observer_factory=recorder)
    return recorder.trajectory()


@torch.no_grad()
def logits(net: Any, s: float = 1.0) -> Tensor:
    z: Tensor = scale_head(net.model, s)(to_unit(net.x))
    return z


@torch.no_grad()
def features(net: Any) -> tuple[Tensor, Tensor, Tensor]:
    """phi, which no scale changes, and weight and bias at s = 1."""
    head = linear_head(net.model)
    return features_and_logits(net.model, to_unit(net.x))[0], head.weight.detach(), head.bias.detach()


def log_kappa(net: Any, scales: Iterable[float], name: str = "log_relative_sharpness") -> Tensor:
    """`[scales, n]`."""
    phi, weight, bias = features(net)
    return torch.stack([getattr(ClosedForms.of(phi, s * weight, s * bias), name) for s in scales])


class TestScaling:
    @pytest.mark.parametrize("name", ["digits_net", "robust_digits_net", "cifar_net"])
    def test_predictions_are_equal_at_every_scale(self, request: pytest.FixtureRequest, name: str) -> None:
        net = request.getfixturevalue(name)
        expected = logits(net).argmax(1)
        assert len(set(expected.tolist())) > 5
        for s in SCALES:
            assert torch.equal(logits(net, s).argmax(1), expected)

    @pytest.mark.parametrize("loss", ["rescaled_cross_entropy", "margin", "dlr"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_scale_free_losses_give_the_same_bits(self, cifar_net: Any, loss: str, norm: str) -> None:
        net, params = cifar_net.first(60), {**GENTLE[norm], "loss": loss}
        at_one = attack(net, params).bits["robust"]
        assert 5 < int(at_one.sum()) < int((logits(net).argmax(1) == net.y).sum())
        for s in (0.25, 5.0, 100.0):
            assert int((attack(net, params, s).bits["robust"] != at_one).sum()) <= 1

    def test_a_power_of_two_changes_not_even_a_pixel(self, cifar_net: Any) -> None:
        net = cifar_net.first(40)
        for loss in ("rescaled_cross_entropy", "margin", "dlr"):
            one, eight = (path(net, {**PGD_LINF, "loss": loss}, s) for s in (1.0, 8.0))
            assert torch.equal(one.l2, eight.l2)
            assert torch.equal(one.feature_moved, eight.feature_moved)

    def test_plain_cross_entropy_goes_blind_on_cifar_and_the_exact_step_does_not(self, cifar_net: Any) -> None:
        """As in "Numbers to compare with": from some s on what is called robust is what has no gradient left."""
        reports = {s: attack(cifar_net, PGD_LINF, s) for s in (1.0, 10.0, 25.0, 50.0, 100.0)}
        clean = reports[1.0].numbers["clean_accuracy"] or 0
        robust = [report.numbers["robust_accuracy"] or 0 for report in reports.values()]
        blind = [report.numbers["zero_gradient_fraction_of_all"] or 0 for report in reports.values()]
        assert {report.numbers["clean_accuracy"] for report in reports.values()} == {clean}
        assert robust[0] < robust[-1] / 4
        assert blind[0] == 0
        assert blind == sorted(blind)
        assert all(later >= earlier - 0.01 for earlier, later in pairwise(robust))
        assert blind[-1] > 0.6 * clean
        assert robust[-1] > 0.6 * clean
        for report in reports.values():
            correct, at_s, at_1 = report.bits["clean_correct"], report.bits["robust"], reports[1.0].bits["robust"]
            masked, reverse = (float(bits.double().mean()) for bits in (correct & at_s & ~at_1, correct & ~at_s & at_1))
            rise = (report.numbers["robust_accuracy"] or 0) - robust[0]
            assert masked == pytest.approx(rise + reverse)
            assert not bool(
                (report.bits["zero_gradient"] & report.bits["clean_correct"] & ~report.bits["robust"]).any()
            )
        for loss in ("stable_cross_entropy", "rescaled_cross_entropy"):
            exact = attack(cifar_net, {**PGD_LINF, "loss": loss}, 100.0).numbers
            assert exact["zero_gradient_fraction"] == 0
            assert (exact["robust_accuracy"] or 0) < 0.06

    def test_examples_made_at_scale_1_break_the_network_at_scale_100(self, cifar_net: Any) -> None:
        net = cifar_net.first(80)
        blind = attack(net, PGD_LINF, 100.0).bits["robust"]
        moved = attack(net, {**PGD_LINF, "source": net.model}, 100.0, name="transfer").bits["robust"]
        assert torch.equal(moved, attack(net, PGD_LINF).bits["robust"])
        assert int(blind.sum()) > 10
        assert int((blind & ~moved).sum()) > 0.75 * int(blind.sum()), "most of what looks robust is broken"


@pytest.mark.parametrize("name", ["digits_net", "cifar_net"])
class TestSharpnessAndScale:
    def test_the_trace_falls_for_every_sample(self, request: pytest.FixtureRequest, name: str) -> None:
        traces = log_kappa(request.getfixturevalue(name), SCALES, "log_hessian_trace")
        assert bool((traces[1:] < traces[:-1]).all())

    def test_relative_sharpness_peaks_at_2_4_over_the_margin(self, request: pytest.FixtureRequest, name: str) -> None:
        """Among two classes: a third that is near moves the peak. On a grid of 2 % that reaches the last peak."""
        net = request.getfixturevalue(name)
        phi, weight, bias = (part.double() for part in features(net))
        top = (phi @ weight.T + bias).topk(3, dim=1).values
        margin = top[:, 0] - top[:, 1]
        alone = (top[:, 1] - top[:, 2] > 2 * margin) & (margin > 0)
        assert int(alone.sum()) >= 2
        first, last = math.log(1 / float(margin[alone].max())), math.log(6 / float(margin[alone].min()))
        grid = torch.linspace(first, last, 1 + math.ceil((last - first) / 0.02)).exp()
        peak = grid[log_kappa(net, grid.tolist())[:, alone].argmax(0)] * margin[alone]
        assert bool(((peak > 2.3) & (peak < 2.5)).all())

    def test_beyond_it_falls_like_two_log_s_minus_s_margin(self, request: pytest.FixtureRequest, name: str) -> None:
        net = request.getfixturevalue(name)
        top = logits(net).double().topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
        at_50, at_100 = log_kappa(net, (50.0, 100.0))
        sure = margin > 0.2  # at s = 50 the top class stands apart
        assert float(sure.double().mean()) > 0.8
        assert float((at_100 - at_50 - 2 * math.log(2) + 50 * margin)[sure].abs().median()) < 0.01
        assert bool(torch.isfinite(at_100).all())

    def test_the_certified_radius_turns_between_log_2_and_log_k(
        self, request: pytest.FixtureRequest, name: str
    ) -> None:
        """From some s on: wider basins for low thresholds, narrower ones for high, in the median of correct images."""
        net = request.getfixturevalue(name)
        correct, (phi, weight, bias) = logits(net).argmax(1) == net.y, features(net)
        for e, sign in ((0.01, 1), (0.1, 1), (0.6, 1), (math.log(10), -1), (5.0, -1)):
            scales = (2.5, 5.0, 10.0, 50.0, 100.0)
            widths = [radius(Anchor.of(phi, net.y, s * weight, s * bias), e, 1.0)[correct].median() for s in scales]
            assert widths == sorted(widths, key=lambda width: sign * width), (e, widths)


@pytest.fixture(scope="module")
def strong_path(cifar_net: Any) -> Trajectory:
    return path(cifar_net.first(120), PGD_LINF_STRONG)


class TestValley:
    """The uncanny valley: sharpness rises to the boundary and falls beyond it, as the net grows sure of the wrong."""

    @pytest.mark.parametrize(("name", "strict", "loose"), [("pgd_linf", 0.0, 0.12), ("pgd_linf_strong", 0.03, 0.4)])
    def test_on_cifar_and_not_on_the_way_to_noise(
        self, cifar_net: Any, strong_path: Trajectory, name: str, strict: float, loose: float
    ) -> None:
        attacked, _ = analyse(path(cifar_net, PGD_LINF) if name == "pgd_linf" else strong_path, "linf")
        assert number(attacked, "valley_n") > 40
        assert number(attacked, "valley_loose_relative_sharpness") > loose
        assert number(attacked, "valley_relative_sharpness") >= strict
        # It is confidence only: Tr S(p) alone shows as much, the norm of the features nothing.
        assert (
            number(attacked, "valley_loose_softmax_trace") >= number(attacked, "valley_loose_relative_sharpness") - 0.05
        )
        assert number(attacked, "valley_feature_norm_squared") <= 0.02
        assert number(attacked, "valley_loose_feature_norm_squared") <= 0.02
        # The way to a random point of the same ball has none. (The way to an image of pure noise may end in a
        # confident region as well, with one network and not with another: it tells nothing of attacks.)
        noise, _ = analyse(path(cifar_net, {"kind": "uniform"}, name="noise"), "linf")
        assert number(noise, "valley_loose_relative_sharpness") <= 0.05
        assert (noise["valley_relative_sharpness"] or 0) <= 0.02

    def test_the_larger_the_scale_the_more_easily(self, cifar_net: Any) -> None:
        """With the margin, the path is the same at every scale."""
        params = {**PGD_LINF_STRONG, "loss": "margin"}
        found = [analyse(path(cifar_net.first(60), params, s), "linf")[0] for s in (0.5, 1.0, 2.5)]
        loose = [number(numbers, "valley_loose_relative_sharpness") for numbers in found]
        assert loose == sorted(loose)
        assert loose[0] < loose[-1]

    def test_the_curve_aligned_on_the_flip_falls_after_it(self, strong_path: Trajectory) -> None:
        curves = analyse(strong_path, "linf")[1]
        kappa = dict(zip(curves["aligned_offset"], curves["aligned_log_relative_sharpness_median"], strict=True))
        assert max(number(kappa, -1), number(kappa, 0)) > number(kappa, 10) + math.log(10)

    def test_and_can_be_looked_at(self, strong_path: Trajectory, tmp_path: Path) -> None:
        figure = runpy.run_path(str(REPOSITORY / "examples" / "figure_valley.py"))
        figure["draw"](str(tmp_path / "valley.png"), "a network", analyse(strong_path, "linf")[1])
        assert (tmp_path / "valley.png").read_bytes().startswith(b"\x89PNG")


class TestBounds:
    @pytest.mark.parametrize("name", ["digits_net", "robust_digits_net", "cifar_net"])
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_corrected_ones_hold_at_every_attack_point(
        self, request: pytest.FixtureRequest, name: str, norm: str
    ) -> None:
        net = request.getfixturevalue(name).first(60)
        for s in (0.25, 1.0, 10.0, 100.0):
            for loss in ("cross_entropy", "margin"):
                params = {**(PGD_LINF if norm == "linf" else GENTLE["l2"]), "loss": loss}
                head = linear_head(scale_head(net.model, s))
                numbers = bound_numbers(path(net, params, s), head.weight, head.bias)
                assert numbers["bound_n"] == 60 * 10
                assert numbers["bound_violated_corrected_taylor"] == 0
                assert numbers["bound_violated_certificate"] == 0
                assert 0 <= (numbers["bound_violated_relayed_relative_flatness"] or 0) <= 1


class TestDetector:
    def test_beats_chance_on_cifar_until_the_attack_hides(self, cifar_net: Any) -> None:
        x = to_unit(cifar_net.x)
        inputs = MeasureInput(x, cifar_net.y, x, cifar_net.y, batch_size=100)
        found = detector(cifar_net.model, inputs, eps=0.1, step_size=2 / 255, steps=30, images=100).numbers
        assert (found["detector_n"] or 0) > 40
        assert (found["detector_accuracy"] or 0) > 0.7
        assert (found["detector_auroc"] or 0) > 0.75
        assert number(found, "detector_adaptive_accuracy") < number(found, "detector_accuracy")
        assert number(found, "detector_adaptive_flip_rate") > 0.5

"""The numbers of an evaluation are what their names say, and its bits are the attack's."""

import json
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from typed import linear

from workers.science.attacks import ATTACKS, AttackInput
from workers.science.bounds import bound_numbers
from workers.science.errors import NonFinite
from workers.science.evaluation import ball_limit, evaluate_attack, evaluate_clean
from workers.science.heads import linear_head, scale_head
from workers.science.trajectory import Recorder, analyse

PARAMS: dict[str, Any] = {"eps": 0.1, "step_size": 0.02, "steps": 8}


def evaluate(net: Any, n: int = 150, **options: Any) -> Any:
    options = {"attack": "pgd", "params": PARAMS, "batch_size": 64, **options}
    return evaluate_attack(options.pop("model", net.model), net.x[:n], net.y[:n], net.index[:n], **options)


class TestClean:
    def test_accuracy_and_loss(self, digits_net: Any) -> None:
        report = evaluate_clean(digits_net.model, digits_net.x, digits_net.y, batch_size=33)
        with torch.no_grad():
            logits = digits_net.model(digits_net.x).double()
        assert report.accuracy == float((logits.argmax(1) == digits_net.y).double().mean())
        assert math.isclose(report.loss, float(nn.functional.cross_entropy(logits, digits_net.y)), rel_tol=1e-4)
        assert report.top5_accuracy is not None
        assert report.accuracy <= report.top5_accuracy <= 1
        assert report.correct.dtype == torch.bool
        assert math.isclose(float(report.losses.mean()), report.loss)

    def test_bytes_are_images_too(self, digits_net: Any) -> None:
        as_bytes = (digits_net.x * 255).round().to(torch.uint8)
        one, other = (evaluate_clean(digits_net.model, x, digits_net.y) for x in (digits_net.x, as_bytes))
        assert one.accuracy == other.accuracy
        assert math.isclose(one.loss, other.loss, rel_tol=1e-5)  # x * 255 / 255 is x to the last bit or two

    def test_a_tiny_loss_is_not_zero(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False)).eval()
        with torch.no_grad():
            linear(model, 1).weight.copy_(torch.tensor([[600.0, 0.0], [0.0, 900.0], [0.0, 0.0]]))
        losses = evaluate_clean(model, torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 0])).losses
        assert math.isclose(float(losses[0]), 2 * math.exp(-600), rel_tol=1e-9)
        assert float(losses[1]) == 900

    def test_nan_is_refused(self, digits_net: Any) -> None:
        scaled = scale_head(digits_net.model, 1.0)
        with torch.no_grad():
            linear_head(scaled).weight[0, 0] = torch.inf
        with pytest.raises(NonFinite, match="500 of 500 images") as refused:
            evaluate_clean(scaled, digits_net.x, digits_net.y)
        assert refused.value.examples == tuple(range(500))

    def test_a_network_without_a_linear_head_still_has_an_accuracy(self, digits_net: Any) -> None:
        capped = nn.Sequential(digits_net.model, nn.Tanh()).eval()
        assert evaluate_clean(capped, digits_net.x, digits_net.y).accuracy > 0.9


class TestAttack:
    def test_the_numbers_follow_from_the_bits(self, digits_net: Any) -> None:
        report = evaluate(digits_net)
        numbers, bits = report.numbers, report.bits
        assert set(bits) == {"clean_correct", "robust", "robust_any_iterate", "zero_gradient", "non_finite"}
        assert numbers["n_non_finite"] == int(bits["non_finite"].sum()) == 0
        assert all(b.dtype == torch.bool and b.shape == (150,) for b in bits.values())
        assert numbers["robust_accuracy"] == float(bits["robust"].double().mean())
        assert numbers["clean_accuracy"] == float(bits["clean_correct"].double().mean())
        assert numbers["n_clean_correct"] == int(bits["clean_correct"].sum())
        assert not bool((bits["robust"] & ~bits["clean_correct"]).any())
        assert not bool((bits["robust_any_iterate"] & ~bits["robust"]).any())
        flipped = int((bits["clean_correct"] & ~bits["robust"]).sum())
        assert numbers["flip_rate"] == flipped / numbers["n_clean_correct"]
        assert numbers["outside_ball"] == numbers["outside_box"] == 0
        assert numbers["max_perturbation_linf"] == pytest.approx(0.1, abs=1e-6)
        assert numbers["gradient_calls"] == 150 * 8
        assert numbers["loss_increase_mean"] == pytest.approx(numbers["robust_loss"] - numbers["clean_loss"])
        assert 0 < numbers["robust_accuracy"] < numbers["clean_accuracy"]

    @pytest.mark.parametrize("batch_size", [1, 7, 150])
    def test_the_batch_size_is_no_part_of_the_result(self, digits_net: Any, batch_size: int) -> None:
        one, other = evaluate(digits_net, 40), evaluate(digits_net, 40, batch_size=batch_size)
        assert all(torch.equal(one.bits[name], other.bits[name]) for name in one.bits)

    def test_the_bits_are_the_attack_s(self, digits_net: Any) -> None:
        report = evaluate(digits_net, batch_size=150)
        inputs = AttackInput(digits_net.x[:150], digits_net.y[:150], digits_net.index[:150])
        output = ATTACKS["pgd"](digits_net.model, inputs, **PARAMS)
        assert torch.equal(report.bits["robust"], ~output.broken)
        assert torch.equal(report.bits["robust_any_iterate"], ~output.broken_any_iterate)

    def test_the_share_of_the_most_frequent_label_is_what_the_best_constant_answer_gets_right(
        self, digits_net: Any
    ) -> None:
        """On skewed labels that is far above 1/10: a network that always says 3 is as robust as it is right."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(digits_net.x[0].numel(), 10)).eval()
        with torch.no_grad():
            linear(model, 1).weight.zero_()
            linear(model, 1).bias.copy_(torch.nn.functional.one_hot(torch.tensor(3), 10).float())
        y = torch.where(torch.arange(100) % 10 == 0, 0, 3)
        report = evaluate_attack(
            model, digits_net.x[:100], y, digits_net.index[:100], attack="pgd", params=PARAMS, batch_size=64
        )
        assert report.numbers["majority_share"] == report.numbers["robust_accuracy"] == 0.9

    def test_eps_zero_is_clean(self, digits_net: Any) -> None:
        numbers = evaluate(digits_net, params={**PARAMS, "eps": 0.0}).numbers
        assert numbers["robust_accuracy"] == numbers["clean_accuracy"]
        assert numbers["robust_loss"] == numbers["clean_loss"]
        assert numbers["max_perturbation_l2"] == 0

    def test_attacks_without_gradients_or_ball_say_so(self, digits_net: Any) -> None:
        report = evaluate(digits_net, attack="noise", params={"kind": "gaussian"})
        assert "zero_gradient" not in report.bits
        assert report.numbers["zero_gradient_fraction"] is None
        assert report.numbers["outside_ball"] is None

    def test_an_attack_that_leaves_the_ball_is_caught(self, digits_net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def cheat(
            model: nn.Module, inputs: AttackInput, *, eps: float, step_size: float, steps: int, **rest: Any
        ) -> Any:
            output = ATTACKS["fgsm"](model, inputs, eps=2 * eps, **rest)
            return type(output)(**{**vars(output), "eps": eps, "x_adv": output.x_adv + 0.6})

        monkeypatch.setitem(ATTACKS, "pgd_cheating", cheat)
        numbers = evaluate(digits_net, attack="pgd_cheating").numbers
        assert numbers["outside_ball"] == 150
        assert numbers["outside_box"] == 150

    def test_limits_of_the_ball(self) -> None:
        assert ball_limit("linf", 0.1) == 0.1 + 1e-6
        assert ball_limit("l2", 0.5) == 0.5 * (1 + 1e-5) + 1e-6

    def test_the_scale_reaches_the_loss(self, digits_net: Any) -> None:
        params = {**PARAMS, "eps": 0.3, "step_size": 0.06, "loss": "rescaled_cross_entropy"}
        scaled = scale_head(digits_net.model, 100.0)
        assert evaluate(digits_net, model=scaled, params=params, scale=100.0).numbers["robust_accuracy"] < 0.1
        assert evaluate(digits_net, model=scaled, params=params, scale=1.0).numbers["robust_accuracy"] > 0.7

    def test_observers_come_per_batch_in_order(self, digits_net: Any) -> None:
        seen: list[tuple[int, int]] = []

        def factory(x: Any, y: Any, index: Any) -> Any:
            first = int(index[0])
            return lambda t, x_t, phi, logits: seen.append((first, t))

        evaluate(digits_net, observer_factory=factory)
        assert seen == [(first, t) for first in (0, 64, 128) for t in range(9)]
        with pytest.raises(ValueError, match="float32"):
            evaluate(digits_net, observer_factory=factory, precision="bf16")

    def test_progress_counts_all_batches(self, digits_net: Any) -> None:
        seen: list[tuple[int, int]] = []
        evaluate(digits_net, on_progress=lambda done, total: seen.append((done, total)))
        assert seen == [(i, 24) for i in range(1, 25)]

    def test_unknown_attack_and_no_examples(self, digits_net: Any) -> None:
        with pytest.raises(ValueError, match="unknown attack"):
            evaluate(digits_net, attack="telepathy")
        with pytest.raises(ValueError, match="no examples"):
            evaluate(digits_net, 0)

    @pytest.mark.parametrize("margin", [2.0, 98.0, 2000.0])
    def test_the_loss_of_a_confident_image_rises(self, margin: float) -> None:
        """By pixels of .5 that lose .01: the margin falls by a fiftieth, in one step or in two."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        with torch.no_grad():
            linear(model, 1).bias.zero_()
            linear(model, 1).weight.copy_(torch.tensor([[margin / 2] * 4, [0.0] * 4]))
        x, y, head = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), linear_head(model)
        recorder = Recorder(head.weight, head.bias)
        params = {"eps": 0.01, "step_size": 0.005, "steps": 2, "loss": "margin"}
        found = evaluate_attack(model, x, y, y, attack="pgd", params=params, observer_factory=recorder)
        along = analyse(recorder.trajectory(), "linf")[0]
        with mpmath.workdps(60):
            rise = mpmath.log1p(mpmath.exp(-0.98 * margin)) - mpmath.log1p(mpmath.exp(-margin))
        want = pytest.approx(float(rise), rel=1e-5 * margin, abs=0)
        assert found.numbers["loss_increase_mean"] == along["trajectory_loss_increase_mean"] == want
        assert along["trajectory_still_rising_fraction"] == 1.0  # though a loss of e^-2000 is 0


class Poisoned(nn.Module):
    """`model`, whose images with a bright first pixel meet NaN or infinities: in the way in, or in the gradient."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0, 0, 0] > 0.5
        extra = torch.zeros(len(x), 1, 1, 1)
        poison = {
            "nan": lambda of: of.new_full((len(of),), torch.nan),
            "infinite": lambda of: of.new_full((len(of),), torch.inf),
            "gradient": lambda of: (of - of.detach()).abs().flatten(1).sum(1).sqrt(),  # of value 0
        }
        extra[marked] = poison[self.kind](x[marked])[:, None, None, None]
        logits: Tensor = self.model(x + extra)
        return logits


QUICK: dict[str, dict[str, Any]] = {
    "pgd": PARAMS,
    "fgsm": {"eps": 0.1},
    "apgd": {"eps": 0.1, "steps": 6},
    "square": {"eps": 0.1, "queries": 30},
    "autoattack": {"eps": 0.1, "steps": 4, "targets": 2, "queries": 10},
    "cw": {"steps": 5},
    "noise": {"kind": "uniform", "eps": 0.1, "points": 3},
    "transfer": PARAMS,
}


class TestNonFinite:
    """One image with NaN or infinities is counted; it fails no attack and changes no other image's outcome."""

    @pytest.mark.parametrize("kind", ["nan", "infinite", "gradient"])
    @pytest.mark.parametrize(
        "attack", [pytest.param(name, marks=pytest.mark.slow) if name == "autoattack" else name for name in ATTACKS]
    )
    def test_the_rest_is_attacked_as_before(self, digits_net: Any, attack: str, kind: str) -> None:
        x, y, index = digits_net.x[:40].clone(), digits_net.y[:40], digits_net.index[:40]
        bad = torch.zeros(40, dtype=torch.bool)
        bad[[0, 7, 8, 39]] = True
        x[bad, 0, 0, 0] = 1.0
        params = QUICK[attack]
        nets = (Poisoned(digits_net.model, kind).eval(), digits_net.model)
        poisoned, plain = (
            evaluate_attack(
                net, x, y, index, attack=attack, params={**params, "source": net} if attack == "transfer" else params,
                batch_size=16,
            )
            for net in nets
        )  # fmt: skip
        if kind == "gradient" and attack in ("square", "noise"):  # they take none
            bad[:] = False
        elif kind == "gradient" and attack == "autoattack":  # what is wrong already is not attacked
            bad &= digits_net.model(x).argmax(1) == y
        assert poisoned.bits["non_finite"].tolist() == bad.tolist()
        for name, of in plain.bits.items():
            assert torch.equal(poisoned.bits[name][~bad], of[~bad]), name
            assert name == "non_finite" or not bool(poisoned.bits[name][bad].any())
        numbers = poisoned.numbers
        assert (numbers["n"], numbers["n_non_finite"]) == (40, int(bad.sum()))
        assert numbers["robust_accuracy"] == float((plain.bits["robust"] & ~bad).double().mean())
        json.dumps(numbers, allow_nan=False)

    @pytest.mark.parametrize("kind", ["nan", "infinite"])
    def test_so_are_trajectory_bounds_and_clean_accuracy(self, digits_net: Any, kind: str) -> None:
        x, y, index = digits_net.x[:40].clone(), digits_net.y[:40], digits_net.index[:40]
        x[::10, 0, 0, 0] = 1.0
        kept = x[:, 0, 0, 0] < 0.5
        net, head = Poisoned(digits_net.model, kind).eval(), linear_head(digits_net.model)
        numbers = []
        for model, part in ((net, torch.ones_like(kept)), (digits_net.model, kept)):
            recorder = Recorder(head.weight, head.bias)
            found = evaluate_attack(
                model, x[part], y[part], index[part], attack="pgd", params=PARAMS, observer_factory=recorder
            )
            path = recorder.trajectory(found.bits["non_finite"])
            numbers.append({**analyse(path, "linf")[0], **bound_numbers(path, head.weight, head.bias)})
        lost, rest = ({name: value for name, value in of.items() if value is not None} for of in numbers)
        assert lost == pytest.approx(rest, rel=1e-5, abs=1e-7)
        assert numbers[0]["trajectory_n"] == 36
        all_of_them, the_rest = evaluate_clean(net, x, y), evaluate_clean(digits_net.model, x[kept], y[kept])
        assert all_of_them.non_finite.tolist() == (~kept).tolist()
        assert all_of_them.accuracy == float(the_rest.correct.sum()) / 40
        assert all_of_them.loss == pytest.approx(the_rest.loss)

    def test_where_every_image_is_lost_the_weights_are(self, digits_net: Any) -> None:
        x = digits_net.x[:40].clone()
        x[:, 0, 0, 0] = 1.0
        model = Poisoned(digits_net.model, "gradient").eval()
        with pytest.raises(NonFinite, match=r"for 40 of 40 images; check the weights") as refused:
            evaluate_attack(model, x, digits_net.y[:40], digits_net.index[:40], attack="pgd", params=PARAMS)
        assert refused.value.examples == tuple(range(40))

    def test_options_for_speed_are_compared_on_finite_images(self, digits_net: Any) -> None:
        x = digits_net.x[:40].clone()
        x[0, 0, 0, 0] = 1.0
        model = Poisoned(digits_net.model, "nan").eval()
        found = evaluate_attack(
            model, x, digits_net.y[:40], digits_net.index[:40], attack="pgd", params=PARAMS, channels_last=True
        )
        assert found.numbers["n_non_finite"] == 1


@pytest.mark.parametrize(("classes", "known"), [(3, False), (5, False), (6, True)])
def test_top_five_of_no_more_than_five_classes_says_nothing(classes: int, known: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes)).eval()
    x, y = torch.rand(9, 1, 2, 2), torch.arange(9) % classes
    found = evaluate_attack(model, x, y, torch.arange(9), attack="fgsm", params={"eps": 0.1})
    assert (evaluate_clean(model, x, y).top5_accuracy is not None) == known
    assert (found.numbers["robust_top5_accuracy"] is not None) == known

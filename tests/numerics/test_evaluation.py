"""The numbers of an evaluation are what their names say, and its bits are the attack's."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from workers.science.attacks import ATTACKS
from workers.science.errors import NonFinite
from workers.science.evaluation import ball_limit, evaluate_attack, evaluate_clean, log1p_loss, masking
from workers.science.heads import linear_head, scale_head

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
        assert report.accuracy <= report.top5_accuracy <= 1
        assert report.correct.dtype == torch.bool
        assert math.isclose(float(report.losses.mean()), report.loss)

    def test_bytes_are_images_too(self, digits_net: Any) -> None:
        as_bytes = (digits_net.x * 255).round().to(torch.uint8)
        one, other = (evaluate_clean(digits_net.model, x, digits_net.y) for x in (digits_net.x, as_bytes))
        assert one.accuracy == other.accuracy
        assert math.isclose(one.loss, other.loss, rel_tol=1e-5)  # x * 255 / 255 is x to the last bit or two

    def test_a_tiny_loss_is_not_zero(self) -> None:
        logits = torch.tensor([[600.0, 0.0, 0.0], [0.0, 900.0, 0.0]], dtype=torch.float64)
        loss = log1p_loss(logits, torch.tensor([0, 0]))
        assert math.isclose(float(loss[0]), 2 * math.exp(-600), rel_tol=1e-9)
        assert float(loss[1]) == 900

    def test_nan_is_refused(self, digits_net: Any) -> None:
        scaled = scale_head(digits_net.model, 1.0)
        with torch.no_grad():
            linear_head(scaled).weight[0, 0] = torch.inf
        with pytest.raises(NonFinite):
            evaluate_clean(scaled, digits_net.x, digits_net.y)

    def test_a_network_without_a_linear_head_still_has_an_accuracy(self, digits_net: Any) -> None:
        capped = nn.Sequential(digits_net.model, nn.Tanh()).eval()
        assert evaluate_clean(capped, digits_net.x, digits_net.y).accuracy > 0.9


class TestAttack:
    def test_the_numbers_follow_from_the_bits(self, digits_net: Any) -> None:
        report = evaluate(digits_net)
        numbers, bits = report.numbers, report.bits
        assert set(bits) == {"clean_correct", "robust", "robust_any_iterate", "zero_gradient"}
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
        output = ATTACKS["pgd"](
            digits_net.model, digits_net.x[:150], digits_net.y[:150], index=digits_net.index[:150], **PARAMS
        )
        assert torch.equal(report.bits["robust"], ~output.broken)
        assert torch.equal(report.bits["robust_any_iterate"], ~output.broken_any_iterate)

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
        def cheat(model: nn.Module, x: Any, y: Any, *, eps: float, **rest: Any) -> Any:
            rest.pop("step_size")
            output = ATTACKS["fgsm"](model, x, y, eps=2 * eps, **{k: v for k, v in rest.items() if k != "steps"})
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


class TestMasking:
    def test_by_hand(self) -> None:
        #       masked, truly robust, reverse, clean-wrong, broken at both, masked by the twin's word
        at_s = torch.tensor([1, 1, 0, 0, 0, 1], dtype=torch.bool)
        at_1 = torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.bool)
        correct = torch.tensor([1, 1, 1, 0, 1, 1], dtype=torch.bool)
        twin = torch.tensor([0, 1, 1, 0, 0, 0], dtype=torch.bool)
        assert masking(at_s, at_1, correct) == {
            "masked_fraction": 1 / 6,
            "masked_fraction_of_correct": 1 / 5,
            "reverse_fraction": 1 / 6,
        }
        assert masking(at_s, at_1, correct, twin)["masked_fraction"] == 2 / 6
        wrong_at_1 = ~torch.tensor([1, 0, 0, 0, 0, 0], dtype=torch.bool)
        unscaled_bias = masking(at_s, at_1, correct, clean_correct_at_1=wrong_at_1)
        assert unscaled_bias["masked_fraction"] == 0, "no attack broke what was wrong anyhow"

    def test_nobody_is_right(self) -> None:
        nobody = torch.zeros(3, dtype=torch.bool)
        assert masking(nobody, nobody, nobody)["masked_fraction_of_correct"] is None

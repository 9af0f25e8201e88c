"""Every attack keeps the promises of the seam, and PGD those of science/README.md (Scaling, Attacks, Tests)."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.science.attacks import ATTACKS, WITH_TRAJECTORY, AttackInput, AttackOutput, prepare
from workers.science.attacks.fab import fab, to_hyperplane
from workers.science.attacks.losses import LOSSES, objective
from workers.science.attacks.norms import NORMS
from workers.science.attacks.pgd import pgd
from workers.science.errors import NoLinearHead, ScienceError, WrongShape
from workers.science.evaluation import ball_limit, evaluate_attack
from workers.science.heads import features_and_logits, linear_head, scale_head

SCALES = (0.25, 1.0, 2.5, 5.0, 10.0, 50.0, 100.0)
EPS = 0.1
QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"eps": EPS, "step_size": 0.02, "steps": 8},
    "fgsm": {"eps": EPS},
    "apgd": {"eps": EPS, "steps": 15},
    "square": {"eps": EPS, "queries": 60},
    "autoattack": {"eps": EPS, "steps": 8, "targets": 3, "queries": 30},
    "cw": {"steps": 15},
    "noise": {"kind": "uniform", "eps": EPS, "draws": 2, "points": 4},
    "transfer": {"eps": EPS, "step_size": 0.02, "steps": 8},
}
"""An entry per attack: a new attack passes the contract below by being in the table."""
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name == "autoattack" else name for name in ATTACKS]


def of(net: Any, part: slice = slice(0, 60), **more: Any) -> AttackInput:
    """The images of `net` that an attack gets, with its `observer` and the like."""
    return AttackInput(net.x[part], net.y[part], net.index[part], **more)


def run(name: str, net: Any, part: slice = slice(0, 60), **params: Any) -> AttackOutput:
    return attacked(name, net, of(net, part), **params)


def attacked(name: str, net: Any, inputs: AttackInput, **params: Any) -> AttackOutput:
    params = {**QUICK[name], **params}
    if name == "transfer":
        params.setdefault("source", net.model)
    return ATTACKS[name](net.model, inputs, **params)


def wrong(net: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = net.model(x).argmax(1)
    return answers != y


class TestContract:
    """What holds for every attack in the registry."""

    def test_every_attack_is_here(self) -> None:
        assert set(QUICK) == set(ATTACKS)
        assert set(ATTACKS) >= WITH_TRAJECTORY

    @pytest.mark.parametrize("name", EVERY)
    def test_broken_means_misclassified(self, digits_net: Any, name: str) -> None:
        output = run(name, digits_net)
        x, y = digits_net.x[:60], digits_net.y[:60]
        assert torch.equal(output.broken, wrong(digits_net, x, y) | wrong(digits_net, output.x_adv, y))
        assert bool((output.broken_any_iterate | ~output.broken).all())

    @pytest.mark.parametrize("name", EVERY)
    def test_inside_ball_and_box(self, digits_net: Any, name: str) -> None:
        for norm, eps in (("linf", EPS), ("l2", 0.7)):
            params: dict[str, Any] = {} if name == "cw" else {"norm": norm, "eps": eps}
            output = run(name, digits_net, **params)
            assert float(output.x_adv.min()) >= 0
            assert float(output.x_adv.max()) <= 1
            if output.eps is not None:
                size = NORMS[norm].size(output.x_adv.double() - digits_net.x[:60].double())
                assert float(size.max()) <= ball_limit(norm, eps)

    @pytest.mark.parametrize("name", EVERY)
    def test_the_network_is_left_alone(self, digits_net: Any, name: str) -> None:
        before = copy.deepcopy(digits_net.model.state_dict())
        x = digits_net.x[:20].clone()
        run(name, digits_net, slice(0, 20))
        after = digits_net.model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert all(p.grad is None and p.requires_grad for p in digits_net.model.parameters())
        assert not digits_net.model.training
        assert torch.equal(x, digits_net.x[:20])
        assert digits_net.x.grad is None

    @pytest.mark.parametrize("name", EVERY)
    def test_same_seed_same_bits_and_no_other_randomness(self, digits_net: Any, name: str) -> None:
        torch.manual_seed(1)
        one = run(name, digits_net)
        state = torch.random.get_rng_state()
        other = run(name, digits_net)
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.equal(one.x_adv, other.x_adv)
        assert torch.equal(one.broken, other.broken)

    @pytest.mark.parametrize("name", EVERY)
    def test_bits_do_not_depend_on_the_batch(self, digits_net: Any, name: str) -> None:
        whole = run(name, digits_net)
        parts = [run(name, digits_net, slice(i, min(i + 7, 60))) for i in range(0, 60, 7)]
        assert torch.equal(whole.broken, torch.cat([part.broken for part in parts]))
        assert torch.allclose(whole.x_adv, torch.cat([part.x_adv for part in parts]), atol=1e-5)

    @pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"cw"}))
    def test_eps_zero_is_clean(self, digits_net: Any, name: str) -> None:
        output = run(name, digits_net, eps=0.0)
        assert torch.equal(output.x_adv, digits_net.x[:60])
        assert torch.equal(output.broken, wrong(digits_net, digits_net.x[:60], digits_net.y[:60]))

    @pytest.mark.parametrize("name", EVERY)
    def test_progress_rises_to_the_end(self, digits_net: Any, name: str) -> None:
        seen: list[tuple[int, int]] = []
        attacked(name, digits_net, of(digits_net, on_progress=lambda step, steps: seen.append((step, steps))))
        steps = [step for step, _ in seen]
        assert steps == sorted(steps)
        assert all(step <= total for step, total in seen)
        assert len({total for _, total in seen}) == 1

    @pytest.mark.parametrize("name", sorted(WITH_TRAJECTORY))
    def test_the_observer_sees_every_iterate(self, digits_net: Any, name: str) -> None:
        seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        inputs = of(digits_net, observer=lambda t, x, phi, z: seen.append((t, x, phi, z)))
        watched = attacked(name, digits_net, inputs)
        assert [t for t, *_ in seen] == list(range(len(seen)))
        for _, x, phi, logits in seen:
            expected_phi, expected = features_and_logits(digits_net.model, x)
            assert torch.allclose(phi, expected_phi, atol=1e-5)
            assert torch.allclose(logits, expected, atol=1e-4)
            assert not any(tensor.requires_grad for tensor in (x, phi, logits))
        assert torch.equal(watched.broken, run(name, digits_net).broken)

    @pytest.mark.parametrize("name", sorted(set(ATTACKS) - WITH_TRAJECTORY))
    def test_no_trajectory_is_said_plainly(self, digits_net: Any, name: str) -> None:
        with pytest.raises(ValueError, match="no trajectory"):
            attacked(name, digits_net, of(digits_net, observer=lambda *_: None))

    @pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"cw"}))
    def test_unknown_norm(self, digits_net: Any, name: str) -> None:
        with pytest.raises(ValueError, match="unknown norm"):
            run(name, digits_net, norm="l1")


def by_hand(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, step_size: float, steps: int) -> Tensor:
    """PGD as science/README.md, "Attacks" says it, example by example, in the slow and obvious way."""
    out = []
    for x_0, label in zip(x, y, strict=True):
        x_t = x_0
        for _ in range(steps):
            x_t = x_t.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(x_t[None]), label[None], reduction="sum")
            (g,) = torch.autograd.grad(loss, x_t)
            if norm == "linf":
                direction = g.sign()
            else:
                direction = g / g.abs().max() if bool(g.any()) else g
                direction = direction / direction.norm() if bool(g.any()) else g
            delta = x_t.detach() + step_size * direction - x_0
            delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / float(delta.norm() + 1e-30))
            x_t = (x_0 + delta).clamp(0, 1)
        out.append(x_t)
    return torch.stack(out)


class TestPgd:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_as_written_by_hand_in_float64(self, digits_net: Any, norm: str) -> None:
        model, x, y = copy.deepcopy(digits_net.model).double(), digits_net.x[:16].double(), digits_net.y[:16]
        params = {"norm": norm, "eps": 0.3, "step_size": 0.07, "steps": 10}
        ours = pgd(model, AttackInput(x, y, digits_net.index[:16]), **params)  # type: ignore[arg-type]
        assert torch.allclose(ours.x_adv, by_hand(model, x, y, **params), atol=1e-9)  # type: ignore[arg-type]

    def test_a_zero_gradient_moves_nothing_and_is_counted(self, digits_net: Any) -> None:
        dead = copy.deepcopy(digits_net.model)
        with torch.no_grad():
            linear_head(dead).weight.zero_()
        for norm in NORMS:
            output = pgd(dead, of(digits_net, slice(0, 9)), norm=norm)
            assert torch.equal(output.x_adv, digits_net.x[:9])
            assert bool(output.zero_gradient is not None and output.zero_gradient.all())

    @pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30])
    def test_the_l2_direction_has_length_one_for_any_size_of_gradient(self, size: float) -> None:
        gradient = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * size
        assert torch.allclose(NORMS["l2"].size(NORMS["l2"].normalize(gradient)), torch.ones(4))

    def test_without_random_start_the_l2_path_reaches_the_sphere_at_most(self, digits_net: Any) -> None:
        output = run("pgd", digits_net, norm="l2", eps=0.025, step_size=0.001, steps=25)
        assert float(NORMS["l2"].size(output.x_adv - digits_net.x[:60]).max()) <= 0.025 * (1 + 1e-5)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_random_starts_lie_in_the_ball_and_differ(self, norm: str) -> None:
        index, like = torch.arange(50), torch.zeros(50, 3, 8, 8)
        draws = [NORMS[norm].random_start(like, 0.5, seed=0, index=index, restart=r) for r in (0, 1)]
        assert not torch.equal(*draws)
        for delta in draws:
            size = NORMS[norm].size(delta)
            assert float(size.max()) <= 0.5 * (1 + 1e-6)
            assert float(size.median()) > 0.45  # in many dimensions most of a ball is near its surface
        again = NORMS[norm].random_start(like[:1], 0.5, seed=0, index=index[7:8], restart=1)
        assert torch.equal(again[0], draws[1][7])

    @pytest.mark.parametrize("params", [{}, {"random_start": True, "restarts": 3}, {"targeted": True, "loss": "dlr"}])
    def test_any_step_leaves_out_the_broken_and_changes_no_bit(self, digits_net: Any, params: dict[str, Any]) -> None:
        skipping = run("pgd", digits_net, slice(0, 200), judge="any_step", **params)
        watched = of(digits_net, slice(0, 200), observer=lambda *_: None)
        following = attacked("pgd", digits_net, watched, judge="any_step", **params)
        final = run("pgd", digits_net, slice(0, 200), **params)
        assert torch.equal(skipping.broken, following.broken)
        assert torch.equal(skipping.broken, final.broken_any_iterate)
        assert torch.allclose(skipping.x_adv, following.x_adv, atol=1e-5)
        assert skipping.gradient_calls < following.gradient_calls

    def test_more_restarts_break_no_less(self, digits_net: Any) -> None:
        one = run("pgd", digits_net, slice(0, 200), random_start=True)
        five = run("pgd", digits_net, slice(0, 200), random_start=True, restarts=5)
        assert bool((five.broken | ~one.broken).all())

    def test_restart_0_starts_at_x_unless_random_start(self, digits_net: Any) -> None:
        starts: list[Tensor] = []
        inputs = of(digits_net, observer=lambda t, x, phi, z: starts.append(x) if t == 0 else None)
        for random_start in (False, True):
            attacked("pgd", digits_net, inputs, random_start=random_start, restarts=2)
        assert torch.equal(starts[0], digits_net.x[:60])
        assert not torch.equal(starts[1], digits_net.x[:60])
        assert len(starts) == 2

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"cw", "noise"}))
    def test_nobody_left_to_attack(self, digits_net: Any, name: str, norm: str) -> None:
        """All clean-wrong, or all broken at once: later restarts and members have an empty batch."""
        inputs = AttackInput(digits_net.x[:5], (digits_net.y[:5] + 1) % 10, digits_net.index[:5])
        params = {"pgd": {"restarts": 2, "judge": "any_step"}, "transfer": {"source": digits_net.model}}.get(name, {})
        output = ATTACKS[name](digits_net.model, inputs, norm=norm, **params)
        assert bool(output.broken.all())

    @pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"transfer"}))
    def test_nan_is_said_and_is_no_robustness(self, digits_net: Any, name: str) -> None:
        broken = copy.deepcopy(digits_net.model)
        with torch.no_grad():
            linear_head(broken).bias[0] = torch.nan
        output = ATTACKS[name](broken, of(digits_net, slice(0, 4)))
        self.lost(output, digits_net.x[:4])

    def lost(self, output: AttackOutput, x: Tensor) -> None:
        """All of them: none is robust, and what is handed back is the clean image."""
        assert bool((output.non_finite & output.broken & output.broken_any_iterate).all())
        assert torch.equal(output.x_adv, x)
        assert output.zero_gradient is None or not bool(output.zero_gradient.any())

    @pytest.mark.parametrize(
        ("attack", "params"),
        [
            (ATTACKS["pgd"], {"norm": "linf"}),
            (ATTACKS["pgd"], {"norm": "l2"}),
            (ATTACKS["fgsm"], {"norm": "linf"}),
            (ATTACKS["apgd"], {"norm": "linf", "steps": 5}),
            (ATTACKS["cw"], {"steps": 5}),
            (fab, {"norm": "linf", "steps": 5}),
        ],
    )
    def test_a_gradient_that_is_nan_is_said_and_is_no_robustness(
        self, digits_net: Any, attack: Any, params: dict[str, Any]
    ) -> None:
        class Kinked(nn.Module):
            """The same logits, with a root at 0 in them whose gradient is NaN."""

            def forward(self, x: Tensor) -> Tensor:
                logits: Tensor = digits_net.model(x)
                return logits + (x - x.detach()).abs().flatten(1).sum(1, keepdim=True).sqrt()

        x, index = digits_net.x[:10], digits_net.index[:10]
        y = digits_net.model(x).argmax(1)  # what is wrong already, `fab` leaves alone
        self.lost(attack(Kinked().eval(), AttackInput(x, y, index), **params), x)

    @pytest.mark.parametrize("params", [{"steps": -1}, {"eps": -0.1}, {"judge": "maybe"}, {"loss": "mse"}])
    def test_parameters_without_sense(self, digits_net: Any, params: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            run("pgd", digits_net, **params)


class TestLosses:
    def test_the_stable_gradient_is_that_of_cross_entropy_divided_by_the_rest(self) -> None:
        logits = (3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))).double()
        y = torch.arange(50) % 10
        plain, stable = (
            torch.autograd.grad(LOSSES[name](z, y, 1.0).sum(), z)[0]
            for name in ("cross_entropy", "stable_cross_entropy")
            for z in [logits.clone().requires_grad_()]
        )
        rest = 1 - logits.softmax(1).gather(1, y[:, None])
        assert torch.allclose(stable, plain / rest, rtol=1e-9)

    @pytest.mark.parametrize("name", LOSSES)
    def test_higher_is_nearer_to_a_wrong_class(self, name: str) -> None:
        logits = torch.tensor([[4.0, 1.0, 0.5, 0.0], [1.2, 1.0, 0.5, 0.0]])
        right, nearly = LOSSES[name](logits, torch.zeros(2, dtype=torch.long), 1.0)
        assert nearly > right

    @pytest.mark.parametrize("name", LOSSES)
    def test_targeted_climbs_towards_the_target(self, name: str) -> None:
        logits = torch.tensor([[4.0, 1.0, 0.5, 0.0]], requires_grad=True)
        y, target = torch.tensor([0]), torch.tensor([2])
        (gradient,) = torch.autograd.grad(objective(name, y, 1.0, target)(logits).sum(), logits)
        assert gradient[0, 2] > 0 > gradient[0, 0]

    def test_dlr_needs_three_classes_and_targeted_four(self) -> None:
        y = torch.zeros(2, dtype=torch.long)
        with pytest.raises(WrongShape):
            objective("dlr", y, 1.0)(torch.zeros(2, 2))
        with pytest.raises(WrongShape):
            objective("dlr", y, 1.0, y + 1)(torch.zeros(2, 3))


class TestScaling:
    """science/README.md, "Scaling": the truth does not depend on s, and an attack that says otherwise has failed."""

    @pytest.mark.parametrize("s", SCALES)
    def test_predictions_are_equal_at_every_scale(self, digits_net: Any, s: float) -> None:
        with torch.no_grad():
            scaled = scale_head(digits_net.model, s)(digits_net.x)
            assert torch.equal(scaled.argmax(1), digits_net.model(digits_net.x).argmax(1))

    @pytest.mark.parametrize(
        ("loss", "norm"),
        [
            ("rescaled_cross_entropy", "l2"),
            *(
                pytest.param(loss, norm, marks=pytest.mark.slow)
                for loss, norm in [
                    ("margin", "linf"), ("margin", "l2"), ("dlr", "l2"), ("dlr", "linf"),
                    ("rescaled_cross_entropy", "linf"),
                ]
            ),
        ],
    )  # fmt: skip
    def test_scale_free_losses_break_the_same_examples_at_every_scale(
        self, digits_net: Any, loss: str, norm: str
    ) -> None:
        params = {"loss": loss, "norm": norm, "eps": EPS if norm == "linf" else 0.8, "step_size": 0.02, "steps": 20}
        bits = {s: self.robust(digits_net, s, params) for s in SCALES}
        assert 0.1 < float(bits[1.0].double().mean()) < 0.95  # an attack that can tell examples apart
        for s in SCALES:
            assert int((bits[s] != bits[1.0]).sum()) <= max(1, 0.001 * len(bits[s]))

    def test_plain_cross_entropy_goes_blind_and_stable_does_not(self, digits_net: Any) -> None:
        params = {"eps": 0.3, "step_size": 0.03, "steps": 20}
        plain, stable = ({**params, "loss": loss} for loss in ("cross_entropy", "stable_cross_entropy"))
        at_1, at_100 = (self.report(digits_net, s, plain) for s in (1.0, 100.0))
        clean = at_1.numbers["clean_accuracy"]
        assert clean is not None
        assert clean > 0.97
        assert at_1.numbers["zero_gradient_fraction"] == 0
        assert at_1.numbers["robust_accuracy"] == 0
        assert math.isclose(at_100.numbers["zero_gradient_fraction_of_all"] or 0, clean, abs_tol=0.03)
        masked = at_1.bits["clean_correct"] & at_100.bits["robust"] & ~at_1.bits["robust"]
        assert math.isclose(float(masked.double().mean()), at_100.numbers["robust_accuracy"] or 0)
        assert float(masked.double().mean()) > 0.9
        stable_at_100 = self.report(digits_net, 100.0, stable)
        assert stable_at_100.numbers["zero_gradient_fraction_of_all"] == 0
        assert (stable_at_100.numbers["robust_accuracy"] or 0) < 0.02

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_stable_equals_plain_step_by_step_where_nothing_underflows(self, digits_net: Any, norm: str) -> None:
        net = copy.deepcopy(digits_net.model).double()
        paths: dict[str, list[Tensor]] = {"cross_entropy": [], "stable_cross_entropy": []}
        for loss, path in paths.items():
            inputs = AttackInput(
                digits_net.x[:64].double(),
                digits_net.y[:64],
                digits_net.index[:64],
                observer=lambda t, x, phi, z, path=path: path.append(x),
            )
            pgd(net, inputs, norm=norm, eps=0.3, step_size=0.03, steps=15, loss=loss)
        assert len(paths["cross_entropy"]) == 16
        for plain, stable in zip(*paths.values(), strict=True):
            assert torch.allclose(plain, stable, atol=1e-9)

    def test_examples_of_scale_1_transfer_to_scale_100(self, digits_net: Any) -> None:
        scaled = scale_head(digits_net.model, 100.0)
        made = run("pgd", digits_net, slice(0, 200))
        inputs = of(digits_net, slice(0, 200))
        output = ATTACKS["transfer"](scaled, inputs, source=digits_net.model, **QUICK["pgd"])
        assert torch.equal(output.broken, made.broken)

    def robust(self, net: Any, s: float, params: dict[str, Any]) -> Tensor:
        robust: Tensor = self.report(net, s, params).bits["robust"]
        return robust

    def report(self, net: Any, s: float, params: dict[str, Any]) -> Any:
        return evaluate_attack(
            scale_head(net.model, s), net.x, net.y, net.index, attack="pgd", params=params, scale=s, batch_size=500
        )


class TestPrepare:
    @pytest.mark.parametrize(
        "options",
        [{"fold_batch_norm": True}, {"channels_last": True}, {"fold_batch_norm": True, "channels_last": True}],
    )
    def test_a_prepared_network_gives_almost_the_same_logits(self, digits_net: Any, options: dict[str, Any]) -> None:
        prepared = prepare(digits_net.model, probe=digits_net.x[:8], **options)
        with torch.no_grad():
            assert torch.allclose(prepared(digits_net.x), digits_net.model(digits_net.x), atol=1e-4)
        left = [m for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)]
        assert bool(left) != bool(options.get("fold_batch_norm"))
        assert features_and_logits(prepared, digits_net.x[:2])[0].shape == (2, 128)

    def test_bf16_attacks_as_well_within_half_a_point(self, digits_net: Any) -> None:
        def robust(**options: Any) -> float:
            report = evaluate_attack(
                digits_net.model,
                digits_net.x,
                digits_net.y,
                digits_net.index,
                attack="pgd",
                params=QUICK["pgd"],
                **options,
            )
            return float(report.numbers["robust_accuracy"] or 0)

        fast = robust(precision="bf16", fold_batch_norm=True, channels_last=True)
        assert abs(fast - robust()) <= 0.005 + 1e-9

    def test_nothing_asked_nothing_done(self, digits_net: Any) -> None:
        assert prepare(digits_net.model) is digits_net.model

    def test_a_network_that_cannot_be_traced_is_refused(self) -> None:
        class Branching(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x if x.sum() > 0 else -x

        with pytest.raises(ScienceError, match="cannot be traced"):
            prepare(Branching().eval(), fold_batch_norm=True)

    def test_a_batch_norm_in_training_mode_cannot_slip_through(self, digits_net: Any) -> None:
        noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5)).train()
        with pytest.raises(ScienceError, match="differ"):
            prepare(noisy, channels_last=True, probe=digits_net.x[:8])


class TestFab:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_projection_is_the_nearest_point(self, norm: str) -> None:
        """Against the dual: a minimiser over box and plane, by bisection on a fine grid of budgets."""
        generator = torch.Generator().manual_seed(0)
        x, normal = torch.rand(20, 1, 3, 3, generator=generator), torch.randn(20, 1, 3, 3, generator=generator)
        target = torch.rand(20, 1, 3, 3, generator=generator)  # a point of the box, so that the plane meets it
        offset = (normal * target).flatten(1).sum(1)
        d = to_hyperplane(x, normal, offset, norm)
        assert torch.allclose((normal * (x + d)).flatten(1).sum(1), offset, atol=1e-4)
        assert float((x + d).min()) >= -1e-6
        assert float((x + d).max()) <= 1 + 1e-6
        best = NORMS[norm].size(d)
        for _ in range(300):  # no other point of the plane and the box is nearer
            other = torch.rand(20, 1, 3, 3, generator=generator)
            other = other + to_hyperplane(other, normal, offset, "l2")
            assert bool((NORMS[norm].size(other - x) >= best - 1e-4).all())

    def test_out_of_reach_goes_to_the_corner(self) -> None:
        d = to_hyperplane(torch.full((1, 1, 1, 2), 0.25), torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([9.0]), "linf")
        assert torch.allclose(d, torch.tensor([[[[0.75, -0.25]]]]))


def test_an_observer_needs_a_linear_head(digits_net: Any) -> None:
    capped = nn.Sequential(digits_net.model, nn.ReLU()).eval()
    with pytest.raises(NoLinearHead):
        pgd(capped, of(digits_net, slice(0, 4), observer=lambda *_: None))

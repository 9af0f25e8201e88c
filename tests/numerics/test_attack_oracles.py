"""Our attacks beside those of torchattacks, Foolbox and adv-lib: same network, same start, same parameters."""

import copy
import importlib
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from workers.science.attacks import ATTACKS, AttackInput
from workers.science.attacks.fab import fab
from workers.science.seeding import normal_per_example, uniform_per_example

N = 128
"""A power of two: torchattacks averages the loss over the batch, and dividing by a power of two changes no bit."""

NORM = {"linf": "Linf", "l2": "L2"}
EPS = {"linf": 0.1, "l2": 0.8}


@pytest.fixture(scope="module")
def foolbox() -> ModuleType:
    with pytest.warns(DeprecationWarning, match="gaussian_filter"):  # a name of SciPy's that it imports from
        import foolbox
    return foolbox


@pytest.fixture(scope="module")
def adv_lib() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the version classes of distutils that it compares with
        return importlib.import_module("adv_lib.attacks")


def untrained() -> tuple[nn.Module, Tensor, Tensor]:
    """A network at a fixed initialisation, on noise: gradients of all signs and sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()
        )
        model.append(nn.Linear(model(torch.zeros(1, 3, 16, 16)).shape[1], 10))
        x = torch.rand(N, 3, 16, 16)
    with torch.no_grad():
        return model.eval(), x, model(x).argmax(1)


def cases(digits_net: Any) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Copies: the libraries leave gradients in a network's parameters."""
    return [(copy.deepcopy(digits_net.model), digits_net.x[:N], digits_net.y[:N]), untrained()]


def in_float64(nets: list[tuple[nn.Module, Tensor, Tensor]]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    return [(copy.deepcopy(model).double(), x.double(), y) for model, x, y in nets]


def ours(name: str, model: nn.Module, x: Tensor, y: Tensor, *, seed: int = 0, **params: Any) -> Tensor:
    return ATTACKS[name](model, AttackInput(x, y, torch.arange(len(x)), seed), **params).x_adv


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model(x).argmax(1)
    return answers == y


def robust(model: nn.Module, x: Tensor, y: Tensor) -> int:
    return int(right(model, x, y).sum())


class TestEqualIterates:
    @pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
    def test_pgd_linf_is_bit_equal_to_torchattacks(self, digits_net: Any, steps: int) -> None:
        for model, x, y in cases(digits_net):
            theirs = torchattacks.PGD(model, eps=0.1, alpha=0.02, steps=steps, random_start=False)(x, y)
            assert torch.equal(ours("pgd", model, x, y, eps=0.1, step_size=0.02, steps=steps), theirs)

    @pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
    def test_pgd_l2_equals_torchattacks(self, digits_net: Any, steps: int) -> None:
        """In float64: the order of the divisions differs, and in float32 a last bit can cross a kink of a ReLU.

        By default they add 1e-10 to the norm of the gradient, which stalls where the net is sure; here they do not.
        """
        for model, x, y in in_float64(cases(digits_net)):
            attack = torchattacks.PGDL2(model, 0.5, alpha=0.1, steps=steps, random_start=False, eps_for_division=0)
            mine = ours("pgd", model, x, y, norm="l2", eps=0.5, step_size=0.1, steps=steps)
            assert torch.allclose(mine, attack(x, y), atol=1e-9)

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_pgd_equals_foolbox(self, digits_net: Any, foolbox: ModuleType, norm: str) -> None:
        """In float64, as above; gradients below 1e-9 are left out, because Foolbox's l2 step stalls below 1e-12."""
        eps, step_size = EPS[norm], EPS[norm] / 5
        for model, x, y in in_float64(cases(digits_net)):
            attack = getattr(foolbox.attacks, f"{NORM[norm]}PGD")(abs_stepsize=step_size, steps=10, random_start=False)
            theirs, _, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)
            mine = ours("pgd", model, x, y, norm=norm, eps=eps, step_size=step_size, steps=10)
            large = gradient_norm(model, x, y) > 1e-9
            assert float(large.double().mean()) > 0.9
            assert torch.allclose(mine[large], theirs[large], atol=1e-9)

    @pytest.mark.parametrize(("loss", "name"), [("cross_entropy", "ce"), ("margin", "dl"), ("dlr", "dlr")])
    def test_pgd_linf_equals_adv_lib(self, digits_net: Any, adv_lib: ModuleType, loss: str, name: str) -> None:
        """Theirs returns the last iterate that was misclassified, and does not look at the one after its last step."""
        steps, step_size, eps = 10, EPS["linf"] / 5, EPS["linf"]
        for model, x, y in in_float64(cases(digits_net)):
            mine = ours("pgd", model, x, y, eps=eps, step_size=step_size, steps=steps, loss=loss)
            theirs = adv_lib.pgd_linf(
                model, x, y, eps, steps=steps + 1, random_init=False, loss_function=name, absolute_step_size=step_size
            )
            broken = ~right(model, mine, y)
            assert int(broken.sum()) > 20
            assert torch.allclose(mine[broken], theirs[broken], atol=1e-12)
            assert bool((right(model, theirs, y) <= right(model, mine, y)).all())

    def test_fgsm_is_bit_equal_to_torchattacks(self, digits_net: Any) -> None:
        for model, x, y in cases(digits_net):
            assert torch.equal(ours("fgsm", model, x, y, eps=0.07), torchattacks.FGSM(model, eps=0.07)(x, y))

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize(("loss", "name"), [("cross_entropy", "ce"), ("dlr", "dlr")])
    def test_apgd_from_the_same_start_leaves_the_same_examples_robust(
        self, digits_net: Any, monkeypatch: pytest.MonkeyPatch, norm: str, loss: str, name: str
    ) -> None:
        """Ours counts the first rise from the loss at the start, theirs from 0: hence at most two differing bits."""
        model, x, y = cases(digits_net)[0]
        mine = ours("apgd", model, x, y, norm=norm, eps=EPS[norm], steps=50, loss=loss)
        attacked = torch.arange(N)[right(model, x, y)]
        for function, draw in (("rand", uniform_per_example), ("randn", normal_per_example)):
            start = draw(0, attacked, 0, x.shape[1:])
            monkeypatch.setattr(torch, function, lambda *_, start=start, **__: start.clone())
        theirs = torchattacks.APGD(model, norm=NORM[norm], eps=EPS[norm], steps=50, loss=name)(x, y)
        assert int((right(model, mine, y) != right(model, theirs, y)).sum()) <= 2

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    @pytest.mark.parametrize(("loss", "name"), [("cross_entropy", "ce"), ("dlr", "dlr")])
    def test_apgd_from_the_same_start_and_that_of_adv_lib(
        self, digits_net: Any, adv_lib: ModuleType, monkeypatch: pytest.MonkeyPatch, norm: str, loss: str, name: str
    ) -> None:
        """As above, but that theirs too counts the first rise from the loss at the start."""
        model, x, y = cases(digits_net)[0]
        mine = ours("apgd", model, x, y, norm=norm, eps=EPS[norm], steps=50, loss=loss)
        drawn = {"rand_like": uniform_per_example, "randn_like": normal_per_example}
        for function, draw in drawn.items():
            start = draw(0, torch.arange(N), 0, x.shape[1:])
            monkeypatch.setattr(torch, function, lambda like, start=start: start[: len(like)].clone())
        order = {"linf": float("inf"), "l2": 2.0}[norm]
        theirs = adv_lib.apgd(model, x, y, EPS[norm], norm=order, n_iter=50, loss_function=name)
        assert int((right(model, mine, y) != right(model, theirs, y)).sum()) <= 2

    @pytest.mark.parametrize("steps", [25, 60])
    def test_cw_finds_examples_as_many_and_as_near(self, digits_net: Any, steps: int) -> None:
        """Ours also looks at what the last step gives. Their `f` takes the larger of 0 and the logits: put right."""
        model, x, y = cases(digits_net)[0]
        theirs = CorrectedCW(model, c=10, kappa=20, lr=0.01, steps=steps)(x, y)
        mine = ours("cw", model, x, y, c=10.0, kappa=20.0, lr=0.01, steps=steps)
        assert robust(model, mine, y) <= robust(model, theirs, y)
        both = right(model, x, y) & ~right(model, mine, y) & ~right(model, theirs, y)
        assert int(both.sum()) > 5
        sizes = [float((adv - x)[both].flatten(1).norm(dim=1).mean()) for adv in (mine, theirs)]
        assert sizes[0] <= sizes[1] * 1.001


@pytest.mark.slow
class TestNeverWeaker:
    """Random numbers differ, so equal strength is the claim: at most one example in a hundred more is left robust."""

    slack = N // 100
    seeds = range(4)  # where luck alone makes more than that, so many runs of each

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_targeted_apgd(self, digits_net: Any, norm: str) -> None:
        model, x, y = cases(digits_net)[0]
        mine, theirs = 0, 0
        for seed in self.seeds:
            other = torchattacks.APGDT(model, norm=NORM[norm], eps=EPS[norm], steps=20, seed=seed)
            options = {"norm": norm, "eps": EPS[norm], "steps": 20, "loss": "dlr", "targeted": True}
            theirs += robust(model, other(x, y), y)
            mine += robust(model, ours("apgd", model, x, y, seed=seed, **options), y)
        assert mine <= theirs + len(self.seeds) * self.slack

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_targeted_apgd_and_a_search_for_the_nearest_example(
        self, digits_net: Any, adv_lib: ModuleType, norm: str
    ) -> None:
        """FMN and DDN minimise the distance; what they find inside the ball, ours has to find too."""
        model, x, y = cases(digits_net)[0]
        search = {
            "linf": lambda: adv_lib.fmn(model, x, y, norm=float("inf"), steps=200),
            "l2": lambda: adv_lib.ddn(model, x, y, steps=200),
        }
        theirs = search[norm]()
        distance = (theirs - x).flatten(1).norm(dim=1, p=float("inf") if norm == "linf" else 2)
        found = (distance <= EPS[norm]) & ~right(model, theirs, y)
        mine = ours("apgd", model, x, y, norm=norm, eps=EPS[norm], steps=50, loss="dlr", targeted=True)
        assert int(found.sum()) > 20
        assert int((found & right(model, mine, y)).sum()) <= self.slack

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_square(self, digits_net: Any, norm: str) -> None:
        model, x, y = cases(digits_net)[0]
        mine, theirs = 0, 0
        for seed in self.seeds[:2]:
            other = torchattacks.Square(model, norm=NORM[norm], eps=EPS[norm], n_queries=500, seed=seed)
            theirs += robust(model, other(x, y), y)
            found = ours("square", model, x, y, norm=norm, eps=EPS[norm], queries=500, seed=seed)
            mine += robust(model, found, y)
        assert mine <= theirs + 2 * self.slack

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_fab(self, digits_net: Any, norm: str) -> None:
        model, x, y = cases(digits_net)[0]
        theirs = torchattacks.FAB(model, norm=NORM[norm], eps=EPS[norm], steps=10, multi_targeted=True)(x, y)
        mine = fab(model, AttackInput(x, y, torch.arange(N)), norm=norm, eps=EPS[norm], steps=10).x_adv
        assert robust(model, mine, y) <= robust(model, theirs, y) + self.slack

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_the_standard_ensemble_on_a_small_budget(self, digits_net: Any, norm: str) -> None:
        model, x, y = cases(digits_net)[0]
        x, y = x[:48], y[:48]
        common = {"norm": NORM[norm], "eps": EPS[norm]}
        members = [
            torchattacks.APGD(model, steps=20, **common),
            torchattacks.APGDT(model, steps=20, **common),
            torchattacks.FAB(model, steps=20, multi_targeted=True, **common),
            torchattacks.Square(model, n_queries=200, **common),
        ]
        theirs = torchattacks.MultiAttack(members)(x, y)
        mine = ours("autoattack", model, x, y, norm=norm, eps=EPS[norm], steps=20, queries=200)
        assert robust(model, mine, y) <= robust(model, theirs, y) + self.slack


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("net", ["trained", "untrained"])
def test_autoattack_leaves_the_images_robust_that_the_published_ensemble_leaves(
    digits_net: Any, net: str, norm: str
) -> None:
    """Of torchattacks, at equal budgets, image by image: random numbers move at most one."""
    model, x, y = cases(digits_net)[0 if net == "trained" else 1]
    x, y = x[:32], y[:32]
    eps = {"trained": {"linf": 0.1, "l2": 0.5}, "untrained": {"linf": 0.002, "l2": 0.06}}[net][norm]
    ensemble = torchattacks.AutoAttack(model, norm=NORM[norm], eps=eps, n_classes=10, seed=0)
    *climbing, square = ensemble._autoattack.attacks
    for member in climbing:
        member.steps = 40
    square.n_queries = 1000
    theirs = right(model, ensemble(x, y), y)
    output = ATTACKS["autoattack"](
        model, AttackInput(x, y, torch.arange(32)), norm=norm, eps=eps, steps=40, queries=1000
    )
    assert 3 < int(theirs.sum()) < 29, "or this test says nothing"
    assert int((~output.broken & ~theirs).sum()) <= 1
    assert int((output.broken & theirs).sum()) <= 1


class CorrectedCW(torchattacks.CW):  # type: ignore[misc]
    def f(self, logits: Tensor, y: Tensor) -> Tensor:
        other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return (logits.gather(1, y[:, None]).squeeze(1) - other).clamp_min(-self.kappa)


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)
    norms: Tensor = gradient.flatten(1).norm(dim=1)
    return norms

"""Random numbers that are drawn ahead are those that would have been drawn, and leave nothing behind."""

import threading
from typing import Any

import pytest
import torch

from workers.science import ahead, evaluation, seeding
from workers.science.ahead import SLOTS, ahead_of
from workers.science.evaluation import AttackReport, evaluate_attack
from workers.science.seeding import uniform_per_example

BALL = {"eps": 0.2, "step_size": 0.05, "steps": 4}
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "pgd linf": ("pgd", {**BALL, "random_start": True, "restarts": 4}),
    "pgd l2": ("pgd", {**BALL, "norm": "l2", "random_start": True, "restarts": 2}),
    "pgd any_step": ("pgd", {**BALL, "judge": "any_step", "restarts": 3}),
    "apgd": ("apgd", {"eps": 0.05, "steps": 5, "restarts": 3}),
    "square": ("square", {"eps": 0.2, "queries": 5}),
    "noise": ("noise", {"draws": 2, "points": 3}),
    "autoattack": ("autoattack", {"eps": 0.05, "steps": 3, "targets": 2, "queries": 5}),
}


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Draws ahead on a CPU too. Per draw by the thread, the slots in use and its number of examples."""
    monkeypatch.setattr(evaluation, "DRAWS_AHEAD", ("cpu",))
    made: list[tuple[int, int]] = []
    fill = ahead._Ahead._fill

    def noted(self: ahead._Ahead) -> None:
        before = set(self.slots)
        fill(self)
        made.extend((len(self.slots), len(self.batches[key[0]])) for key in self.slots if key not in before)

    monkeypatch.setattr(ahead._Ahead, "_fill", noted)
    return made


def attacked(net: Any, attack: str, params: dict[str, Any], **how: Any) -> AttackReport:
    n = 40
    return evaluate_attack(
        net.model, net.x[:n], net.y[:n], net.index[:n], attack=attack, params=params, batch_size=16, **how
    )


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("random numbers")]


@pytest.mark.parametrize("name", ATTACKS)
def test_bits_are_those_without(
    digits_net: Any, name: str, submitted: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = attacked(digits_net, *ATTACKS[name])
    assert submitted
    assert max(slots for slots, _ in submitted) <= SLOTS
    assert {examples for _, examples in submitted} <= {16, 8}
    count = len(submitted)
    monkeypatch.setattr(evaluation, "DRAWS_AHEAD", ())
    here = attacked(digits_net, *ATTACKS[name])
    assert len(submitted) == count
    assert there.numbers == here.numbers
    assert all(torch.equal(there.bits[bit], here.bits[bit]) for bit in here.bits)
    assert threads() == []


def test_the_next_batch_is_drawn_before_this_one_ends(digits_net: Any, submitted: list[tuple[int, int]]) -> None:
    at: list[int] = []
    attacked(digits_net, *ATTACKS["pgd l2"], on_progress=lambda _step, _steps: at.append(len(submitted)))
    steps = 2 * 4
    assert at[0] > 0
    assert at[steps] > at[0]


def test_numbers_that_are_ready_are_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_by: list[str] = []
    draw = seeding._uniform

    def noted(*args: Any) -> torch.Tensor:
        drawn_by.append(threading.current_thread().name)
        return draw(*args)

    monkeypatch.setattr(seeding, "_uniform", noted)
    with ahead_of([[0, 1, 2], [3, 4, 5]]) as begin:
        begin(0)
        uniform_per_example(0, [0, 1, 2], 0, (4,))
        while len(drawn_by) < 2:
            threading.Event().wait(0.002)
        begin(1)
        some = uniform_per_example(0, [5, 3], 0, (4,))
    assert sorted(name.split("_")[0] for name in drawn_by) == ["MainThread", "random numbers"]
    assert torch.equal(some, uniform_per_example(0, [5, 3], 0, (4,)))


@pytest.mark.usefixtures("submitted")
def test_what_ends_an_attack_ends_the_thread(digits_net: Any) -> None:
    seen = []

    def cancelled(step: int, _steps: int) -> None:
        seen.append(threads())
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attacked(digits_net, *ATTACKS["pgd linf"], on_progress=cancelled)
    assert len(seen[-1]) == 1
    assert threads() == []

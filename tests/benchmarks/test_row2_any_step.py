"""Row 2: `judge: any_step` leaves out what is broken; beside the same judge following every example to the end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from workers.science.attacks import AttackInput
from workers.science.attacks.pgd import pgd

PGD: dict[str, Any] = {"eps": 8 / 255, "step_size": 2 / 255, "judge": "any_step"}


@pytest.mark.parametrize(("name", "n"), [("simple_cnn", 256), ("resnet18", 16)])
@pytest.mark.parametrize("steps", [10, 40])
def test_skipping_the_broken(table: Any, network: Callable[..., Any], name: str, n: int, steps: int) -> None:
    net = network(name, n)

    def run(observer: Any = None) -> Any:
        return pgd(net.model, AttackInput(net.x, net.y, net.index, observer=observer), steps=steps, **PGD)

    def watch(*_: object) -> None:
        """An observer wants to see every example, to the last step."""

    skipping, following = run(), run(observer=watch)
    equal = torch.equal(skipping.broken, following.broken)
    table.compare(
        "2",
        f"PGD x{steps}, any_step, {name}, batch {n}",
        {"all examples to the end": lambda: run(observer=watch), "leaving out the broken": run},
        reference="all examples to the end",
        goals={"leaving out the broken": 3.0},
        notes={
            "leaving out the broken": f"{'same' if equal else 'OTHER'} bits, "
            f"{skipping.gradient_calls / n:.1f} of {steps} gradients per image"
        },
    )

"""Row 3: PGD with the full trajectory recorded (loss, confidence, closed-form sharpness per step), beside bare PGD."""

from collections.abc import Callable
from typing import Any

import pytest

from workers.science.attacks import AttackInput
from workers.science.attacks.pgd import pgd
from workers.science.heads import linear_head
from workers.science.trajectory import Recorder

CASES = [("simple_cnn", 128, 10), ("simple_cnn", 128, 100), ("resnet18", 16, 10), ("vgg11_bn", 32, 10)]


@pytest.mark.parametrize(("name", "n", "classes"), CASES)
def test_recording(table: Any, network: Callable[..., Any], name: str, n: int, classes: int) -> None:
    net = network(name, n, classes)
    head = linear_head(net.model)

    def run(observer: Any = None) -> None:
        pgd(net.model, AttackInput(net.x, net.y, net.index, observer=observer), steps=10)

    def record() -> None:
        recorder = Recorder(head.weight, head.bias)
        run(recorder(net.x, net.y, net.index))
        recorder.trajectory()

    table.compare(
        "3",
        f"PGD x10, {name}, batch {n}, k = {classes}",
        {"bare PGD": run, "with trajectory": record},
        reference="bare PGD",
        goals={"with trajectory": 1.10},
        cost=True,
    )

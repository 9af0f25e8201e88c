"""Row 1b: PGD with gradients in bf16, folded batch norm and channels_last, judged by the plain float32 network."""

from collections.abc import Callable
from typing import Any

import pytest
from typed import number

from workers.science.attacks import prepare
from workers.science.attacks.pgd import pgd
from workers.science.evaluation import evaluate_attack

GOALS = {"simple_cnn": 3.3, "resnet18": 2.2}
BATCH = {"simple_cnn": 128, "resnet18": 16}
IMAGES = {"simple_cnn": 2000, "resnet18": 256}
FAST: dict[str, Any] = {"precision": "bf16", "fold_batch_norm": True, "channels_last": True}
STEPS = 10


@pytest.mark.parametrize("name", GOALS)
def test_pgd_in_bf16(table: Any, network: Callable[..., Any], name: str) -> None:
    net = network(name, IMAGES[name])
    batch = net.first(BATCH[name])
    fast = prepare(net.model, probe=net.x[:2], **FAST)
    eps = batch.middling_eps()
    walk = {"eps": eps, "step_size": eps / 4, "steps": 5}
    plain, bf16 = (
        evaluate_attack(net.model, net.x, net.y, net.index, attack="pgd", params=walk, batch_size=256, **options)
        for options in ({}, FAST)
    )
    points = 100 * (number(bf16.numbers, "robust_accuracy") - number(plain.numbers, "robust_accuracy"))

    def run(model: Any) -> Callable[[], object]:
        return lambda: pgd(model, batch.inputs(), steps=STEPS)

    table.compare(
        "1b",
        f"PGD x{STEPS}, {name}, batch {len(batch.x)}",
        {"ours, float32": run(net.model), "ours, bf16 + folded + channels_last": run(fast)},
        reference="ours, float32",
        goals={"ours, bf16 + folded + channels_last": GOALS[name]},
        notes={"ours, bf16 + folded + channels_last": f"robust {points:+.2f} points of {len(net.x)} at eps {eps:.1e}"},
    )

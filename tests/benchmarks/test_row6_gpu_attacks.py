"""Row 6: PGD on a GPU, ten steps, 10,000 images in batches of 1,000, beside torchattacks on the same GPU."""

from collections.abc import Callable
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from typed import number

from workers.science.attacks import AttackInput, prepare
from workers.science.attacks.pgd import pgd
from workers.science.evaluation import evaluate_attack
from workers.science.seeding import deterministic

IMAGES, BATCH, STEPS = 10_000, 1_000, 10
FAST: dict[str, dict[str, Any]] = {
    "ours, folded + channels_last": {"fold_batch_norm": True, "channels_last": True},
    "ours, bf16 + folded + channels_last": {"precision": "bf16", "fold_batch_norm": True, "channels_last": True},
    "ours, the same compiled": {
        "precision": "bf16",
        "fold_batch_norm": True,
        "channels_last": True,
        "compile": True,
    },
}


def test_pgd_on_a_gpu(table: Any, gpu: torch.device, network: Callable[..., Any]) -> None:
    attacks(table, network("resnet18", IMAGES, device=gpu), BATCH)


def attacks(table: Any, net: Any, batch: int) -> None:
    """TF32 is off for all, as for every measurement."""
    theirs = torchattacks.PGD(net.model, eps=8 / 255, alpha=2 / 255, steps=STEPS, random_start=False)
    prepared = {who: prepare(net.model, probe=net.x[:2], batch_size=batch, **options) for who, options in FAST.items()}

    def torchattacks_() -> list[Tensor]:
        return [classes(net.model, theirs(x, y)) for x, y in zip(net.x.split(batch), net.y.split(batch), strict=True)]

    def ours(model: nn.Module) -> Callable[[], object]:
        parts = list(zip(net.x.split(batch), net.y.split(batch), net.index.split(batch), strict=True))
        return lambda: [pgd(model, AttackInput(*part), steps=STEPS) for part in parts]

    with deterministic(net.x.device):
        few = net.first(batch)
        eps = few.middling_eps()
        walk = {"eps": eps, "step_size": eps / 4, "steps": STEPS}
        robust = {
            who: 100 * number(evaluated(net, walk, batch, **options), "robust_accuracy")
            for who, options in {"ours": {}, **FAST}.items()
        }
        table.compare(
            "6",
            f"PGD x{STEPS}, resnet18, {len(net.x):,} images",
            {
                "torchattacks": torchattacks_,
                "ours": ours(net.model),
                **{who: ours(model) for who, model in prepared.items()},
            },
            reference="torchattacks",
            goals={"ours, folded + channels_last": 1.15, "ours, the same compiled": 3.0},
            notes={
                who: f"robust {share - robust['ours']:+.2f} points at eps {eps:.1e}" for who, share in robust.items()
            },
        )


def evaluated(net: Any, walk: dict[str, Any], batch: int, **options: Any) -> dict[str, float | int | None]:
    device = net.x.device
    how: dict[str, Any] = {"attack": "pgd", "params": walk, "batch_size": batch, "device": device, **options}
    return evaluate_attack(net.model, net.x, net.y, net.index, **how).numbers


@torch.no_grad()
def classes(model: nn.Module, x: Tensor) -> Tensor:
    answers: Tensor = model(x).argmax(1)
    return answers

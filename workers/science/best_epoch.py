"""The epoch that is kept: the one most robust on training images that were held out (Rice, Wong & Kolter 2020).

Adversarial training overfits robustly: its last epoch is less robust than an earlier one, so published codes keep the
best. They choose it on the test set; here test images choose nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.datasets import to_unit
from workers.science.recipes.common import BatchNoise, eval_mode, pgd_linf

STREAM = "held out"
BATCH = 256


class BestEpoch:
    """Keeps the weights of the epoch with the highest robust accuracy on `x [n, C, H, W]` uint8, `y [n]`.

    The attack is PGD-linf on cross-entropy in eval mode with the recipe's own `eps`, `step_size` and `steps`, from a
    uniform start that is the same in every epoch (of `seed` and the data set's `index [n]`), judged on its last
    iterate. Of equal epochs the first is kept. `epoch` counts from 1; 0 before any.
    """

    def __init__(self, x: Tensor, y: Tensor, index: Tensor, *, seed: int, attack: Mapping[str, float]) -> None:
        self.x, self.y, self.index, self.seed = x, y, index, seed
        self.attack = {"eps": attack["eps"], "step_size": attack["step_size"], "steps": int(attack["steps"])}
        self.epoch, self.accuracy = 0, -1.0
        self._weights: dict[str, Tensor] = {}

    def look(self, model: nn.Module, epoch: int) -> float:
        """The robust accuracy of `model` after `epoch`. If it is the highest so far, the weights are kept."""
        accuracy = self.robust_accuracy(model)
        if accuracy > self.accuracy:
            self.epoch, self.accuracy = epoch, accuracy
            self._weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        return accuracy

    def robust_accuracy(self, model: nn.Module) -> float:
        """An image with NaN or infinite logits is not robust."""
        robust = 0
        for x, y, index in zip(*(torch.split(of, BATCH) for of in (self.x, self.y, self.index)), strict=True):
            x = to_unit(x)
            noise = BatchNoise(self.seed, 0, index, stream=STREAM).uniform(x) * 2 - 1
            x_adv = pgd_linf(
                model,
                x,
                (x + self.attack["eps"] * noise).clamp(0, 1),
                lambda logits, y=y: cross_entropy(logits.float(), y, reduction="sum"),  # type: ignore[misc]
                **self.attack,  # type: ignore[arg-type]
            )
            with torch.no_grad(), eval_mode(model):
                logits = model(x_adv)
            robust += int(((logits.argmax(1) == y) & torch.isfinite(logits).all(1)).sum())
        return robust / len(self.y)

    def put_back(self, model: nn.Module) -> None:
        """Give `model` the weights of the best epoch."""
        model.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """The argument of `restore`. Later epochs replace these tensors and change none."""
        return {"epoch": self.epoch, "accuracy": self.accuracy, "weights": self._weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises `LookupError` or `TypeError` for anything else than such a state."""
        self.epoch, self.accuracy, self._weights = state["epoch"], state["accuracy"], dict(state["weights"])

"""The ways to train, by name (README.md, "Training"). A new one is a file and a line here."""

from workers.science.recipes import (
    adversarial,
    label_smoothing,
    margin,
    relative_flatness,
    sam,
    standard,
    trades,
)
from workers.science.recipes.common import Recipe

# `service/specs/recipes.py` has the names and parameters: `tests/contract/test_catalog.py` compares them.
RECIPES: dict[str, Recipe] = {
    "standard": Recipe(standard.loss, "cross-entropy, the paper's recipe"),
    "label_smoothing": Recipe(label_smoothing.loss, "cross-entropy with smoothed labels", {"smoothing": 0.1}),
    "margin": Recipe(margin.loss, "multi-class hinge on the margin"),
    "adversarial": Recipe(
        adversarial.loss,
        "cross-entropy on PGD-linf examples only",
        {"eps": 8 / 255, "step_size": 2 / 255, "steps": 10},
        attacks=True,
    ),
    "trades": Recipe(
        trades.loss,
        "cross-entropy plus beta times the divergence of adversarial from clean predictions",
        {"beta": 6.0, "eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "start_std": 0.001},
        attacks=True,
    ),
    "sam": Recipe(sam.loss, "sharpness-aware minimisation", {"rho": 0.05}, sam.backward),
    "relative_flatness": Recipe(
        relative_flatness.loss, "cross-entropy plus a penalty on relative flatness", {"strength": 1e-3}
    ),
}

__all__ = ["RECIPES", "Recipe"]

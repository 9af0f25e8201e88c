"""Fit weights made elsewhere to a network, as a process of its own: a request as JSON comes in, an answer goes out.

`python -m workers.importing < request.json`. The request has `architecture`, `shape` (C, H, W), `classes`, `weights`
(a path), `keys`, `mean`, `std` and `out` (a path); the answer `{"parameters": n}` or `{"error": sentence}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from workers.science.architectures import build
from workers.science.errors import ScienceError
from workers.science.heads import linear_head
from workers.science.imported import fit
from workers.science.weights import save_weights


def answer(request: dict[str, Any]) -> dict[str, Any]:
    shape = tuple(request["shape"])
    try:
        model = build(request["architecture"], shape, request["classes"], seed=0)
        fitted = fit(
            model, Path(request["weights"]), keys=request["keys"], mean=request["mean"], std=request["std"],
            channels=shape[0],
        )  # fmt: skip
        linear_head(fitted)
        save_weights(Path(request["out"]), fitted)
    except ScienceError as error:
        return {"error": str(error)}
    return {"parameters": sum(parameter.numel() for parameter in fitted.parameters())}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)

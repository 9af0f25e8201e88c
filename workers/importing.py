"""Fit weights made elsewhere to a network, as a process of its own: a request as JSON comes in, an answer goes out.

`python -m workers.importing < request.json`. The request has `architecture`, `shape` (C, H, W), `classes`, `weights`
(a path), `keys`, `mean`, `std` and `out` (a path); the answer has `parameters`, `stripped_prefix` and `converted_from`,
or it is `{"error": sentence}`. If tensors that do not fit are the reason, `tensors` lists them.
"""

import json
import sys
from pathlib import Path
from typing import Any

from workers.science.architectures import build
from workers.science.errors import ScienceError, WrongTensors
from workers.science.heads import linear_head
from workers.science.imported import fit
from workers.science.weights import save_weights

MOST = 10_000  # tensors that an answer lists of each sort; no network here has a tenth of that


def answer(request: dict[str, Any]) -> dict[str, Any]:
    shape = tuple(request["shape"])
    try:
        model = build(request["architecture"], shape, request["classes"], seed=0)
        fitted = fit(
            model,
            Path(request["weights"]),
            keys=request["keys"],
            mean=request["mean"],
            std=request["std"],
            channels=shape[0],
        )
        linear_head(fitted.model)
        save_weights(Path(request["out"]), fitted.model)
    except WrongTensors as error:
        return {"error": str(error), "tensors": _misfits(error)}
    except ScienceError as error:
        return {"error": str(error)}
    return {
        "parameters": sum(parameter.numel() for parameter in fitted.model.parameters()),
        "stripped_prefix": fitted.stripped_prefix,
        "converted_from": fitted.converted_from,
    }


def _misfits(error: WrongTensors) -> dict[str, Any]:
    lists = {"missing": error.missing, "unknown": error.unknown, "copies": error.copies}
    misshapen = [vars(tensor) for tensor in error.misshapen]
    return {name: list(of)[:MOST] for name, of in {**lists, "misshapen": misshapen}.items()}


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)

"""Two or more results side by side: the fields that differ, and a test on the examples that they break."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from service.errors import InvalidQuery
from service.model.dotted import flat
from service.model.json import JsonMapping, JsonObject
from service.model.results import CellSpec, Result
from service.model.threat_model import threat_model
from service.model.verdict import BitArray
from service.results.results import result_of
from service.results.views import retracted
from service.results.worst_case import why_left_out
from service.specs.versions import LATER
from service.store import results as store
from service.store.database import Database

MAX_COMPARED = 20
RESAMPLES = 10_000
RETRACTED = "retracted"


def compare(database: Database, job_ids: Sequence[str]) -> JsonObject:
    """The fields that differ, a paired test for every two, and the union of the attacks if they are on one network.

    Examples are paired by position, in one fixed permutation or in the order of the file, as many as all results have.
    Raises `InvalidQuery` for other than 2 to 20 ids, for different data sets and for samples in different orders, and
    `NotFound`.
    """
    ids = list(dict.fromkeys(job_ids))
    if not 2 <= len(ids) <= MAX_COMPARED:
        raise InvalidQuery("ids", f"between 2 and {MAX_COMPARED} results can be compared, not {len(ids)}")
    with database.read() as connection:
        results = [result_of(connection, job_id) for job_id in ids]
        by_id = store.cell_specs(connection, {result.cell_id for result in results})
        robust = store.bits_of(connection, [result.attack_task_id for result in results], "robust")
    if len(names := sorted({result.dataset for result in results})) > 1:
        raise InvalidQuery("ids", f"results on different data sets have no examples in common: {', '.join(names)}")
    cells = [by_id[result.cell_id] for result in results]
    specs = [
        dict(flat({**LATER, **result.spec, "versions": cell["versions"]}))
        for result, cell in zip(results, cells, strict=True)
    ]
    if len({spec["order"] for spec in specs}) > 1:
        raise InvalidQuery("ids", "their images are in different orders: one place has other examples")
    n = min(robust[result.attack_task_id].size for result in results)
    bits = [robust[result.attack_task_id][:n] for result in results]
    union, why = _union(results, cells, bits)
    pairs = combinations(zip(ids, bits, strict=True), 2)
    return {
        "results": [_shown(result) for result in results],
        "examples": n,
        "differing": differing(specs),
        "pairs": [{"a": a, "b": b, **paired(bits_a, bits_b)} for (a, bits_a), (b, bits_b) in pairs],
        "union": union,
        "union_refused": why,
    }


def _shown(result: Result) -> JsonObject:
    return {
        "job_id": result.job_id,
        "architecture": result.architecture,
        "dataset": result.dataset,
        "scale": result.scale,
        "seed": result.seed,
        "samples": result.spec["samples"],
        "clean_accuracy": result.metrics["clean_accuracy"],
        "robust_accuracy": result.metrics["robust_accuracy"],
        "verdict": result.verdict,
        "weights_sha256": result.weights_sha256,
        "threat_model": threat_model(result.spec["attack"]).ball,
        **retracted(result),
    }


def differing(specs: Sequence[JsonMapping]) -> dict[str, list[object]]:
    """The fields that are not equal everywhere, with the value of each."""
    names = dict.fromkeys(name for spec in specs for name in spec)
    values = {name: [spec.get(name) for spec in specs] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def paired(a: BitArray, b: BitArray) -> dict[str, float]:
    """McNemar's exact test on outcomes `a [n]`, `b [n]` of the same examples, and the difference of their means.

    The interval is a percentile bootstrap over examples: those resampled are a multinomial of the three differences.
    """
    from scipy.special import bdtr  # the import takes a tenth of a second

    n, only_a, only_b = a.size, int((a & ~b).sum()), int((~a & b).sum())
    discordant = only_a + only_b
    p_value = min(1.0, 2 * float(bdtr(min(only_a, only_b), discordant, 0.5))) if discordant else 1.0
    probabilities = [only_a / n, only_b / n, 1 - discordant / n]
    draws = np.random.RandomState(0).multinomial(n, probabilities, RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, (0.025, 0.975))
    return {
        "only_a": only_a,
        "only_b": only_b,
        "both": int((a & b).sum()),
        "neither": int((~a & ~b).sum()),
        "difference": (only_a - only_b) / n,
        "difference_low": float(low),
        "difference_high": float(high),
        "p_value": p_value,
    }


def _union(
    results: Sequence[Result], cells: Sequence[CellSpec], bits: Sequence[BitArray]
) -> tuple[JsonObject | None, str | None]:
    """The worst case per example over attacks on one network in one ball, or why there is none.

    A result that a network's worst case leaves out is left out here too: `left_out` names it and says why.
    """
    if len({result.weights_sha256 or result.train_task_id for result in results}) > 1:
        return None, "these are attacks on different networks"
    balls = dict.fromkeys(threat_model(result.spec["attack"]).ball for result in results)
    if len(balls) > 1 or None in balls:
        listed = ", ".join("no ball" if ball is None else ball for ball in balls)
        return None, f"a worst case is over one threat model, and these are attacks in {listed}"
    if len({1 if result.spec["scale_bias"] else result.scale for result in results}) > 1:
        return None, "without the bias scaled too, a network predicts other classes at another scale"
    reasons = {
        result.job_id: RETRACTED if result.retracted_at is not None else why_left_out(result.verdict_reasons, cell)
        for result, cell in zip(results, cells, strict=True)
    }
    left_out = {job_id: reason for job_id, reason in reasons.items() if reason is not None}
    pairs = zip(results, bits, strict=True)
    kept = {result.job_id: robust for result, robust in pairs if result.job_id not in left_out}
    if not kept:
        return None, f"none of these proves anything: {', '.join(dict.fromkeys(left_out.values()))}"
    alone = {
        job_id: int((~robust & np.logical_and.reduce([bits for other, bits in kept.items() if other != job_id])).sum())
        for job_id, robust in kept.items()
    }
    worst = float(np.logical_and.reduce(list(kept.values())).mean())
    return {"robust_accuracy": worst, "broken_only_by": alone, "left_out": left_out}, None

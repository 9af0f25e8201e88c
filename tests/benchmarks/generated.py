"""Stores full of finished jobs: made-up numbers in every table that a result rests on, written in bulk.

The cells are those of a lab that sweeps eight architectures, five data sets, fourteen scales and ten attacks; one round
is all of them with one more seed, submitted as a sweep. Robust accuracy rises with the scale as it does where an attack
goes blind, so that filters and order go together, for better and for worse.
"""

import json
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from sqlalchemy import Connection, insert, text

from service.specs import JobSpec
from service.store import Database, counters, filing, tables
from service.store.listed import insert_rows
from service.store.result_tables import cells, results

ARCHITECTURES = (
    "mlp", "simple_cnn", "resnet18", "resnet20", "wide_resnet28_4", "densenet121_cifar", "vit_tiny", "resnet50d",
)  # fmt: skip
DATASETS = ("cifar10", "cifar100", "svhn", "fashion_mnist", "mnist")
SCALES = (0.1, 0.25, 0.5, 1, 2, 2.5, 4, 5, 7.5, 10, 20, 25, 50, 100)
ATTACKS = (
    "pgd_linf",
    "pgd_l2",
    {"type": "fgsm", "norm": "linf", "eps": "8/255"},
    *({"type": "pgd", "norm": "linf", "eps": f"{n}/255", "step_size": "1/255", "steps": 10} for n in (1, 2, 4, 16)),
    *({"type": "pgd", "norm": "l2", "eps": eps, "step_size": eps / 4, "steps": 10} for eps in (0.1, 0.5, 1.0)),
)
USERS = ("ada", "bob", "cyd", "dan", "eve")
VERSIONS = {"train": 1, "measure": 1, "attack": 1, "control": None}
DAY = 86_400.0
TASK = {
    "version": 1, "generation": 1, "state": "succeeded", "priority": 0, "needed_by": 0, "waiting_since": 0.0,
    "due": 0.0, "paused": False, "attempt": 1, "errors": 0, "suspect_losses": 0, "not_before": 0.0,
    "cancel_requested": False, "progress": 1.0, "detail": "{}",
}  # fmt: skip
PROVENANCE = json.dumps(
    {
        "code_version": "0.1.0", "code_digest": "c" * 64, "python": "3.12.3", "torch": "2.12.0", "numpy": "2.3.4",
        "device": "NVIDIA H100", "hostname": "gpu-1", "threads": 8, "wall_seconds": 12.5, "cpu_seconds": 11.0,
        "peak_host_memory_bytes": 2_000_000_000, "weights_sha256": "w" * 64, "dataset_sha256": "d" * 64,
    }
)  # fmt: skip

# Questions that have an index, as parameters of a page.
INDEXED: dict[str, dict[str, Any]] = {
    "architecture, scale": {"architecture": "resnet18", "scale": 5, "sort": "-robust_accuracy"},
    "the same, against the grain": {"architecture": "resnet18", "scale": 50, "sort": "robust_accuracy"},
    "dataset, attack": {"dataset": "cifar100", "attack": "fgsm", "sort": "robust_loss"},
    "attack, scale": {"attack": "pgd", "scale": 0.1, "sort": "-masked_fraction"},
    "scale, owner": {"scale": 0.1, "owner": "eve", "sort": "-zero_gradient_fraction"},
    "architecture, owner": {"architecture": "mlp", "owner": "ada", "sort": "-log_relative_sharpness_median"},
    "architecture, dataset, newest": {"architecture": "densenet121_cifar", "dataset": "svhn"},
    "architecture, time": {"filter": "architecture = mlp and created_at > 2023-11-20", "sort": "-robust_accuracy"},
}


@dataclass(frozen=True)
class Cell:
    """One of the lab's cells, with its job as JSON but for the seed, and its place in the grid."""

    id: int
    row: dict[str, Any]
    spec: str
    network: int  # of (architecture, data set)
    scale: int
    attack: int


def fill(database: Database, count: int) -> None:
    """So many results into an empty store, round by round; PostgreSQL's planner is told of them."""
    indexes = sorted(
        (index for table in (results, tables.jobs) for index in table.indexes), key=lambda one: str(one.name)
    )
    with database.write() as connection:
        for index in indexes:
            index.drop(connection)
        grid = _cells(connection)
        rng = np.random.default_rng(0)
        for number in range(-(-count // len(grid))):
            _round(connection, grid, number, rng, count - number * len(grid))
        counters.take(connection, "jobs", count)
        names = (("attack", _attack_numbers(0, 0, 0)), ("measure", _measure_numbers(0)))
        for kind, numbers in names:
            filing.note_names(connection, kind, [json.loads(numbers)])
        for index in indexes:
            index.create(connection)
    if not database.is_sqlite:  # which does it by itself in time; SQLite never does
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


def _cells(connection: Connection) -> list[Cell]:
    grid, rows = [], []
    places = product(enumerate(ARCHITECTURES), enumerate(DATASETS), enumerate(SCALES), enumerate(ATTACKS))
    for (a, architecture), (d, dataset), (s, scale), (k, attack) in places:
        job = JobSpec(architecture=architecture, dataset=dataset, scale=scale, attack=attack, seed=0)
        spec = job.model_dump(mode="json")
        shared = filing.cell_spec(spec, VERSIONS)
        row = filing.cell_row(filing.cell_digest(shared), shared)
        rows.append(row)  # of an empty table: its ids count from 1
        del spec["seed"]
        grid.append(Cell(len(rows), row, json.dumps(spec)[:-1], a * len(DATASETS) + d, s, k))
    insert_rows(connection, cells, rows)
    return grid


def _round(connection: Connection, grid: list[Cell], number: int, rng: np.random.Generator, most: int) -> None:
    """Every cell once, or the first `most` of them, with this number as their seed."""
    at, user, sweep = 1.7e9 + number * DAY, USERS[number % len(USERS)], _id("5", number)
    networks, scales, attacks = len(ARCHITECTURES) * len(DATASETS), len(SCALES), len(ATTACKS)
    first = number * len(grid)
    made = {"name": f"round {number}", "user": user, "spec": {}, "priority": 0, "labels": {}, "paused": False}
    connection.execute(insert(tables.sweeps).values(id=sweep, created_at=at, **made))
    trainings = [_id("1", number * networks + n) for n in range(networks)]
    measurements = [_id("2", (number * networks + n) * scales + s) for n in range(networks) for s in range(scales)]
    accuracy = 0.7 + 0.29 * rng.random(networks)
    sharpness = rng.standard_normal(networks * scales) - np.tile(SCALES, networks)
    jobs, filed, attack_rows = [], [], []
    noise = rng.random((len(grid), 3))
    for cell, (one, two, three) in zip(grid[:most], noise, strict=False):
        n = first + cell.id - 1
        scale, place = SCALES[cell.scale], cell.network * scales + cell.scale
        clean = round(float(accuracy[cell.network]), 3)
        blind = scale / (scale + 15 * (0.5 + one))
        numbers = {
            "clean_accuracy": clean,
            "clean_loss": float(two),
            "robust_accuracy": round(clean * (0.05 * cell.attack * two + (1 - 0.05 * cell.attack * two) * blind), 3),
            "robust_loss": float(8 * three * (1 - blind)),
            "zero_gradient_fraction": round(max(0.0, blind - 0.2), 3) if cell.id % 50 else None,
        }
        log_sharpness = float(sharpness[place])
        measured = {
            "log_hessian_trace_median": log_sharpness + 2,
            "log_relative_sharpness_median": log_sharpness,
            "log_relative_flatness_median": log_sharpness - 1,
        }
        verdict = {
            "masked_fraction": round(blind / 2, 3),
            "masked_fraction_of_correct": round(blind / 2, 3),
            "reverse_fraction": 0.0,
            "verdict": ("trusted", "suspect", "invalid")[min(2, int(3 * blind))],
        }
        parts = {
            "train_task_id": trainings[cell.network],
            "measure_task_id": measurements[place],
            "attack_task_id": _id("3", n),
        }
        times = {"created_at": at, "finished_at": at + 60 + cell.id}
        own = {"sequence": n + 1, "user": user, "sweep_id": sweep, "seed": number}
        spec = {"attack_seed": 0, "replicate": 0, "arrays": False}
        named = {
            name: cell.row[name]
            for name in ("architecture", "dataset", "scale", "attack", "norm", "eps", "recipe", "samples")
        }
        jobs.append({
            "id": _id("4", n), **own, **named, "spec": f'{cell.spec}, "seed": {number}}}', "spec_digest": f"{n:064x}",
            "priority": 0, "labels": '{"study": "generated"}', "state": "succeeded", **times, **parts, **verdict,
            "baseline_task_id": _id("3", first + cell.id - 1 + (SCALES.index(1) - cell.scale) * attacks),
            "verdict_reasons": "[]", "verdict_checks": "{}", "verdict_version": 1,
        })  # fmt: skip
        filed.append({
            "job_id": _id("4", n), **own, **spec, "cell_id": cell.id, **parts, "repeated": False, **numbers, **measured,
            **verdict, "weights_sha256": _weights(number * networks + cell.network), "repeats_network": False,
            "test_accuracy": clean, "train_seconds": 100.0 * clean, **times,
        })  # fmt: skip
        attack_rows.append({"task_id": _id("3", n), **numbers, "numbers": _attack_numbers(one, two, three)})
    _tasks(connection, "train", trainings, trainings, user, at)
    of_training = [task_id for task_id in trainings for _ in range(scales)]
    _tasks(connection, "measure", measurements, of_training, user, at)
    attacked = [trainings[cell.network] for cell in grid[:most]]
    _tasks(connection, "attack", [row["task_id"] for row in attack_rows], attacked, user, at)
    insert_rows(connection, tables.trainings, [
        {"task_id": task_id, "checkpoint_digest": _weights(number * networks + n), "checkpoint_bytes": 1000,
         "test_accuracy": float(value), "seconds": 100.0 * float(value), "numbers": "{}"}
        for n, (task_id, value) in enumerate(zip(trainings, accuracy, strict=True))
    ])  # fmt: skip
    insert_rows(connection, tables.measurements, [
        {"task_id": task_id, "log_relative_sharpness_median": float(value), "numbers": _measure_numbers(float(value))}
        for task_id, value in zip(measurements, sharpness, strict=True)
    ])  # fmt: skip
    insert_rows(connection, tables.attack_results, attack_rows)
    insert_rows(connection, tables.jobs, jobs)
    insert_rows(connection, tables.job_tasks, [
        {"job_id": row["id"], "task_id": row[part]} for row in jobs
        for part in ("train_task_id", "measure_task_id", "attack_task_id")
    ])  # fmt: skip
    insert_rows(connection, results, filed)


def _tasks(connection: Connection, kind: str, ids: list[str], trainings: list[str], user: str, at: float) -> None:
    """Succeeded tasks of one kind, each on its training, with their one attempt."""
    spec = json.dumps({"kind": kind, "arrays": False})
    rows = [
        {"id": task_id, "digest": _digest(task_id), "kind": kind, "spec": spec, "train_digest": _digest(training),
         "sponsor": user, "sequence": int(task_id[1:]), "created_at": at, "started_at": at, "finished_at": at, **TASK}
        for task_id, training in zip(ids, trainings, strict=True)
    ]  # fmt: skip
    insert_rows(connection, tables.tasks, rows)
    insert_rows(connection, tables.attempts, [
        {"task_id": task_id, "number": 1, "holder": "generated", "worker": "gpu-1", "started_at": at, "ended_at": at,
         "end": "succeeded", "provenance": PROVENANCE}
        for task_id in ids
    ])  # fmt: skip


def _id(kind: str, number: int) -> str:
    return f"{kind}{number:035d}"


def _weights(training: int) -> str:
    return f"{training:064x}"


def _digest(task_id: str) -> str:
    return f"{task_id:0>64}"


def _attack_numbers(one: float, two: float, three: float) -> str:
    return (
        f'{{"flip_rate": {one:.4f}, "loss_increase_q95": {8 * two:.4f}, "margin_median": {three - 0.5:.4f}, '
        f'"distance_mean": {one * two:.4f}, "gradient_norm_median": {two * three:.6f}}}'
    )


def _measure_numbers(value: float) -> str:
    return f'{{"log_relative_sharpness_median": {value:.4f}, "weight_norm": {value * value:.4f}}}'

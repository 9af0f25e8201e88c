"""Networks by the SHA-256 of their weights: a list of the trained ones, and what a job that names one means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from service.lab.checkpoints import DIGEST, is_registered, weights_of
from service.model.times import iso
from service.results.views import retracted
from service.specs import DatasetRef, JobSpec
from service.specs.catalog import ARCHITECTURES
from service.specs.plan import training
from service.specs.recipes import RECIPES, AnyRecipe, Imported
from service.store import Connection, Database, Row, meanings
from service.store import networks as store
from service.store.keyset import decode_id, encode_id
from service.store.meanings import Meaning, checked, one_of

RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(AnyRecipe)
MEANINGS: Mapping[str, Meaning] = {
    "architecture": one_of(ARCHITECTURES), "dataset": meanings.dataset, "recipe": one_of(RECIPES),
    "weights_sha256": meanings.digest,
}  # fmt: skip
MOST = 5  # that a refusal lists


@dataclass(frozen=True)
class Trained:
    """The training that a job means which names the weights that it made."""

    recipe: AnyRecipe
    seed: int
    replicate: int


def trained(database: Database, filters: Mapping[str, str], cursor: str | None, limit: int) -> dict[str, Any]:
    """A page of the networks that trainings made, the newest first; `filters` by the names of `store.FIELDS`.

    Raises `InvalidQuery` for what is no cursor and no SHA-256, and for an unknown architecture, data set or recipe.
    """
    question = ["networks", sorted(filters.items())]
    after = None if cursor is None else decode_id(question, cursor)
    with database.read() as connection:
        stored = {
            name: one for name, value in filters.items() for one in checked(connection, MEANINGS[name], name, value)
        }
        rows = store.page(connection, stored, after, limit + 1)
        jobs = store.job_counts(connection, [row.task_id for row in rows[:limit]])
    items = [_view(row, jobs.get(row.task_id, 0)) for row in rows[:limit]]
    return {"items": items, "next_cursor": encode_id(question, rows[limit - 1].task_id) if len(rows) > limit else None}


def named(
    connection: Connection, name: str, job: JobSpec, architecture: str, dataset: DatasetRef, replicate: int
) -> Trained | Imported:
    """What the checkpoint `name` means for a network of that job: a training that made these weights, else the weights.

    `name` is that of a registered checkpoint, or the SHA-256 of weights. Weights whose training a new job would not
    join (another replicate is asked for, or today's code plans another task) are imported as they are.
    Raises `ValueError` where there are none, where they are of another network or of several, and where every training
    that made them is retracted.
    """
    made = store.by_weights(connection, name) if DIGEST.fullmatch(name) else []
    fitting = [row for row in made if _is_of(row.spec, architecture, dataset)]
    if fitting:
        standing = [row for row in fitting if row.retracted_at is None]
        if not standing:
            raise ValueError(_retracted(fitting[0]))
        return _training_of(standing, job, architecture, dataset, replicate)
    if made and not is_registered(connection, name):
        of = " and ".join(
            dict.fromkeys(f"a {row.spec['architecture']} on {row.spec['dataset']['name']}" for row in made)
        )
        raise ValueError(f"the weights {name} are of {of}, not of a {architecture} on {dataset.name}")
    return weights_of(connection, name, architecture, dataset.name)


def _is_of(spec: Mapping[str, Any], architecture: str, dataset: DatasetRef) -> bool:
    return (spec["architecture"], spec["dataset"]) == (architecture, dataset.model_dump())


def _training_of(
    rows: Sequence[Row[Any]], job: JobSpec, architecture: str, dataset: DatasetRef, replicate: int
) -> Trained | Imported:
    """Replicate 0 is what is meant where none is asked for, which any training may be."""
    asked = [row for row in rows if row.spec["replicate"] == replicate] or ([] if replicate else rows)
    weights = Imported(weights_sha256=rows[0].checkpoint_digest)
    if len(asked) > 1:
        raise ValueError(_several(asked))
    for row in asked:
        try:
            recipe = RECIPE.validate_python(row.spec["recipe"])
        except ValidationError:  # of a version that could ask for what today's cannot
            return weights
        seed, replicate = row.spec["seed"], row.spec["replicate"]
        if training(architecture, dataset, recipe, seed, replicate).digest == row.digest:
            return Trained(job.as_asked(recipe), seed, replicate)
    return weights


def _several(rows: Sequence[Row[Any]]) -> str:
    """Equal bits from several trainings, such as of two recipes that are one with these parameters."""
    each = [
        f"{row.spec['recipe']['name']} with seed {row.spec['seed']} (task {(row.former_digest or row.digest)[:12]})"
        for row in rows
    ]
    more = f" and {len(rows) - MOST} more" if len(rows) > MOST else ""
    return (
        f"{len(rows)} trainings made the weights {rows[0].checkpoint_digest}: {', '.join(each[:MOST])}{more}; name the "
        "recipe and seed of the one that is meant"
    )


def _retracted(row: Row[Any]) -> str:
    return (
        f"{row.retracted_by} retracted the training that made the weights {row.checkpoint_digest}: "
        f"{row.retraction_reason}; a job that names its recipe and seed trains again"
    )


def _view(row: Row[Any], jobs: int) -> dict[str, Any]:
    spec = row.spec
    return {
        "weights_sha256": row.checkpoint_digest,
        "architecture": spec["architecture"],
        "dataset": spec["dataset"]["name"],
        "recipe": spec["recipe"],
        "seed": spec["seed"],
        "replicate": spec["replicate"],
        "test_accuracy": row.test_accuracy,
        "size_bytes": row.checkpoint_bytes,
        "task_id": row.task_id,
        "task_digest": row.former_digest or row.digest,
        "jobs": jobs,
        "created_at": iso(row.finished_at),
        **retracted(row),
    }

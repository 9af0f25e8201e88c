"""Networks by the SHA-256 of their weights: a list of the trained ones, and the meaning of weights that a job names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from service.lab.checkpoints import is_registered, weights_of
from service.model.json import JsonObject
from service.model.names import DIGEST
from service.model.results import TrainedNetwork
from service.model.times import iso
from service.results.views import retracted
from service.specs import DatasetRef, JobSpec
from service.specs.catalog import ARCHITECTURES
from service.specs.plan import training
from service.specs.recipes import RECIPES, AnyRecipe, Imported
from service.store import Connection, Database, meanings
from service.store import networks as store
from service.store.keyset import decode_id, encode_id
from service.store.meanings import Meaning, checked, one_of

RECIPE: TypeAdapter[AnyRecipe] = TypeAdapter(AnyRecipe)
MEANINGS: Mapping[str, Meaning] = {
    "architecture": one_of(ARCHITECTURES),
    "dataset": meanings.dataset,
    "recipe": one_of(RECIPES),
    "weights_sha256": meanings.digest,
}
MOST = 5  # trainings that a message lists


@dataclass(frozen=True)
class Trained:
    """The training that made weights which a job names instead of the recipe."""

    recipe: AnyRecipe
    seed: int
    replicate: int


def trained(database: Database, filters: Mapping[str, str], cursor: str | None, limit: int) -> JsonObject:
    """A page of the networks that trainings made, the newest first; `filters` by the names of `store.FIELDS`.

    Raises `InvalidQuery` for a bad cursor or SHA-256, and for an unknown architecture, data set or recipe.
    """
    question = ["networks", sorted(filters.items())]
    after = None if cursor is None else decode_id(question, cursor)
    with database.read() as connection:
        stored = {
            name: stored_value
            for name, value in filters.items()
            for stored_value in checked(connection, MEANINGS[name], name, value)
        }
        page = store.page(connection, stored, after, limit + 1)
        networks = page[:limit]
        jobs = store.job_counts(connection, [network.task_id for network in networks])
    items = [_view(network, jobs.get(network.task_id, 0)) for network in networks]
    return {"items": items, "next_cursor": encode_id(question, networks[-1].task_id) if len(page) > limit else None}


def named(
    connection: Connection, name: str, job: JobSpec, architecture: str, dataset: DatasetRef, replicate: int
) -> Trained | Imported:
    """The checkpoint `name` as a job's network: a training that made these weights, else the weights themselves.

    `name` is the name of a registered checkpoint, or the SHA-256 of weights. Weights whose training a new job would not
    join (it has another replicate, or today's code plans another task) are imported as they are.
    Raises `ValueError` if there are none, if they are of another network or of several, and if every training
    that made them is retracted.
    """
    made = store.by_weights(connection, name) if DIGEST.fullmatch(name) else []
    fitting = [network for network in made if _is_of(network, architecture, dataset)]
    if fitting:
        standing = [network for network in fitting if network.retracted_at is None]
        if not standing:
            raise ValueError(_retracted(fitting[0]))
        return _training_of(standing, job, architecture, dataset, replicate)
    if made and not is_registered(connection, name):
        others = " and ".join(
            dict.fromkeys(f"a {network.spec['architecture']} on {network.spec['dataset']['name']}" for network in made)
        )
        raise ValueError(f"the weights {name} are of {others}, not of a {architecture} on {dataset.name}")
    return weights_of(connection, name, architecture, dataset.name)


def _is_of(network: TrainedNetwork, architecture: str, dataset: DatasetRef) -> bool:
    return (network.spec["architecture"], network.spec["dataset"]) == (architecture, dataset.model_dump())


def _training_of(
    networks: Sequence[TrainedNetwork], job: JobSpec, architecture: str, dataset: DatasetRef, replicate: int
) -> Trained | Imported:
    """The training that a new job joins, else the weights. Replicate 0 stands for any replicate."""
    candidates = [network for network in networks if network.spec["replicate"] == replicate] or (
        [] if replicate else networks
    )
    weights = Imported(weights_sha256=networks[0].weights_sha256)
    if len(candidates) > 1:
        raise ValueError(_several(candidates))
    for network in candidates:
        try:
            recipe = RECIPE.validate_python(network.spec["recipe"])
        except ValidationError:  # an earlier version accepted this recipe, and this one refuses it
            return weights
        seed, replicate = network.spec["seed"], network.spec["replicate"]
        if training(architecture, dataset, recipe, seed, replicate).digest == network.digest:
            return Trained(job.as_asked(recipe), seed, replicate)
    return weights


def _several(networks: Sequence[TrainedNetwork]) -> str:
    """The error for equal weights of several trainings, such as of two recipes that are equal for these parameters."""
    each = [
        f"{network.spec['recipe']['name']} with seed {network.spec['seed']} (task {network.task_digest[:12]})"
        for network in networks
    ]
    listed = ", ".join(each[:MOST]) + (f" and {len(networks) - MOST} more" if len(networks) > MOST else "")
    return (
        f"{len(networks)} trainings made the weights {networks[0].weights_sha256}: {listed}; name the recipe and seed "
        "of the one that is meant"
    )


def _retracted(network: TrainedNetwork) -> str:
    return (
        f"{network.retracted_by} retracted the training that made the weights {network.weights_sha256}: "
        f"{network.retraction_reason}; a job that names its recipe and seed trains again"
    )


def _view(network: TrainedNetwork, jobs: int) -> JsonObject:
    spec = network.spec
    return {
        "weights_sha256": network.weights_sha256,
        "architecture": spec["architecture"],
        "dataset": spec["dataset"]["name"],
        "recipe": spec["recipe"],
        "seed": spec["seed"],
        "replicate": spec["replicate"],
        "test_accuracy": network.test_accuracy,
        "size_bytes": network.size_bytes,
        "task_id": network.task_id,
        "task_digest": network.task_digest,
        "jobs": jobs,
        "created_at": iso(network.finished_at),
        **retracted(network),
    }

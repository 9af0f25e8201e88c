"""Weights by name or digest: what a job that names them needs, and the list of the networks that trainings made."""

from typing import Any

import pytest
from sqlalchemy import insert, update
from store_lab import Lab

from service.errors import InvalidQuery, InvalidSpec
from service.lab.access import NotAllowed
from service.model.executor import Grant, Succeeded
from service.queue import retractions
from service.results import networks
from service.specs import DatasetRef, JobSpec, digest
from service.specs.plan import plan_job
from service.specs.recipes import Imported
from service.store import tables
from service.store.result_tables import results

FOREIGN = "f" * 64
UNKNOWN = "0" * 64


def train(lab: Lab, *jobs: dict[str, Any], weights: bytes | None = None) -> list[str]:
    """Submit these jobs and finish them; returns the digests of the weights that they left."""
    ids = [lab.submit(**job) for job in jobs]
    if weights is not None:
        grants = lab.grant("train")
        lab.record(*(Succeeded(grant.task_id, grant.attempt, left(lab, grant, weights)) for grant in grants))
    lab.finish()
    trainings = [lab.job(job_id).train_task_id for job_id in ids]
    return [lab.rows(tables.trainings, task_id=task_id)[0].checkpoint_digest for task_id in trainings]


def left(lab: Lab, grant: Grant, weights: bytes) -> Any:
    ref = lab.artifacts.write_chunks("checkpoint", [weights])
    outcome = lab.outcome(grant)
    return type(outcome)(outcome.numbers, outcome.curves, artifacts=(ref,), provenance=outcome.provenance)


def register(lab: Lab, name: str, **changes: Any) -> None:
    """A registered checkpoint's row, as if its weights had been looked at."""
    row = {
        "name": name,
        "architecture": "mlp",
        "dataset": "digits",
        "uploaded_sha256": "0" * 64,
        "keys": {},
        "mean": [],
        "std": [],
        "channels": 1,
        "height": 8,
        "width": 8,
        "classes": 10,
        "weights_sha256": FOREIGN,
        "size_bytes": 9,
        "parameters": 1,
        "created_by": "ann",
        "created_at": 0.0,
        **changes,
    }
    with lab.database.write() as connection:
        connection.execute(insert(tables.checkpoints).values(row))


def page(lab: Lab, cursor: str | None = None, limit: int = 100, **filters: str) -> dict[str, Any]:
    return networks.trained(lab.database, filters, cursor, limit)


class TestList:
    def test_pages_of_the_newest_first_with_the_jobs_of_each(self, lab: Lab) -> None:
        weights = train(lab, {"seed": 0}, {"seed": 1}, {"seed": 2, "recipe": {"name": "sam", "epochs": 3}})
        train(lab, {"seed": 1, "scale": 7}, {"recipe": {"name": "imported", "checkpoint": weights[0]}, "scale": 9})
        first = page(lab, limit=2)
        rest = page(lab, first["next_cursor"], limit=2)
        assert [item["weights_sha256"] for item in first["items"] + rest["items"]] == weights[::-1]
        assert rest["next_cursor"] is None
        assert [item["jobs"] for item in first["items"] + rest["items"]] == [1, 2, 2]
        newest = first["items"][0]
        assert (newest["architecture"], newest["dataset"], newest["seed"], newest["replicate"]) == (
            "mlp",
            "digits",
            2,
            0,
        )
        assert (newest["recipe"]["name"], newest["recipe"]["epochs"], newest["test_accuracy"]) == ("sam", 3, 0.9)
        assert newest["size_bytes"] == lab.rows(tables.trainings)[-1].checkpoint_bytes > 0
        assert newest["task_digest"] == lab.task(newest["task_id"]).digest
        assert newest["created_at"].endswith("Z")

    def test_filters(self, lab: Lab) -> None:
        weights = train(lab, {"seed": 0}, {"architecture": "simple_cnn"}, {"recipe": "sam"})
        cases: tuple[tuple[dict[str, Any], list[str]], ...] = (
            ({"architecture": "simple_cnn"}, weights[1:2]),
            ({"recipe": "sam"}, weights[2:]),
            ({"dataset": "digits", "architecture": "mlp"}, [weights[2], weights[0]]),
            ({"weights_sha256": weights[0]}, weights[:1]),
            ({"dataset": "mnist"}, []),
        )
        for filters, expected in cases:
            assert [item["weights_sha256"] for item in page(lab, **filters)["items"]] == expected, filters

    def test_only_what_a_training_of_this_service_has_finished(self, lab: Lab) -> None:
        register(lab, "theirs")
        lab.submit(recipe={"name": "imported", "checkpoint": "theirs"})
        lab.finish()
        lab.submit(seed=1)
        lab.fail(lab.grant("train")[0])
        lab.submit(seed=2)
        assert page(lab)["items"] == []


@pytest.mark.parametrize("cursor", ["", "x", "\x00", "0" * 36, "01939d3e-7b1f-7c3e-a2d4-5f60718293a4x"])
def test_what_is_no_cursor(lab: Lab, cursor: str) -> None:
    with pytest.raises(InvalidQuery, match="cursor: this is not a cursor"):
        page(lab, cursor)


class TestTrainedByDigest:
    @pytest.mark.parametrize("short", [True, False])
    def test_a_job_joins_the_training_and_all_that_was_computed_on_it(self, lab: Lab, short: bool) -> None:
        asked: dict[str, Any] = {"seed": 3, "recipe": {"epochs": 5, "flip": False}, "scale": 5}
        [weights] = train(lab, asked)
        before = len(lab.rows(tables.tasks))
        named = {"checkpoint": weights} if short else {"recipe": {"name": "imported", "checkpoint": weights}}
        again = lab.job(lab.submit(**named, scale=5))
        assert again.state == "succeeded", "all of its numbers are known"
        assert len(lab.rows(tables.tasks)) == before
        by_recipe = lab.job(lab.submit(**{**asked, "recipe": {"epochs": 5}}))
        assert again.spec == by_recipe.spec, "so a statistic sees one network, of its recipe and seed"
        assert (again.spec_digest, again.seed, again.recipe) == (by_recipe.spec_digest, 3, "standard")
        further = lab.job(lab.submit(**named, scale=7))
        assert further.train_task_id == again.train_task_id

    def test_what_was_asked_for_by_hand_stays(self, lab: Lab) -> None:
        [weights] = train(lab, {"recipe": {"epochs": 5, "rotation_degrees": 3}})
        assert lab.job(lab.submit(checkpoint=weights)).spec["recipe"]["rotation_degrees"] == 3

    def test_cells_of_a_sweep_that_are_one_network_are_one_job(self, lab: Lab) -> None:
        [weights] = train(lab, {"scale": 5})
        grid: dict[str, list[Any]] = {
            "recipe": ["standard", {"name": "imported", "checkpoint": weights}],
            "scale": [5, 7],
        }
        accepted = lab.submit_sweep(grid)
        assert (accepted["jobs"], accepted["repetitions"], accepted["known"]["train"]) == (2, 2, 1)

    def test_the_source_of_a_transfer(self, lab: Lab) -> None:
        mine, other = train(lab, {"seed": 0}, {"architecture": "simple_cnn", "seed": 4})
        by = {"type": "fgsm", "norm": "linf", "eps": 0.1}
        source = {"architecture": "simple_cnn", "recipe": {"name": "imported", "checkpoint": other}}
        named = {"type": "transfer", "attack": by, "source": source}
        job = lab.job(lab.submit(checkpoint=mine, attack=named))
        made_on = job.spec["attack"]["source"]
        assert (made_on["recipe"]["name"], made_on["seed"], job.spec["recipe"]["name"]) == ("standard", 4, "standard")
        same = {"type": "transfer", "attack": by, "source": {"architecture": "mlp", "seed": 9}}
        job = lab.job(lab.submit(checkpoint=mine, attack=same))
        assert job.spec["attack"]["source"]["seed"] == 0, "of the job's own weights, whatever its seed says"
        with pytest.raises(InvalidSpec, match=f"/attack: the weights {other} are of a simple_cnn on digits"):
            lab.submit(attack={**named, "source": {**source, "architecture": "mlp"}})

    def test_another_network(self, lab: Lab) -> None:
        [weights] = train(lab, {})
        said = f"/recipe: the weights {weights} are of a mlp on digits, not of a "
        with pytest.raises(InvalidSpec, match=f"{said}simple_cnn on digits"):
            lab.submit(architecture="simple_cnn", checkpoint=weights)
        with pytest.raises(InvalidSpec, match=f"{said}mlp on mnist"):
            lab.submit(dataset="mnist", checkpoint=weights)

    def test_weights_that_nobody_has(self, lab: Lab) -> None:
        with pytest.raises(InvalidSpec, match=f"no weights with the SHA-256 {UNKNOWN} are registered, and no training"):
            lab.submit(checkpoint=UNKNOWN)
        lab.submit()
        [grant] = lab.grant("train")
        lab.fail(grant)
        with pytest.raises(InvalidSpec, match="no training made them"):
            lab.submit(checkpoint=UNKNOWN)

    def test_equal_weights_of_two_trainings_are_ambiguous(self, lab: Lab) -> None:
        one, two = train(lab, {"seed": 1}, {"seed": 2, "recipe": "sam"}, weights=b"equal")
        assert one == two
        said = r"2 trainings made the weights .*: standard with seed 1 \(task .*\), sam with seed 2 .* name the recipe"
        with pytest.raises(InvalidSpec, match=said):
            lab.submit(checkpoint=one)

    def test_of_two_replicates_the_one_that_is_asked_for(self, lab: Lab) -> None:
        [weights, _] = train(lab, {"replicate": 0}, {"replicate": 2}, weights=b"equal")
        assert lab.job(lab.submit(checkpoint=weights)).spec["replicate"] == 0
        assert lab.job(lab.submit(checkpoint=weights, replicate=2)).spec["replicate"] == 2

    def test_a_replicate_that_no_training_is_runs_on_the_same_weights(self, lab: Lab) -> None:
        [weights] = train(lab, {"replicate": 1})
        assert lab.job(lab.submit(checkpoint=weights)).spec["replicate"] == 1
        rerun = lab.job(lab.submit(checkpoint=weights, replicate=5))
        spec = lab.task(rerun.train_task_id).spec
        assert (spec["recipe"], spec["replicate"]) == (Imported(weights_sha256=weights).model_dump(), 5)
        assert (rerun.state, rerun.recipe) == ("queued", "imported")

    @pytest.mark.parametrize("changed", ["digest", "recipe"])
    def test_a_training_of_another_version_is_not_run_again(self, lab: Lab, changed: str) -> None:
        """Its weights are there, and they are what was named."""
        [weights] = train(lab, {})
        [row] = lab.rows(tables.tasks, kind="train")
        other = {"digest": "e" * 64, "recipe": {**row.spec, "recipe": {"name": "forgotten"}}}[changed]
        values = {"spec" if changed == "recipe" else changed: other}
        with lab.database.write() as connection:
            connection.execute(update(tables.tasks).where(tables.tasks.c.id == row.id).values(values))
        spec = lab.task(lab.job(lab.submit(checkpoint=weights)).train_task_id).spec
        assert spec["recipe"]["weights_sha256"] == weights


class TestRetracted:
    def retract(self, lab: Lab, job: str) -> None:
        training = lab.job(job).train_task_id
        retractions.retract_task(lab.service, training, "the wrong split", user="ann", admin=True)

    @pytest.mark.parametrize("replicate", [0, 3])
    def test_retracted_weights_do_not_come_back_by_their_digest(self, lab: Lab, replicate: int) -> None:
        job = lab.submit()
        lab.finish()
        [weights] = [item["weights_sha256"] for item in page(lab)["items"]]
        self.retract(lab, job)
        said = f"/recipe: ann retracted the training that made the weights {weights}: the wrong split"
        with pytest.raises(InvalidSpec, match=said):
            lab.submit(checkpoint=weights, replicate=replicate)
        by = {"type": "fgsm", "norm": "linf", "eps": 0.1}
        source = {"architecture": "mlp", "recipe": {"name": "imported", "checkpoint": weights}}
        with pytest.raises(InvalidSpec, match="/attack: ann retracted the training"):
            lab.submit(seed=4, attack={"type": "transfer", "attack": by, "source": source})
        retractions.restore_task(lab.service, lab.job(job).train_task_id, user="ann", admin=True)
        assert lab.job(lab.submit(checkpoint=weights)).train_task_id == lab.job(job).train_task_id

    def test_what_imported_the_weights_before_is_hidden_with_the_training_and_comes_back(self, lab: Lab) -> None:
        job, other = lab.submit(), lab.submit(seed=7)
        lab.finish()
        weights = self.weights_of(lab, job)
        imported = lab.submit(checkpoint=weights, replicate=5, user="bob")
        moved = lab.submit(seed=7, attack=self.from_weights(weights), replicate=5)
        lab.finish()
        waiting = lab.submit(checkpoint=weights, replicate=5, scale=9, user="bob")
        assert lab.job(imported).train_task_id not in (lab.job(job).train_task_id, lab.job(other).train_task_id)
        training = lab.job(job).train_task_id
        with pytest.raises(NotAllowed, match="jobs of bob rest on it"):
            retractions.retract_task(lab.service, training, "the wrong split", user="ann", admin=False)
        done = retractions.retract_task(lab.service, training, "the wrong split", user="ann", admin=True)
        assert done["retracted"] == sorted([job, imported, moved])
        assert done["still_registered"] == []
        assert self.shown(lab) == {other}
        assert lab.job(waiting).state == "cancelled"
        assert f"ann retracted the training that made the weights {weights}" in lab.job(waiting).reason
        [row] = lab.rows(results, job_id=imported)
        assert (row.retracted_with, row.retracted_by, row.retraction_reason) == (training, "ann", "the wrong split")
        lab.check()
        back = retractions.restore_task(lab.service, training, user="ann", admin=True)
        assert back["restored"] == sorted([job, imported, moved])
        assert self.shown(lab) == {job, other, imported, moved}
        assert not any(row.former_digest for row in lab.rows(tables.tasks))
        assert lab.job(lab.submit(checkpoint=weights, replicate=5)).train_task_id == lab.job(imported).train_task_id

    def test_what_is_registered_under_a_name_stays_and_is_said(self, lab: Lab) -> None:
        job = lab.submit()
        lab.finish()
        weights = self.weights_of(lab, job)
        register(lab, "kept", weights_sha256=weights)
        by_name = lab.submit(checkpoint="kept")
        lab.finish()
        done = retractions.retract_task(
            lab.service, lab.job(job).train_task_id, "the wrong split", user="ann", admin=True
        )
        assert (done["retracted"], done["still_registered"]) == ([job], ["kept"])
        assert self.shown(lab) == {by_name}
        later = lab.job(lab.submit(checkpoint="kept", scale=9))
        assert (later.state, later.train_task_id) == ("running", lab.job(by_name).train_task_id)

    def test_imports_stand_as_long_as_a_training_of_these_weights_does(self, lab: Lab) -> None:
        jobs = [lab.submit(replicate=replicate) for replicate in (0, 2)]
        grants = lab.grant("train")
        lab.record(*(Succeeded(grant.task_id, grant.attempt, left(lab, grant, b"equal")) for grant in grants))
        lab.finish()
        imported = lab.submit(checkpoint=self.weights_of(lab, jobs[0]), replicate=5)
        lab.finish()
        self.retract(lab, jobs[0])
        assert self.shown(lab) == {jobs[1], imported}
        self.retract(lab, jobs[1])
        assert self.shown(lab) == set()

    def test_what_is_hidden_by_its_weights_is_not_submitted_again(self, lab: Lab) -> None:
        job = lab.submit()
        lab.finish()
        lab.submit(checkpoint=self.weights_of(lab, job), replicate=5)
        lab.finish()
        training = lab.job(job).train_task_id
        done = retractions.retract_task(lab.service, training, "the wrong split", user="ann", admin=True, rerun=True)
        assert len(done["retracted"]) == 2
        [again] = done["resubmitted"]
        assert lab.job(again).recipe == "standard"

    def weights_of(self, lab: Lab, job: str) -> str:
        [row] = lab.rows(tables.trainings, task_id=lab.job(job).train_task_id)
        return str(row.checkpoint_digest)

    def from_weights(self, weights: str) -> dict[str, Any]:
        """A transfer whose examples come from the network with these weights."""
        source = {"architecture": "mlp", "recipe": {"name": "imported", "checkpoint": weights}, "replicate": 5}
        return {"type": "transfer", "attack": {"type": "fgsm", "norm": "linf", "eps": 0.1}, "source": source}

    def shown(self, lab: Lab) -> set[str]:
        return {row.job_id for row in lab.rows(results) if row.retracted_at is None}

    def test_a_newer_generation_with_the_same_weights_is_joined(self, lab: Lab) -> None:
        job = lab.submit()
        lab.finish()
        [weights] = [item["weights_sha256"] for item in page(lab)["items"]]
        self.retract(lab, job)
        again = lab.submit()
        lab.finish()
        assert lab.job(lab.submit(checkpoint=weights)).train_task_id == lab.job(again).train_task_id

    def test_the_list_says_who_retracted_which_and_shows_no_made_up_digest(self, lab: Lab) -> None:
        job = lab.submit()
        lab.submit(seed=1)
        lab.finish()
        stands, before = page(lab)["items"]
        self.retract(lab, job)
        same, marked = page(lab)["items"]
        assert same == stands
        assert (marked["retracted_by"], marked["retraction_reason"]) == ("ann", "the wrong split")
        assert marked["retracted_at"].endswith("Z")
        assert marked["task_digest"] == before["task_digest"]


class TestRegistered:
    def test_by_name_and_by_digest_it_is_one_network(self, lab: Lab) -> None:
        register(lab, "theirs")
        jobs = [lab.job(lab.submit(checkpoint=name)) for name in ("theirs", FOREIGN)]
        assert jobs[0].train_task_id == jobs[1].train_task_id
        expected = plan_job(
            JobSpec(**{**lab.BASE, "checkpoint": "theirs"}),
            DatasetRef(name="digits"),
            {"theirs": Imported(weights_sha256=FOREIGN)},
        )
        assert lab.task(jobs[0].train_task_id).digest == expected.train.digest

    def test_what_is_expected_goes_with_the_task(self, lab: Lab) -> None:
        register(lab, "theirs", expected_clean_accuracy=0.95, tolerance=0.02)
        task = lab.task(lab.job(lab.submit(checkpoint="theirs")).train_task_id)
        assert task.spec["recipe"] == {
            "name": "imported",
            "checkpoint": None,
            "weights_sha256": FOREIGN,
            "expected_clean_accuracy": 0.95,
            "tolerance": 0.02,
        }

    def test_a_digest_with_several_expectations_is_ambiguous(self, lab: Lab) -> None:
        register(lab, "one", expected_clean_accuracy=0.95, tolerance=0.01)
        register(lab, "none")
        [one, by_digest] = [lab.job(lab.submit(checkpoint=name)).train_task_id for name in ("one", FOREIGN)]
        assert one == by_digest, "who expects nothing says nothing against it"
        register(lab, "two", expected_clean_accuracy=0.9, tolerance=0.01)
        with pytest.raises(InvalidSpec, match="with different expectations, as one, two: name one of these"):
            lab.submit(checkpoint=FOREIGN)
        assert lab.job(lab.submit(checkpoint="two")).state == "queued"

    def test_of_another_network(self, lab: Lab) -> None:
        register(lab, "theirs")
        for name in ("theirs", FOREIGN):
            with pytest.raises(InvalidSpec, match="/recipe: checkpoint theirs is a mlp, not a simple_cnn"):
                lab.submit(checkpoint=name, architecture="simple_cnn")
            with pytest.raises(InvalidSpec, match="is for 10 classes of 1x8x8 images, mnist has 10 of 1x28x28"):
                lab.submit(checkpoint=name, dataset="mnist")

    @pytest.mark.parametrize(
        "more", [{"weights_sha256": FOREIGN}, {"expected_clean_accuracy": 0.5}, {"tolerance": 0.1}]
    )
    def test_a_job_says_nothing_else_of_a_checkpoint(self, lab: Lab, more: dict[str, Any]) -> None:
        register(lab, "theirs")
        with pytest.raises(
            InvalidSpec, match="/recipe: name a registered checkpoint, or weights by their SHA-256, and"
        ):
            lab.submit(recipe={"name": "imported", "checkpoint": "theirs", **more})


@pytest.mark.parametrize("other", [{"recipe": "sam"}, {"seed": 0}])
def test_a_checkpoint_stands_in_place_of_recipe_and_seed(other: dict[str, Any]) -> None:
    job: dict[str, Any] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "checkpoint": "theirs"}
    with pytest.raises(ValueError, match=f"`checkpoint` stands in place of `{next(iter(other))}`"):
        JobSpec.model_validate({**job, **other})
    short = JobSpec.model_validate(job)
    job["recipe"] = {"name": "imported", "checkpoint": job.pop("checkpoint")}
    assert digest(short) == digest(JobSpec.model_validate(job))

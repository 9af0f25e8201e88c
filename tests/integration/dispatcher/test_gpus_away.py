"""A cluster whose GPUs are away for a while: what takes one waits, and runs on no CPU meanwhile."""

from dataclasses import replace
from typing import Any

from dispatching import Scripted, dispatcher

from service.model.executor import Capacity
from service.queue.explaining import explain
from service.settings import Settings

WITH_GPU = Capacity(True, 8.0, 1.0, ({"CPU": 8.0, "GPU": 1.0},), ("n1",))
WITHOUT = replace(WITH_GPU, gpus=0.0, nodes=({"CPU": 8.0},))
HOW: dict[str, Any] = {"ray_address": "10.0.0.7:6379", "gpus_per_task": 1.0, "lookahead": 0}


def sentence(lab: Any, job: str) -> str:
    return str(explain(lab.database, Settings.model_validate(HOW), job)["sentence"])


def test_the_next_dispatcher_waits_for_them_too(lab: Any, scripted: Scripted) -> None:
    scripted.room = WITH_GPU
    dispatcher(lab, scripted, **HOW)._hold_leadership()
    scripted.room = WITHOUT
    later = dispatcher(lab, scripted, **HOW)
    job = lab.submit()
    later.tick()
    assert scripted.bundles == []
    said = sentence(lab, job)
    assert "the cluster has no GPU now, and it waits for one: no node that has one is there" in said
    assert "UNCANNY_GPUS_PER_TASK=0 uses CPUs" in said
    scripted.room = WITH_GPU
    later.tick()
    assert [bundle.needs.gpus for bundle in scripted.bundles] == [1.0]


def test_a_cluster_that_never_had_any_runs_on_its_cpus(lab: Any, scripted: Scripted) -> None:
    scripted.room = WITHOUT
    lab.submit()
    dispatcher(lab, scripted, **HOW).tick()
    assert [bundle.needs.gpus for bundle in scripted.bundles] == [0.0]


def test_a_local_ray_that_has_none_is_of_a_machine_without(lab: Any, scripted: Scripted) -> None:
    """A home that came from another machine is not to wait for that one's GPU."""
    at_home = {**HOW, "ray_address": ""}
    scripted.room = WITH_GPU
    dispatcher(lab, scripted, **at_home)._hold_leadership()
    scripted.room = WITHOUT
    lab.submit()
    dispatcher(lab, scripted, **at_home).tick()
    assert [bundle.needs.gpus for bundle in scripted.bundles] == [0.0]

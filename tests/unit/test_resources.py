"""What fits: per kind of task, on nodes that differ, with what was handed over taken off."""

from dataclasses import replace
from typing import Any

import pytest

from service.model.executor import Capacity, Grant, Needs
from service.model.resources import cluster, needs_of, of_bundle, too_large
from service.model.scheduling import Account, Waiting, choose
from service.settings import Settings

GIGABYTE = 1 << 30


def settings(lookahead: int = 0, **options: Any) -> Settings:
    return Settings.model_validate({"lookahead": lookahead, **options})


def capacity(*nodes: dict[str, float]) -> Capacity:
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    return Capacity(True, cpus, gpus, tuple({"memory": 64.0 * GIGABYTE, **node} for node in nodes))


def waiting(kind: str, *numbers: int) -> list[Waiting]:
    return [Waiting(f"{kind}-{n}", kind, f"{n}" * 64, "ann", 0, n) for n in numbers]


def chosen(queue: list[Waiting], have: Capacity, how: Settings, handed_over: list[Needs] | None = None) -> list[str]:
    """The kinds of the bundles that are handed over now."""
    decisions = choose(queue, {}, cluster(how, have, handed_over or []), 0.0)
    return [decision.task_ids[0].partition("-")[0] for decision in decisions]


class TestNeeds:
    def test_gpus_for_all_kinds_count_where_there_are_some(self) -> None:
        how = settings(gpus_per_task=0.5)
        assert needs_of(how, "train", capacity({"CPU": 8})).gpus == 0
        assert needs_of(how, "train", capacity({"CPU": 8, "GPU": 1})).gpus == 0.5

    def test_gpus_that_are_away_are_waited_for(self) -> None:
        """A GPU node that restarts does not send the queue to the CPUs of the others."""
        away = replace(capacity({"CPU": 8}), had_gpus=True)
        assert needs_of(settings(), "attack", away).gpus == 1
        assert needs_of(settings(gpus_per_task=0.0), "attack", away).gpus == 0
        assert cluster(settings(lookahead=0), away, ()).free_slots == 0
        assert set(too_large(settings(), away)) == {"train", "measure", "attack", "control"}

    def test_gpus_of_a_kind_are_asked_for_before_there_are_any(self) -> None:
        """Else no autoscaler would ever add the first one."""
        how = settings(lookahead=2, resources={"train": {"gpus": 1}})
        without = capacity({"CPU": 8})
        assert needs_of(how, "train", without).gpus == 1
        assert chosen(waiting("train", 1, 2, 3), without, how) == ["train", "train"], "the lookahead, and no more"

    def test_also_in_a_cluster_without_any_node(self) -> None:
        assert chosen(waiting("train", 1, 2, 3), Capacity(True, 0.0, 0.0), settings(lookahead=1)) == ["train"]

    def test_of_a_bundle(self) -> None:
        how = settings(resources={"attack": {"gpus": 0.25, "memory_bytes": 7, "accelerator": "A100"}})
        grants = [Grant("a", 1, "d", {"kind": kind}) for kind in ("attack", "control")]
        have = capacity({"CPU": 4, "GPU": 1})
        assert of_bundle(how, grants, have, False) == Needs(1.0, 1.0, 7, "A100")
        assert of_bundle(how, grants[:1], have, False).gpus == 0.25
        assert of_bundle(how, grants[:1], have, True).gpus == 1.0, "alone, after it ran out of a shared GPU's memory"

    def test_settings_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UNCANNY_RESOURCES", '{"train": {"gpus": 2, "custom": {"fast_disk": 1}}}')
        first = Settings()
        assert first.resources["train"].gpus == 2
        passed_on = Settings(resources=first.resources).environment()["UNCANNY_RESOURCES"]
        monkeypatch.setenv("UNCANNY_RESOURCES", passed_on)
        assert Settings().resources == first.resources

    @pytest.mark.parametrize("wrong", [{"gpus": 1.5}, {"gpu": 1}, {"cpus": -1}])
    def test_what_ray_would_not_take_is_refused_at_once(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="train"):
            settings(resources={"train": wrong})


class TestRoom:
    def test_each_kind_takes_its_own(self) -> None:
        how = settings(resources={"train": {"gpus": 1}, "attack": {"gpus": 0.25}})
        have = capacity({"CPU": 16, "GPU": 2})
        assert chosen(waiting("train", 1, 2, 3), have, how) == ["train"] * 2
        assert chosen(waiting("attack", *range(9)), have, how) == ["attack"] * 8
        mixed = waiting("train", 1) + waiting("attack", *range(2, 9))
        assert sorted(chosen(mixed, have, how)) == ["attack"] * 4 + ["train"]

    def test_what_needs_no_gpu_goes_on_beside_those_that_wait_for_one(self) -> None:
        how = settings(resources={"train": {"gpus": 1}, "measure": {"gpus": 0}})
        queue = waiting("train", 1, 2, 3) + waiting("measure", 4, 5)
        assert chosen(queue, capacity({"CPU": 3, "GPU": 1}), how) == ["train", "measure", "measure"]

    def test_memory(self) -> None:
        how = settings(resources={"train": {"memory_bytes": 30 * GIGABYTE}})
        assert chosen(waiting("train", 1, 2, 3), capacity({"CPU": 16}), how) == ["train"] * 2

    def test_a_type_of_gpu(self) -> None:
        how = settings(resources={"train": {"gpus": 1, "accelerator": "H100"}, "attack": {"gpus": 1}})
        have = capacity({"CPU": 8, "GPU": 1, "accelerator_type:H100": 1}, {"CPU": 8, "GPU": 4})
        assert chosen(waiting("train", 1, 2, 3), have, how) == ["train"]
        assert chosen(waiting("attack", 1, 2, 3), have, how) == ["attack"] * 3

    def test_what_fits_no_single_node_only_looks_ahead(self) -> None:
        how = settings(lookahead=1, resources={"train": {"cpus": 4}})
        assert chosen(waiting("train", 1, 2, 3), capacity({"CPU": 2}, {"CPU": 2}), how) == ["train"]

    def test_small_ones_do_not_keep_a_large_one_waiting_for_ever(self) -> None:
        """Three quarters of the GPU are busy, and a bundle waits for all of it: the free quarter is not given away."""
        how = settings(lookahead=1, resources={"train": {"gpus": 1}, "attack": {"gpus": 0.25}})
        quarter, whole = Needs(1.0, 0.25), Needs(1.0, 1.0)
        have = capacity({"CPU": 16, "GPU": 1})
        assert chosen(waiting("attack", 1), have, how, [quarter] * 3) == ["attack"]
        assert chosen(waiting("attack", 1), have, how, [quarter] * 3 + [whole]) == []
        assert chosen(waiting("attack", 1), have, how, [quarter] * 2 + [whole]) == []

    def test_what_no_node_is_large_enough_for_keeps_no_room_from_others(self) -> None:
        """A node was lost that had two GPUs. What waits for such a one must not take those that are left."""
        how = settings(lookahead=2, resources={"train": {"gpus": 2}, "attack": {"gpus": 1}})
        left = capacity({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1})
        waits = [Needs(1.0, 2.0)] * 2
        assert chosen(waiting("train", 1) + waiting("attack", 2, 3, 4), left, how, waits) == ["attack"] * 2
        both = chosen(waiting("train", 1) + waiting("attack", 2, 3, 4), left, how)
        assert both == ["train", *["attack"] * 3], "two in the room that there is, two look ahead"

    def test_one_that_has_a_gpu_to_itself(self) -> None:
        how = settings(gpus_per_task=0.25)
        alone = [replace(task, whole=True) for task in waiting("attack", 1, 2)]
        queue = [*alone, *waiting("attack", 3, 4, 5)]
        seen = cluster(how, capacity({"CPU": 16, "GPU": 2}), [Needs(1.0, 0.25)])
        assert [(one.share, one.whole) for one in choose(queue, {}, seen, 0.0)] == [(1.0, True)] + [(0.25, False)] * 3
        limited = {"ann": Account(max_gpus=1.5)}
        assert [one.share for one in choose(queue, limited, seen, 0.0)][:2] == [1.0, 0.25]

    def test_nothing_while_the_cluster_comes_up(self) -> None:
        assert cluster(settings(lookahead=2), Capacity(False, 8.0, 2.0), []).free_slots == 0

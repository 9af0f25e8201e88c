"""Speed beside peers and limits, interleaved in one run: `pytest tests/benchmarks --benchmark`, else left out.

A number that falls short fails nothing: it is printed as it is. `--benchmark-json PATH` appends every line to a file.
"""

import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.generated import fill
from sqlalchemy import make_url
from torch import Tensor, nn

from service.store import Database
from workers.science.architectures import build
from workers.science.attacks import AttackInput
from workers.science.attacks.pgd import pgd

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 3600
collect_ignore = ["mlflow_runs.py"]  # of an environment with MLflow


@dataclass(frozen=True)
class Line:
    """`who` did `work` in these `seconds`; `ratio` compares each round with `reference`, and is their median."""

    row: str
    work: str
    who: str
    seconds: list[float]
    reference: str
    ratio: float
    goal: str
    reached: bool | None
    note: str

    def numbers(self) -> dict[str, Any]:
        return {**vars(self), "min": min(self.seconds), "median": median(self.seconds), "max": max(self.seconds)}

    def cells(self) -> tuple[str, ...]:
        times = [f"{1000 * seconds:.1f}" for seconds in (min(self.seconds), median(self.seconds), max(self.seconds))]
        reached = {None: "", True: "reached", False: "short"}[self.reached]
        return (self.who, *times, f"{self.ratio:.2f}", self.goal, reached, self.note)


class Table:
    """What a benchmark measures, printed as soon as it is there."""

    def __init__(self, config: pytest.Config, write: Callable[[str], None]) -> None:
        self.rounds: int = config.getoption("--benchmark-rounds")
        self.path: Path | None = config.getoption("--benchmark-json")
        self.write = write

    def compare(
        self,
        row: str,
        work: str,
        calls: Mapping[str, Callable[[], object]],
        *,
        reference: str,
        goals: Mapping[str, float] | None = None,
        notes: Mapping[str, str] | None = None,
        cost: bool = False,
    ) -> None:
        """Time the calls in turn, every round from another one on, after a round that does not count.

        A ratio is the speed-up over the reference, and a goal the least one; with `cost` it is the time relative to
        the reference's, and a goal the most.
        """
        seconds: dict[str, list[float]] = {who: [] for who in calls}
        order = list(calls)
        for who in order:
            elapsed(calls[who])
        for number in range(self.rounds):
            first = number % len(order)
            for who in order[first:] + order[:first]:
                seconds[who].append(elapsed(calls[who]))
        lines = []
        for who, own in seconds.items():
            pairs = zip(own, seconds[reference], strict=True)
            ratio = median(mine / theirs if cost else theirs / mine for mine, theirs in pairs)
            goal = (goals or {}).get(who)
            said = "" if goal is None else f"{'<=' if cost else '>='} {goal:g}"
            reached = None if goal is None else (ratio <= goal if cost else ratio >= goal)
            lines.append(Line(row, work, who, own, reference, ratio, said, reached, (notes or {}).get(who, "")))
        for text in self.pretty(lines):
            self.write(text)
        self._keep(lines)

    def _keep(self, lines: list[Line]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line.numbers() | circumstances()) + "\n" for line in lines)

    def latencies(
        self,
        row: str,
        work: str,
        calls: Mapping[str, Callable[[], object]],
        *,
        goals: Mapping[str, float] | None = None,
        notes: Mapping[str, str] | None = None,
        rounds: int | None = None,
        share: float = 0.95,
    ) -> None:
        """Time the calls in turn, as `compare` does; a goal is the most that `share` of them may take, in seconds."""
        seconds: dict[str, list[float]] = {who: [] for who in calls}
        for number in range(-1, rounds or self.rounds):
            for who, call in calls.items():
                took = elapsed(call)
                if number >= 0:
                    seconds[who].append(took)
        self.tell(row, work, seconds, goals=goals, notes=notes, share=share)

    def tell(
        self,
        row: str,
        work: str,
        seconds: Mapping[str, list[float]],
        *,
        goals: Mapping[str, float] | None = None,
        notes: Mapping[str, str] | None = None,
        share: float = 0.95,
    ) -> None:
        """Print and keep what was measured elsewhere."""
        lines = []
        for who, own in seconds.items():
            reached = sorted(own)[min(len(own) - 1, int(share * len(own)))]
            goal = (goals or {}).get(who)
            name = f"p{100 * share:.0f}"
            lines.append(
                Line(
                    row, work, who, own, f"{name}, ms", 1000 * reached,
                    "" if goal is None else f"<= {1000 * goal:g}", None if goal is None else reached <= goal,
                    (notes or {}).get(who, ""),
                )
            )  # fmt: skip
        for text in self.pretty(lines, lines[0].reference):
            self.write(text)
        self._keep(lines)

    def pretty(self, lines: list[Line], figure: str | None = None) -> Iterator[str]:
        yield f"\nRow {lines[0].row}: {lines[0].work}. " + ", ".join(f"{k} {v}" for k, v in circumstances().items())
        kind = f"{'time' if '<=' in ''.join(line.goal for line in lines) else 'speed'} to {lines[0].reference}"
        cells = [
            ("", "min ms", "median ms", "max ms", figure or kind, "goal", "", ""),
            *(line.cells() for line in lines),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks and print their tables")
    parser.addoption("--benchmark-rounds", type=int, default=7, help="how often each side runs")
    parser.addoption("--benchmark-threads", type=int, default=2, help="threads of torch")
    parser.addoption("--benchmark-results", type=int, default=1_000_000, help="how many are generated (rows 9, 10)")
    parser.addoption("--benchmark-large", action="store_true", help="a million tasks on 1,000 GPUs (row 12b): hours")
    parser.addoption("--benchmark-json", metavar="PATH", type=Path, help="append the lines of the tables, as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    if config.getoption("--benchmark", default=False):
        for item in mine:
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))
    elif mine:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if HERE not in item.path.parents]


@pytest.fixture
def table(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> Table:
    def write(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    torch.set_num_threads(pytestconfig.getoption("--benchmark-threads"))
    return Table(pytestconfig, write)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory, start_postgresql: Callable[[], Any]) -> Callable[..., str]:
    """The URL of a new store, `sqlite` or `postgresql`, `migrated` or empty: durable, unlike those of other tests."""
    servers: list[Any] = []
    numbers = count()

    def make(kind: str, migrated: bool = True) -> str:
        if kind == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('store')}/uncanny.db"
        else:
            servers.extend([] if servers else [start_postgresql()])
            name = f"benchmark_{next(numbers)}"
            servers[0].psql(f"CREATE DATABASE {name}")
            made = make_url(servers[0].get_uri(name)).set(drivername="postgresql+psycopg")
            url = made.render_as_string(hide_password=False)
        if migrated:
            database = Database(url)
            database.upgrade()
            database.close()
        return url

    return make


@pytest.fixture(scope="session")
def many_results(new_store: Callable[..., str], pytestconfig: pytest.Config) -> Callable[[str], str]:
    """The URL of a store with `--benchmark-results` finished jobs, generated once for each kind."""
    urls: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in urls:
            urls[kind] = new_store(kind)
            database = Database(urls[kind])
            fill(database, pytestconfig.getoption("--benchmark-results"))
            database.close()
        return urls[kind]

    return make


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def foolbox() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names of SciPy's and torch's that it imports
        import foolbox
    return foolbox


@dataclass(frozen=True)
class Network:
    """An untrained network whose batch norms have seen the images, `x [n, 3, 32, 32]` noise in [0, 1].

    Its labels `y [n]` are what it says itself, so every image is clean-correct.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    index: Tensor

    def first(self, n: int) -> "Network":
        return Network(self.model, self.x[:n], self.y[:n], self.index[:n])

    def inputs(self) -> AttackInput:
        return AttackInput(self.x, self.y, self.index)

    def middling_eps(self) -> float:
        """A radius in linf at which about half of the images withstand, so that robust accuracies can differ."""
        low, high, eps = 1e-6, 0.1, 0.1
        for _ in range(8):
            eps = (low * high) ** 0.5
            broken = pgd(self.model, self.inputs(), eps=eps, step_size=eps / 4, steps=5).broken
            share = float(broken.double().mean())
            if 0.4 < share < 0.6:
                break
            low, high = (low, eps) if share > 0.5 else (eps, high)
        return eps


@pytest.fixture
def network() -> Callable[..., Network]:
    def make(name: str, n: int, classes: int = 10, device: torch.device | str = "cpu") -> Network:
        model = build(name, (3, 32, 32), classes, seed=0).to(device)
        x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            if norms:
                model.train()(x[:128])
            model.eval()
            y = torch.cat([model(part).argmax(1) for part in torch.split(x, 256)])
        return Network(model, x, y, torch.arange(n))

    return make


def elapsed(call: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU is done too."""
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - started


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def circumstances() -> dict[str, str]:
    """Where and when, for whoever reads the numbers."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{cpu} x{os.cpu_count()}",
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found

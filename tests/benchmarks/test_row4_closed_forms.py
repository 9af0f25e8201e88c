"""Row 4: all closed forms in the log domain from features, beside the float32 one-liner of relative sharpness (which
underflows), Hutchinson's estimate of one of them by curvlinops, and BackPACK's exact diagonal."""

import ctypes
import importlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.science.closed_forms import ClosedForms

N, M, PROBES = 10_000, 512, 100


@pytest.fixture(scope="module")
def curvlinops() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names of Torch's that it imports
        return importlib.import_module("curvlinops")


@pytest.mark.parametrize("k", [10, 100])
def test_closed_forms(table: Any, curvlinops: ModuleType, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    phi, y = torch.randn(N, M, generator=generator).relu(), torch.randint(k, (N,), generator=generator)
    head = nn.Linear(M, k)

    @torch.no_grad()
    def one_liner() -> Tensor:
        p = (phi @ head.weight.T + head.bias).softmax(1)
        return head.weight.square().sum() * phi.square().sum(1) * (p * (1 - p)).sum(1)

    def hutchinson() -> Tensor:
        operator = curvlinops.HessianLinearOperator(
            head, nn.CrossEntropyLoss(), [head.weight], [(phi, y)], check_deterministic=False
        )
        trace: Tensor = curvlinops.hutchinson_trace(operator, PROBES)
        return trace

    def ours() -> Any:
        return ClosedForms.of(phi, head.weight, head.bias)

    calls: dict[str, Callable[[], object]] = {
        "float32 one-liner": one_liner,
        "ours": ours,
        f"curvlinops Hutchinson x{PROBES}": hutchinson,
    }
    backpack = exact_diagonal(head, phi, y)
    if backpack is not None:
        calls["BackPACK diagonal"] = backpack
    forms = ours()
    naive = (one_liner().double() / forms.log_relative_sharpness.exp() - 1).abs()
    trace = float(forms.log_hessian_trace.exp().mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        notes = {
            "float32 one-liner": f"one quantity, off by {100 * float(naive.max()):.2g} % at most",
            "ours": f"six quantities and the loss; {peak_mebibytes(ours):.0f} MiB beside the features",
            f"curvlinops Hutchinson x{PROBES}": f"one mean, off by {100 * abs(float(hutchinson()) / trace - 1):.2g} %",
        }
        table.compare(
            "4",
            f"closed forms, n = {N:,}, k = {k}, m = {M}",
            calls,
            reference="float32 one-liner",
            goals={"ours": 10},
            notes=notes,
            cost=True,
        )


def test_memory_is_bounded_by_the_chunk(table: Any) -> None:
    """Ten times the samples: the same memory but for the results themselves."""
    head = nn.Linear(64, 100)
    few, many = torch.randn(20_000, 64), torch.randn(200_000, 64)
    calls = {len(phi): partial(ClosedForms.of, phi, head.weight, head.bias) for phi in (few, many)}
    peaks = {n: peak_mebibytes(call) for n, call in calls.items()}
    result = {n: n * (100 + 9) * 8 / 2**20 for n in peaks}
    table.compare(
        "4",
        "memory, k = 100, m = 64",
        {f"n = {n:,}": call for n, call in calls.items()},
        reference=f"n = {len(few):,}",
        notes={f"n = {n:,}": f"{peaks[n]:.0f} MiB, of which {result[n]:.0f} are the result" for n in peaks},
        cost=True,
    )


def exact_diagonal(head: nn.Linear, phi: Tensor, y: Tensor) -> Callable[[], object] | None:
    """The diagonal of the Hessian by BackPACK, where it is installed; its sum is the trace."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from backpack import backpack, extend
            from backpack.extensions import DiagHessian
    except ImportError:
        return None
    layer, loss = nn.Linear(head.in_features, head.out_features), nn.CrossEntropyLoss()
    layer.load_state_dict(head.state_dict())
    extend(layer), extend(loss)

    def run() -> Tensor:
        layer.zero_grad()
        with backpack(DiagHessian()):
            loss(layer(phi), y).backward()
        diagonal: Tensor = vars(layer.weight)["diag_h"]
        return diagonal.sum()

    return run


def peak_mebibytes(call: Callable[[], object]) -> float:
    """The most memory that the process took during the call beyond what it had before; nan where Linux cannot say."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        call()  # what it needs once and keeps
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = _kibibytes(status, "VmRSS")
        call()
        return (_kibibytes(status, "VmHWM") - before) / 1024
    except (AttributeError, OSError):
        return float("nan")


def _kibibytes(status: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])

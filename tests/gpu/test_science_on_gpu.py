"""What a GPU must do with the science: the same numbers twice, the CPU's where they are equal, and no waiting.

`GPU_TESTS_DEVICE=cpu` runs the same on a CPU, where most of it is easier to pass: so that it is known to run.
"""

import copy
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers import provenance
from workers.science import seeding
from workers.science.architectures import ARCHITECTURES, build
from workers.science.attacks import AttackInput, prepare
from workers.science.attacks.norms import NORMS
from workers.science.attacks.pgd import pgd
from workers.science.augmentation import Augmentation, augment
from workers.science.closed_forms import LOG_MEASURES, ClosedForms
from workers.science.controls import Geometry, run_controls
from workers.science.datasets import DATASETS, ImageData, to_unit
from workers.science.evaluation import AttackReport, evaluate_attack
from workers.science.heads import features_and_logits, linear_head, scale_head
from workers.science.recipes import RECIPES
from workers.science.recipes.common import BatchNoise
from workers.science.seeding import deterministic
from workers.science.sharpness import MEASURES, MeasureInput
from workers.science.training import TrainReport, train
from workers.science.weights import load_state, save_state

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
CPU = torch.device("cpu")
SCALES = (1, 5, 10, 100)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]
only_on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="says something of a GPU alone")
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


@cache
def digits() -> ImageData:
    return DATASETS["digits"].read(Path())


@cache
def photographs() -> ImageData:
    """As large as CIFAR's images, and nothing to be learned from."""
    numbers = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 32, 32), generator=numbers).to(torch.uint8)
    y = torch.arange(40) % 10
    return ImageData("noise", x[:24], y[:24], x[24:], y[24:], tuple("abcdefghij"))


@cache
def honest() -> nn.Module:
    """About 99 % right on digits, on the CPU, in eval mode; not to be changed."""
    model = build("simple_cnn", digits().shape, 10, 0)
    train(model, digits(), epochs=6)
    return model


def on(device: torch.device, scale: float = 1.0) -> nn.Module:
    return scale_head(copy.deepcopy(honest()).to(device), scale)


def learned(architecture: str, data: ImageData, **how: Any) -> tuple[nn.Module, TrainReport]:
    model = build(architecture, data.shape, data.n_classes, 0)
    return model, train(model, data, device=DEVICE, seed=3, **how)


def attacked(device: torch.device, scale: float = 1.0, **params: Any) -> AttackReport:
    """PGD-linf on 500 test images."""
    params = {"eps": 0.1, "step_size": 0.025, "steps": 10, **params}
    numerics = {
        name: params.pop(name)
        for name in ("precision", "channels_last", "fold_batch_norm", "compile")
        if name in params
    }
    x, y = digits().test_x, digits().test_y
    with deterministic(device):
        return evaluate_attack(
            on(device, scale), x, y, torch.arange(len(y)), attack="pgd", params=params, scale=scale, device=device,
            **numerics,
        )  # fmt: skip


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def few_steps(recipe: str) -> dict[str, float]:
    return {"steps": 2} if RECIPES[recipe].attacks else {}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises RuntimeError."""
    wait("error")
    try:
        yield
    finally:
        wait("default")


def wait(mode: str) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


# --- training ---


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_twice_it_is_bit_equal(architecture: str, recipe: str) -> None:
    how: dict[str, Any] = {"recipe": recipe, "recipe_params": few_steps(recipe), "epochs": 2, "batch_size": 8}
    how |= {"augmentation": Augmentation(4, flip=True, rotation_degrees=15), "lr": 0.01}
    (one, first), (other, second) = (learned(architecture, photographs(), **how) for _ in range(2))
    assert equal(one, other)
    assert first.clean_loss == second.clean_loss
    assert [epoch.loss for epoch in first.epochs] == [epoch.loss for epoch in second.epochs]


NUMERICS: dict[str, dict[str, Any]] = {
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "both": {"precision": "bf16", "channels_last": True},
}


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("recipe", ["standard", "adversarial", "sam"])
@pytest.mark.parametrize("architecture", ["simple_cnn", "resnet18", "vit_tiny"])
def test_trained_twice_with_other_numerics_it_is_bit_equal(architecture: str, recipe: str, numerics: str) -> None:
    how: dict[str, Any] = {"recipe": recipe, "recipe_params": few_steps(recipe), "epochs": 2, "batch_size": 8}
    how |= {"augmentation": Augmentation(4, flip=True), "lr": 0.01, **NUMERICS[numerics]}
    (one, first), (other, second) = (learned(architecture, photographs(), **how) for _ in range(2))
    assert equal(one, other)
    assert [epoch.loss for epoch in first.epochs] == [epoch.loss for epoch in second.epochs]


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resumed_it_is_bit_equal(recipe: str, precision: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"recipe": recipe, "recipe_params": few_steps(recipe), "precision": precision}
    how |= {"epochs": 3, "train_samples": 300, "batch_size": 64, "augmentation": Augmentation(1, rotation_degrees=10)}
    states: list[Any] = []
    whole, _ = learned("simple_cnn", digits(), **how, on_epoch=lambda _report, state: states.append(state()))
    save_state(tmp_path / "state", states[0])
    resumed, _ = learned("simple_cnn", digits(), **how, resume=load_state(tmp_path / "state"))
    assert equal(whole, resumed)


@compiler
def test_compiled_with_a_smaller_last_batch_it_is_the_same_training_and_resumes_bit_equal() -> None:
    how: dict[str, Any] = {"epochs": 3, "train_samples": 150, "batch_size": 64}
    states: list[Any] = []
    plain, _ = learned("simple_cnn", digits(), **how)
    whole, _ = learned(
        "simple_cnn", digits(), **how, compile=True, on_epoch=lambda _report, state: states.append(state())
    )
    resumed, _ = learned("simple_cnn", digits(), **how, compile=True, resume=states[0])
    assert equal(whole, resumed)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value, rtol=1e-2, atol=1e-3)


@compiler
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    "options",
    [NUMERICS["both"], {"recipe": "adversarial", "recipe_params": {"steps": 2, "eps": 0.02, "step_size": 0.01}}],
    ids=["bf16 channels_last", "adversarial"],
)
def test_compiled_with_other_options_it_learns_as_well_and_resumes_bit_equal(
    options: dict[str, Any], cuda_graphs: bool
) -> None:
    """Attacked in eval mode and trained in train mode, a network is compiled for both. Replayed as a graph, no step
    reads what a later one has overwritten."""
    how: dict[str, Any] = {"epochs": 4, "train_samples": 600, "batch_size": 64, **options}
    fast = {"compile": True, "cuda_graphs": cuda_graphs}
    states: list[Any] = []
    _, plain = learned("simple_cnn", digits(), **how)
    whole, compiled = learned(
        "simple_cnn", digits(), **how, **fast, on_epoch=lambda _report, state: states.append(state())
    )
    resumed, _ = learned("simple_cnn", digits(), **how, **fast, resume=states[0])
    assert equal(whole, resumed)
    assert compiled.epochs[0].loss == pytest.approx(plain.epochs[0].loss, rel=0.05)
    assert compiled.clean_accuracy == pytest.approx(plain.clean_accuracy, abs=0.05)
    assert plain.clean_accuracy > 0.8


@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"precision": "bf16"}, {"channels_last": True}])
def test_other_numerics_learn_as_well(options: dict[str, Any]) -> None:
    _, report = learned("simple_cnn", digits(), epochs=6, **options)
    assert report.clean_accuracy > 0.95
    assert report.flags["matmul_precision"] == ("tf32" if options.get("precision") == "tf32" else "ieee")


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_of_a_training_waits_for_the_gpu(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first third of the forward passes to the last."""
    monkeypatch.setattr("workers.science.training_reports.STEP_REPORT_SECONDS", math.inf)
    how: dict[str, Any] = {"recipe": recipe, "recipe_params": few_steps(recipe), "epochs": 1, "train_samples": 512}
    how |= {"batch_size": 64, "augmentation": Augmentation(1, flip=True, rotation_degrees=10)}
    passes = 0

    def trained(from_pass: float, to_pass: float) -> None:
        def count(module: nn.Module, _args: Any) -> None:
            nonlocal passes
            passes += 1
            if passes in (from_pass, to_pass):
                wait("error" if passes == from_pass else "default")

        model = build("simple_cnn", digits().shape, 10, 0)
        model.register_forward_pre_hook(count)
        try:
            train(model, digits().to(DEVICE), device=DEVICE, **how)
        finally:
            wait("default")

    trained(math.inf, math.inf)
    steps = passes - math.ceil(len(digits().test_y) / 256)  # without those of the evaluation
    passes = 0
    trained(steps // 3, steps)
    assert passes > steps > 6


# --- random numbers ---


def test_a_recipe_sees_the_batches_and_the_noise_that_it_sees_on_the_cpu() -> None:
    x, index = photographs().train_x, torch.arange(24)
    how = Augmentation(4, flip=True)
    there, here = (augment(x.to(device), how, seeding.generator(1)) for device in (DEVICE, CPU))
    assert torch.equal(there.cpu(), here)
    turned = Augmentation(rotation_degrees=15)
    there, here = (augment(x.to(device), turned, seeding.generator(1)) for device in (DEVICE, CPU))
    assert float((there.cpu() == here).double().mean()) > 0.999  # a pixel between two may fall to the other
    for draw in ("uniform", "normal"):
        there, here = (getattr(BatchNoise(1, 2, index), draw)(to_unit(x.to(device))) for device in (DEVICE, CPU))
        assert there.device.type == DEVICE.type
        assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_starts_where_it_starts_on_the_cpu(norm: str) -> None:
    x, index = to_unit(photographs().train_x), torch.arange(24)
    there, here = (
        NORMS[norm].random_start(x.to(device), 0.5, seed=1, index=index, restart=2) for device in (DEVICE, CPU)
    )
    tolerance = 0.0 if norm == "linf" else 1e-6  # the l2 norm is a sum, which has another order on a GPU
    torch.testing.assert_close(there.cpu(), here, rtol=tolerance, atol=0.0)


# --- attacks ---


@pytest.mark.parametrize("scale", SCALES)
def test_outcomes_are_those_of_the_cpu(scale: float) -> None:
    there, here = (attacked(device, scale) for device in (DEVICE, CPU))
    n = len(there.bits["robust"])
    for name in ("clean_correct", "robust", "robust_any_iterate"):
        assert int((there.bits[name] != here.bits[name]).sum()) <= max(1, 0.002 * n), name
    assert there.numbers["zero_gradient_fraction"] == pytest.approx(here.numbers["zero_gradient_fraction"], abs=0.03)


@pytest.mark.parametrize("loss", ["rescaled_cross_entropy", "margin", "dlr"])
def test_losses_without_a_scale_break_the_same_images_at_every_scale(loss: str) -> None:
    at_1 = attacked(DEVICE, loss=loss).bits["robust"]
    for scale in (0.25, *SCALES[1:]):
        robust = attacked(DEVICE, scale, loss=loss).bits["robust"]
        assert int((robust != at_1).sum()) <= max(1, 0.001 * len(at_1)), scale


def test_attacked_twice_it_is_bit_equal() -> None:
    params: dict[str, Any] = {"random_start": True, "restarts": 2, "norm": "l2", "eps": 0.5}
    one, other = (attacked(DEVICE, **params) for _ in range(2))
    assert one.numbers == other.numbers
    assert all(torch.equal(one.bits[name], other.bits[name]) for name in one.bits)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"fold_batch_norm": True},
        {"channels_last": True},
        pytest.param({"compile": True}, marks=compiler),
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("architecture", ["simple_cnn", "resnet18"])
def test_prepared_networks_climb_as_far(architecture: str, options: dict[str, Any]) -> None:
    if architecture == "simple_cnn":
        plain, fast = (
            attacked(DEVICE).numbers["robust_accuracy"],
            attacked(DEVICE, **options).numbers["robust_accuracy"],
        )
        assert fast == pytest.approx(plain, abs=0.05)
    model = build(architecture, (3, 32, 32), 10, 0).to(DEVICE).eval()
    with deterministic(DEVICE):
        prepare(model, probe=to_unit(photographs().test_x.to(DEVICE)), **options)  # raises beyond its tolerance


@pytest.mark.parametrize("loss", ["cross_entropy", "stable_cross_entropy", "rescaled_cross_entropy", "margin", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_no_step_of_pgd_waits_for_the_gpu(norm: str, loss: str) -> None:
    model, x, y = on(DEVICE), to_unit(digits().test_x[:64]).to(DEVICE), digits().test_y[:64].to(DEVICE)
    seen = []

    def after_step(step: int, steps: int) -> None:
        seen.append(step)
        if step in (1, steps):
            wait("error" if step == 1 else "default")

    def observer(t: int, _x: Tensor, _phi: Tensor, _logits: Tensor) -> None:
        """Has the features taken, too."""

    inputs = AttackInput(x, y, torch.arange(64), observer=observer, on_progress=after_step)
    with deterministic(DEVICE):
        try:
            pgd(model, inputs, norm=norm, loss=loss, steps=6)
        finally:
            wait("default")
    assert seen == [1, 2, 3, 4, 5, 6]


# --- measures ---


def test_closed_forms_are_those_of_the_cpu() -> None:
    for scale in (1, 10, 1000):
        model = on(CPU, scale)
        head = linear_head(model)
        with torch.no_grad():
            phi = features_and_logits(model, to_unit(digits().test_x))[0]
        assert head.bias is not None
        there, here = (
            ClosedForms.of(*(of.detach().to(device) for of in (phi, head.weight, head.bias)))
            for device in (DEVICE, CPU)
        )
        for name in (*LOG_MEASURES, "log_softmax_trace", "log_rest", "log_feature_norm"):
            torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure(name: str) -> None:
    """The same numbers by name as on the CPU, all finite; and those that a rounding does not move, in value."""
    cheap = {"hessian_trace_network": {"probes": 4}, "pac_bayes_flatness": {"draws": 2, "bisections": 3}}
    found = []
    for device in (DEVICE, CPU):
        data = digits().to(device)
        x, of_test = to_unit(data.train_x[:48]), to_unit(data.test_x[:48])
        inputs = MeasureInput(x, data.train_y[:48], of_test, data.test_y[:48], batch_size=32)
        with deterministic(device):
            found.append(MEASURES[name](on(device), inputs, **cheap.get(name, {})).numbers)
    there, here = found
    assert there.keys() == here.keys()
    assert {key for key, of in there.items() if of is None} == {key for key, of in here.items() if of is None}
    assert all(of is None or math.isfinite(of) for of in there.values())
    if name in ("closed_forms", "lipschitz", "fisher_rao", "input_gradient_norm", "hessian_trace_network"):
        for key, value in here.items():
            if value is not None and not key.endswith(("_iterations", "_converged")):
                assert there[key] == pytest.approx(value, rel=0.01, abs=0.01), key


def test_the_panel_finds_nothing_in_an_honest_network() -> None:
    x, y = digits().test_x[:64], digits().test_y[:64]
    with deterministic(DEVICE):
        found = run_controls(on(DEVICE), x, y, torch.arange(64), Geometry("linf", 0.1, 0.025, 10), device=DEVICE)
    checks = {name: of for name, of in found.numbers.items() if name != "n"}
    assert set(checks.values()) == {0}, checks


# --- the process ---


def test_flags_are_put_back() -> None:
    before = seeding._flags()
    with deterministic(DEVICE, tf32=True):
        assert seeding.flags()["convolution_precision"] == seeding.flags()["matmul_precision"] == "tf32"
        with deterministic(DEVICE):
            assert seeding.flags()["convolution_precision"] == seeding.flags()["matmul_precision"] == "ieee"
        assert seeding.flags()["matmul_precision"] == "tf32"
    assert seeding._flags() == before


def test_float32_is_float32_and_tf32_is_not() -> None:
    """Sums of 4096 products, beside float64; TF32 keeps 10 bits of each factor."""
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.rand(256, 4096, generator=numbers).to(DEVICE) for _ in range(2))
    exact = a.double() @ b.double().T
    errors = {}
    for tf32 in (False, True):
        with deterministic(DEVICE, tf32=tf32):
            errors[tf32] = float(((a @ b.T).double() / exact - 1).abs().max())
    assert errors[False] < 1e-5
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert errors[True] > 1e-5


@only_on_a_gpu
def test_cublas_has_the_workspace_that_makes_it_deterministic() -> None:
    a = torch.rand(64, 64, device=DEVICE)
    with deterministic(DEVICE):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
        assert torch.equal(a @ a, a @ a)


@only_on_a_gpu
def test_no_waiting_is_noticed_where_there_is_some() -> None:
    """Else the tests that nothing waits could not fail."""
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


@only_on_a_gpu
def test_the_provenance_names_the_gpu() -> None:
    noted = provenance.gpu(torch.device("cuda", 0))
    assert noted["gpu_uuid"].startswith("GPU-")
    assert noted["gpu_memory_bytes"] > 1 << 30
    assert float(noted["gpu_capability"]) >= 7.5
    assert noted["gpu_sm_count"] > 0
    made = provenance.Meter(torch.device("cuda", 0), 0.5).read()
    assert 0 < made["device_free_bytes"] <= noted["gpu_memory_bytes"]
    assert made["device_share"] == 0.5

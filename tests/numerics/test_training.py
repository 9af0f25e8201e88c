import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from workers.science import seeding
from workers.science.architectures import build
from workers.science.attacks import ATTACKS, AttackInput
from workers.science.augmentation import Augmentation, augment, default_augmentation
from workers.science.datasets import DATASETS, ImageData, sample_indices, training_indices
from workers.science.errors import Diverged, NonFinite, ScienceError, WrongShape, WrongState
from workers.science.evaluation import evaluate_clean
from workers.science.recipes import RECIPES
from workers.science.recipes.common import BatchNoise
from workers.science.seeding import generator
from workers.science.training import EpochReport, StepReport, TrainReport, train
from workers.science.weights import load_state, load_weights, save_state, save_weights, weights_to_bytes


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return DATASETS["digits"].read(Path())


@pytest.fixture(scope="module")
def synthetic() -> ImageData:
    return DATASETS["synthetic"].read(Path())


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(("architecture", "epochs"), [("simple_cnn", 6), ("mlp", 25)])
def test_digits_are_learned(architecture: str, epochs: int, digits: ImageData) -> None:
    model = build(architecture, digits.shape, digits.n_classes, 0)
    report = train(model, digits, epochs=epochs)
    assert report.clean_accuracy > 0.95
    assert report.top5_accuracy is not None
    assert report.top5_accuracy >= 0.99
    assert [epoch.epoch for epoch in report.epochs] == list(range(1, epochs + 1))
    assert report.epochs[-1].loss < report.epochs[0].loss / 4
    assert report.epochs[-1].accuracy > 0.95
    assert report.seconds == pytest.approx(sum(epoch.seconds for epoch in report.epochs))
    assert not model.training
    with torch.no_grad():
        logits = model(digits.test_x.float() / 255)
    assert float((logits.argmax(1) == digits.test_y).float().mean()) == pytest.approx(report.clean_accuracy)
    assert float(nn.CrossEntropyLoss()(logits, digits.test_y)) == pytest.approx(report.clean_loss, rel=1e-5)


def test_synthetic_is_learned(synthetic: ImageData) -> None:
    report = train(build("simple_cnn", synthetic.shape, 4, 0), synthetic, epochs=8)
    assert report.clean_accuracy > 0.9
    assert report.top5_accuracy is None


class Killed(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES)
def test_interrupted_and_resumed_equals_uninterrupted(recipe: str, digits: ImageData, tmp_path: Path) -> None:
    """Killed in the middle of the third epoch: that epoch is lost and done again, and the end is bit-equal."""
    how: dict[str, Any] = {"recipe": recipe, "epochs": 3, "train_samples": 300, "batch_size": 64, "seed": 7}
    how["augmentation"] = Augmentation(1, flip=True, rotation_degrees=10)
    if "steps" in RECIPES[recipe].params:
        how["recipe_params"] = {"steps": 2}
    whole = build("simple_cnn", digits.shape, 10, 1)
    expected = train(whole, digits, **how)

    path = tmp_path / "state.pt"
    killed = build("simple_cnn", digits.shape, 10, 1)
    killed.register_forward_pre_hook(lambda *_: die_after(2))
    done: list[Any] = []

    def die_after(epochs: int) -> None:
        if len(done) == epochs and len(calls) == 2:
            raise Killed
        if len(done) == epochs:
            calls.append(1)

    calls: list[int] = []

    def keep(report: EpochReport, state: Any) -> None:
        save_state(path, state())
        done.append(report)

    with pytest.raises(Killed):
        train(killed, digits, **how, on_epoch=keep)
    assert not equal(whole, killed)

    resumed = build("simple_cnn", digits.shape, 10, 99)  # its weights come from the state
    report = train(resumed, digits, **how, resume=load_state(path))
    assert equal(whole, resumed)
    assert report.clean_loss == expected.clean_loss
    assert [e.loss for e in report.epochs] == [e.loss for e in expected.epochs]


def test_a_state_is_a_copy_and_belongs_to_its_training(digits: ImageData) -> None:
    how: dict[str, Any] = {"epochs": 2, "train_samples": 100}
    states = []
    model = build("mlp", digits.shape, 10, 0)
    train(model, digits, **how, on_epoch=lambda _report, state: states.append(state()))
    again = build("mlp", digits.shape, 10, 0)
    train(again, digits, **how, resume=states[0])
    assert equal(model, again)
    with pytest.raises(WrongState, match="lr differ"):
        train(again, digits, **how, lr=0.2, resume=states[0])
    of_another = {**states[0], "model": {"weight": torch.zeros(1)}}
    of_a_gpu = {**states[0], "generator": torch.zeros(16, dtype=torch.uint8)}
    for unfit in (of_another, of_a_gpu, {}, {**states[0], "optimizer": {}}, {**states[0], "reports": [{}]}):
        with pytest.raises(WrongState, match="does not fit this training"):
            train(build("mlp", digits.shape, 10, 0), digits, **how, resume=unfit)
    finished = train(build("mlp", digits.shape, 10, 0), digits, **how, resume=states[1])
    assert len(finished.epochs) == 2


def test_equal_seeds_are_bit_equal_and_others_are_not(synthetic: ImageData) -> None:
    models = []
    for seed in (3, 3, 4):
        models.append(build("simple_cnn", synthetic.shape, 4, 0))
        train(models[-1], synthetic, epochs=1, seed=seed, augmentation=Augmentation(2, flip=True))
    assert equal(models[0], models[1])
    assert not equal(models[0], models[2])


@pytest.mark.parametrize("recipe", ["standard", "trades"])
def test_no_number_is_made_of_uninitialised_memory(
    recipe: str, synthetic: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same training where torch fills such memory with NaN, as it does by default in deterministic mode."""
    filled: list[bool] = []
    memory: Any = torch.utils.deterministic  # torch does not declare `fill_uninitialized_memory`
    models = [build("simple_cnn", synthetic.shape, 4, 0) for _ in range(2)]
    how: dict[str, Any] = {"recipe": recipe, "recipe_params": {"steps": 1} if recipe == "trades" else {}}
    for model in models:
        model.register_forward_pre_hook(lambda *_: filled.append(memory.fill_uninitialized_memory))
    train(models[0], synthetic, **how, epochs=1, train_samples=256)
    assert set(filled) == {False}
    filled.clear()
    set_flags = seeding._set_flags
    monkeypatch.setattr(seeding, "_set_flags", lambda flags: set_flags(flags._replace(fill=True)))
    train(models[1], synthetic, **how, epochs=1, train_samples=256)
    assert set(filled) == {True}
    assert equal(*models)


def test_standard_is_torch_sgd_with_a_cosine_schedule(digits: ImageData) -> None:
    """The loop by hand, with torch's own scheduler, on one batch per epoch (so that the order does not matter much)."""
    model, by_hand = (build("mlp", digits.shape, 10, 2).double() for _ in range(2))
    double = {"epochs": 4, "train_samples": 50, "batch_size": 50}
    model.register_forward_pre_hook(lambda _m, args: (args[0].double(),))
    report = train(model, digits, **double)  # type: ignore[arg-type]
    chosen = sample_indices(1297, 50)
    x, y = digits.train_x[chosen].double() / 255, digits.train_y[chosen]
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for epoch in range(4):
        assert report.epochs[epoch].lr == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(by_hand(x).float(), y))
        optimizer.step()
        schedule.step()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_constant_schedule_and_epoch_means(digits: ImageData) -> None:
    report = train(
        build("mlp", digits.shape, 10, 0), digits, epochs=2, lr=1e-12, schedule="constant", train_samples=257
    )
    assert [epoch.lr for epoch in report.epochs] == [1e-12, 1e-12]
    # weights stand still: both epochs see the same images but for the one left over, in another order
    assert report.epochs[0].loss == pytest.approx(report.epochs[1].loss, rel=1e-2)
    assert (report.train_samples, report.dropped_samples) == (256, 1)


@pytest.mark.parametrize("architecture", ["mlp", "simple_cnn"])
def test_divergence_is_an_error(architecture: str, digits: ImageData) -> None:
    with pytest.raises(Diverged, match=r"epoch \d+ of 20.*last finite loss was .*smaller learning rate"):
        train(build(architecture, digits.shape, 10, 0), digits, epochs=20, lr=1e4, weight_decay=1.0)


def test_divergence_in_the_last_step_is_seen_in_the_weights(digits: ImageData) -> None:
    with pytest.raises(Diverged, match=r"weights became NaN"):
        train(build("mlp", digits.shape, 10, 0), digits, epochs=1, lr=1e38, weight_decay=100.0, train_samples=64)


def test_divergence_in_the_last_step_is_seen_in_the_logits(digits: ImageData) -> None:
    """Its weights are finite, and what they give is not."""
    how: dict[str, Any] = {"train_samples": 128, "batch_size": 128, "lr": 1e8}
    sentence = (
        r"for \d+ of 500 test images .* logits after epoch 1 of 1; the last finite loss was 2\.\d+: choose a smaller"
    )
    with pytest.raises(Diverged, match=sentence):
        train(build("simple_cnn", digits.shape, 10, 0), digits, epochs=1, **how)


def test_step_reports(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.science.training_reports.STEP_REPORT_SECONDS", 0.0)
    seen: list[StepReport] = []
    train(build("mlp", digits.shape, 10, 0), digits, epochs=2, on_step=seen.append)
    assert [(r.epoch, r.step, r.steps) for r in seen] == [(e, s, 11) for e in (1, 2) for s in range(1, 12)]
    assert all(r.images_per_second > 0 and r.loss > 0 for r in seen)


def test_what_on_step_raises_ends_the_training(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.science.training_reports.STEP_REPORT_SECONDS", 0.0)

    def stop(_report: StepReport) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(build("mlp", digits.shape, 10, 0), digits, epochs=1, on_step=stop)
    assert not torch.are_deterministic_algorithms_enabled()


def test_unknown_names_and_empty_batches(digits: ImageData) -> None:
    model = build("mlp", digits.shape, 10, 0)
    with pytest.raises(KeyError):
        train(model, digits, recipe="none")
    with pytest.raises(TypeError, match="no parameter rho"):
        train(model, digits, recipe_params={"rho": 1})
    with pytest.raises(ScienceError, match="at least 2"):
        train(model, digits, batch_size=1)
    with pytest.raises(WrongShape, match="1298 images to train on and 0 held out were asked for of 1297"):
        train(model, digits, train_samples=1298)


def test_bf16_and_channels_last(digits: ImageData) -> None:
    report: TrainReport = train(
        build("simple_cnn", digits.shape, 10, 0), digits, epochs=3, precision="bf16", channels_last=True
    )
    assert report.clean_accuracy > 0.8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_is_the_same_training(digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where attacks in eval mode alternate with steps in train mode. A small network: it compiles in seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in this process, so that none is left behind
    how: dict[str, Any] = {"recipe": "adversarial", "recipe_params": {"steps": 2}, "epochs": 2, "batch_size": 64}
    plain, compiled = (build("mlp", digits.shape, 10, 0) for _ in range(2))
    for model, compile in ((plain, False), (compiled, True)):
        train(model, digits, **how, train_samples=128, lr=0.05, compile=compile)
    assert any(tmp_path.iterdir())  # what the compiler left
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert not any(module.training for module in compiled.modules())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_training_with_a_smaller_last_batch_is_resumed_bit_equal(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed one compiles anew, as a new process does."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    how: dict[str, Any] = {"epochs": 3, "train_samples": 150, "batch_size": 64, "compile": True, "seed": 1}
    states: list[Any] = []
    whole, resumed = (build("mlp", digits.shape, 10, 0) for _ in range(2))
    torch._dynamo.reset()
    train(whole, digits, **how, on_epoch=lambda _report, state: states.append(state()))
    torch._dynamo.reset()
    train(resumed, digits, **how, resume=states[0])
    assert equal(whole, resumed)
    counted = torch._dynamo.utils.counters["frames"]
    assert counted["ok"] == counted["total"] > 0  # nothing fell back


def test_tf32_is_for_the_training_and_not_for_what_is_reported_of_it(digits: ImageData) -> None:
    model, seen = build("mlp", digits.shape, 10, 0), []

    def note(module: nn.Module, _x: Any) -> None:
        seen.append((module.training, torch.backends.cuda.matmul.fp32_precision))

    model.register_forward_pre_hook(note)
    train(model, digits, epochs=1, train_samples=256, precision="tf32")
    assert set(seen) == {(True, "tf32"), (False, "ieee")}


def test_evaluation_refuses_nan(digits: ImageData) -> None:
    model = build("mlp", digits.shape, 10, 0)
    with torch.no_grad():
        next(iter(model.parameters())).fill_(torch.nan)
    with pytest.raises(NonFinite):
        evaluate_clean(model, digits.test_x, digits.test_y)


# --- streams ---


def batches_of(recipe: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []

    def noting(*args: Any) -> torch.Tensor:
        seen.append(augment(*args))
        return seen[-1]

    monkeypatch.setattr("workers.science.training.augment", noting)
    params = {"steps": 1} if RECIPES[recipe].attacks else {}
    train(
        build("mlp", digits.shape, 10, 0), digits, recipe=recipe, recipe_params=params, epochs=2, train_samples=100,
        batch_size=40, augmentation=Augmentation(1, flip=True, rotation_degrees=10), seed=3,
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"standard"}))
def test_with_equal_seeds_every_recipe_sees_the_same_batches(
    recipe: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, plain = (batches_of(name, digits, monkeypatch) for name in (recipe, "standard"))
    assert len(mine) == len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@pytest.mark.parametrize("architecture", ["mlp", "simple_cnn"])
def test_adversarial_training_in_a_ball_of_radius_0_is_standard_bit_for_bit(
    architecture: str, digits: ImageData
) -> None:
    models = []
    for recipe, params in (("standard", {}), ("adversarial", {"eps": 0.0, "steps": 2})):
        models.append(build(architecture, digits.shape, 10, 0))
        how: dict[str, Any] = {"epochs": 2, "train_samples": 200, "batch_size": 64, "seed": 5}
        how["augmentation"] = Augmentation(1, flip=True)
        train(models[-1], digits, recipe=recipe, recipe_params=params, **how)
    assert equal(*models)


def test_noise_of_an_image_is_its_own_and_that_of_its_epoch() -> None:
    like, index = torch.zeros(3, 1, 4, 4), torch.tensor([5, 9, 2])
    whole = BatchNoise(1, 0, index).uniform(like)
    assert torch.equal(whole[1:2], BatchNoise(1, 0, index[1:2]).uniform(like[:1]))
    for other in (BatchNoise(2, 0, index), BatchNoise(1, 1, index), BatchNoise(1, 0, index, stream="held out")):
        assert not bool((other.uniform(like) == whole).any())
    assert BatchNoise(1, 0, index).normal(like).std() == pytest.approx(1.0, abs=0.3)


# --- the best epoch ---

OVERFITTING: dict[str, Any] = {
    "recipe": "adversarial", "recipe_params": {"eps": 0.15, "step_size": 0.05, "steps": 4}, "epochs": 12, "lr": 0.3,
    "schedule": "constant", "train_samples": 120, "batch_size": 16, "keep": "best", "held_out": 150, "seed": 1,
    "weight_decay": 0.0,
}  # fmt: skip
RECIPES_THAT_ATTACK = {"adversarial": OVERFITTING, "trades": {**OVERFITTING, "recipe": "trades", "lr": 0.1}}


def test_recipes_that_attack() -> None:
    assert RECIPES_THAT_ATTACK.keys() == {name for name, recipe in RECIPES.items() if recipe.attacks}


@pytest.mark.parametrize("recipe", RECIPES_THAT_ATTACK)
def test_the_epoch_most_robust_on_held_out_training_images_is_kept(
    recipe: str, digits: ImageData, tmp_path: Path
) -> None:
    how = RECIPES_THAT_ATTACK[recipe]
    model, weights, states = build("mlp", digits.shape, 10, 1), [], []

    def note(report: EpochReport, state: Any) -> None:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        save_state(tmp_path / str(report.epoch), state())
        states.append(report.held_out_robust_accuracy)

    done = train(model, digits, **how, on_epoch=note)
    curve = [epoch.held_out_robust_accuracy for epoch in done.epochs]
    assert curve == states
    assert done.kept_epoch == 1 + curve.index(max(value for value in curve if value is not None))
    assert 1 < done.kept_epoch < 12, "or this test says nothing"
    assert done.kept == done.epochs[done.kept_epoch - 1]
    assert all(torch.equal(model.state_dict()[name], of) for name, of in weights[done.kept_epoch - 1].items())

    # The number, by the attack of the benchmark: another start, so about the same.
    held_out = training_indices(1297, 120, 150)[1]
    x, y = digits.train_x[held_out].float() / 255, digits.train_y[held_out]
    inputs = AttackInput(x, y, torch.from_numpy(held_out))
    output = ATTACKS["pgd"](model, inputs, random_start=True, **how["recipe_params"])
    assert float((~output.broken).double().mean()) == pytest.approx(done.kept.held_out_robust_accuracy, abs=0.03)

    for epoch in (1, done.kept_epoch, 12):  # the best so far is in the state
        again = build("mlp", digits.shape, 10, 9)
        resumed = train(again, digits, **how, resume=load_state(tmp_path / str(epoch)))
        assert equal(model, again)
        assert (resumed.kept_epoch, resumed.clean_loss) == (done.kept_epoch, done.clean_loss)
        assert [e.held_out_robust_accuracy for e in resumed.epochs] == curve


@pytest.mark.parametrize("recipe", RECIPES_THAT_ATTACK)
def test_without_held_out_images_the_last_epoch_is_kept_and_the_same_batches_are_seen(
    recipe: str, digits: ImageData
) -> None:
    how = RECIPES_THAT_ATTACK[recipe]
    last = {**how, "keep": "last", "held_out": 0}
    one, other = (build("mlp", digits.shape, 10, 1) for _ in range(2))
    best, done = train(one, digits, **how), train(other, digits, **last)
    assert done.kept_epoch == 12
    assert done.kept.held_out_robust_accuracy is None
    assert [epoch.loss for epoch in best.epochs] == [epoch.loss for epoch in done.epochs]
    for changed in ({"held_out": 0}, {"keep": "last"}, {"recipe": "standard", "recipe_params": {}}):
        with pytest.raises(ValueError, match="held out"):
            train(other, digits, **{**how, **changed})
    with pytest.raises(WrongShape, match="1200 images to train on and 150 held out were asked for of 1297"):
        train(other, digits, **{**how, "train_samples": 1200})


# --- augmentation ---


def test_crop_and_flip_are_among_the_possible_ones() -> None:
    x = torch.randint(1, 256, (64, 2, 5, 6), generator=generator(0)).to(torch.uint8)
    out = augment(x, Augmentation(2, flip=True), generator(1))
    assert out.shape == x.shape
    assert out.dtype == torch.uint8
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    kinds = set()
    for before, after in zip(padded, out, strict=True):
        found = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(after.flip(2) if flip else after, before[:, top : top + 5, left : left + 6])
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 30
    assert {flip for _, _, flip in kinds} == {False, True}


def test_crops_flips_and_angles_are_drawn_on_the_cpu_wherever_the_images_are() -> None:
    """The images of the second draw are nowhere: the numbers of another device would be none of this generator's."""
    x, how = torch.zeros(16, 3, 8, 8, dtype=torch.uint8), Augmentation(2, flip=True, rotation_degrees=15)
    here, there = generator(1), generator(1)
    augment(x, how, here)
    away = augment(x.to("meta"), how, there)
    assert away.device.type == "meta"
    assert torch.equal(here.get_state(), there.get_state())
    assert not torch.equal(here.get_state(), generator(1).get_state())


def test_rotation_turns_about_the_centre() -> None:
    x = torch.randint(0, 256, (3, 1, 8, 8), generator=generator(0)).to(torch.uint8)
    assert torch.equal(augment(x, Augmentation(rotation_degrees=1e-4), generator(0)), x)

    turned = augment(x, Augmentation(rotation_degrees=15), generator(0))
    assert turned.shape == x.shape
    assert not torch.equal(turned, x)
    dot = torch.zeros(200, 1, 33, 33, dtype=torch.uint8)
    dot[:, :, 15:18, 28:31] = 255  # 13 pixels right of the centre
    where = augment(dot, Augmentation(rotation_degrees=15), generator(2)).float()
    rows = (where.sum((1, 3)) * torch.arange(33)).sum(1) / where.sum((1, 2, 3))
    columns = (where.sum((1, 2)) * torch.arange(33)).sum(1) / where.sum((1, 2, 3))
    angle = torch.rad2deg(torch.atan2(rows - 16, columns - 16))
    assert angle.abs().max() < 17
    assert angle.min() < -12
    assert angle.max() > 12
    assert torch.allclose(torch.hypot(rows - 16, columns - 16), torch.tensor(13.0), atol=0.7)


def test_no_augmentation_draws_nothing() -> None:
    numbers = generator(0)
    before = numbers.get_state()
    x = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    assert augment(x, Augmentation(), numbers) is x
    assert torch.equal(before, numbers.get_state())


def test_defaults_suit_the_data() -> None:
    assert default_augmentation("cifar100") == Augmentation(4, True, 15.0)
    assert default_augmentation("digits") == default_augmentation("npz:ours") == Augmentation()
    assert not default_augmentation("svhn").flip


# --- weights ---


def test_weights_round_trip(tmp_path: Path) -> None:
    one, other = build("simple_cnn", (1, 8, 8), 3, 0), build("simple_cnn", (1, 8, 8), 3, 1)
    save_weights(tmp_path / "w.safetensors", one)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    load_weights(other, tmp_path / "w.safetensors")
    assert equal(one, other)
    assert weights_to_bytes(one) == weights_to_bytes(other) == (tmp_path / "w.safetensors").read_bytes()


def test_weights_that_do_not_fit_are_refused() -> None:
    model = build("mlp", (1, 8, 8), 3, 0)
    good = weights_to_bytes(model)
    changed = load(good)
    name = "1.weight"
    cases = {
        "another network": weights_to_bytes(build("simple_cnn", (1, 8, 8), 3, 0)),
        r"5.bias is .* \(4,\), the network has .* \(3,\)": weights_to_bytes(build("mlp", (1, 8, 8), 4, 0)),
        "float16": save({**changed, name: changed[name].half()}),
        "not safetensors": b"nothing",
    }
    for sentence, content in cases.items():
        with pytest.raises(WrongShape, match=sentence):
            load_weights(model, content)
    poisoned = changed[name].clone()
    poisoned[0, 0] = torch.inf
    with pytest.raises(NonFinite, match=name):
        load_weights(model, save({**changed, name: poisoned}))
    assert weights_to_bytes(model) == good
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(NonFinite):
        weights_to_bytes(model)


def test_a_state_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    for content in (b"", b"PK\x03\x04garbage", b"cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(content)
        with pytest.raises(WrongShape, match="start"):
            load_state(path)
    torch.save([1], path)
    with pytest.raises(WrongShape):
        load_state(path)

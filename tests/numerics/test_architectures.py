import pytest
import torch
from torch import nn
from torch.nn import functional

from workers.science.architectures import ARCHITECTURES, build, wide_resnet
from workers.science.architectures.vgg11_bn import PoolTo2x2
from workers.science.errors import WrongShape
from workers.science.heads import features_and_logits, linear_head

CIFAR = (3, 32, 32)

PARAMETERS = {
    "simple_cnn": 864 + 64 + 18_432 + 128 + 36_864 + 128 + 256 * 128 + 128 + 1_290,
    "mlp": 3_072 * 256 + 256 + 256 * 128 + 128 + 1_290,
    "resnet18": 11_173_962,  # the CIFAR ResNet-18 of the literature
    "resnet20": 269_722,  # with shortcuts of option A; 0.27 M in the paper
    "wide_resnet28_4": 5_849_050,
    "densenet121": 7_978_856 - 1_000 * 1_025 + 10 * 1_025,  # torchvision's published count, with another head
    "densenet121_cifar": 7_978_856 - 990 * 1_025 - 64 * 3 * (49 - 9),
    "vgg11_bn": 9_225_984 + 2_048 * 256 + 256 + 256 * 256 + 256 + 2_570,
    "vit_tiny": 5_717_416 - 990 * 193 - (768 - 48) * 192 - (197 - 65) * 192,  # DeiT-Ti, patch 4 at 32x32
    "resnet50d": 25_576_264 - 990 * 2_049,
    "attention_resnet50d": 25_576_350 - 990 * 2_049,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert sum(p.numel() for p in build(name, CIFAR, 10, 0).parameters()) == PARAMETERS[name]


def test_wide_resnet_of_width_10_has_the_published_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_resnet, "WIDEN", 10)
    assert sum(p.numel() for p in build("wide_resnet28_4", CIFAR, 10, 0).parameters()) == 36_479_194


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_ends_in_its_linear_head(name: str) -> None:
    model = build(name, CIFAR, 7, 3).eval()
    x = torch.rand(2, *CIFAR, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        phi, logits = features_and_logits(model, x)
        head = linear_head(model)
        assert phi.shape == (2, ARCHITECTURES[name].features)
        assert logits.shape == (2, 7)
        assert torch.equal(head(phi), logits)
        assert torch.equal(model(x), logits)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_network_takes_grey_images_of_its_smallest_size(name: str) -> None:
    architecture = ARCHITECTURES[name]
    side = architecture.min_side
    assert build(name, (1, side, side), 5, 0).eval()(torch.zeros(2, 1, side, side)).shape == (2, 5)


@pytest.mark.parametrize("name", ["simple_cnn", "mlp", "resnet20", "wide_resnet28_4"])
def test_small_networks_take_uneven_images(name: str) -> None:
    assert build(name, (2, 13, 30), 4, 0)(torch.zeros(3, 2, 13, 30)).shape == (3, 4)


@pytest.mark.parametrize("name", ["simple_cnn", "vit_tiny"])
def test_the_seed_fixes_the_weights_and_nothing_else(name: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (build(name, CIFAR, 10, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("vgg11_bn", (1, 28, 28), 10),
        ("densenet121", (1, 28, 28), 10),
        ("simple_cnn", (1, 7, 9), 10),
        ("vit_tiny", (3, 30, 32), 10),
        ("mlp", (3, 32, 32), 1),
        ("mlp", (0, 32, 32), 2),
    ],
)
def test_impossible_images_are_refused(name: str, shape: tuple[int, int, int], classes: int) -> None:
    with pytest.raises(WrongShape, match=name):
        build(name, shape, classes, 0)


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_pool_to_2x2_is_adaptive_average_pooling(side: int) -> None:
    x = torch.rand(2, 3, side, side + 1, dtype=torch.float64)
    assert torch.allclose(PoolTo2x2()(x), functional.adaptive_avg_pool2d(x, 2), rtol=1e-12)


def test_vit_has_second_derivatives() -> None:
    model = build("vit_tiny", (1, 8, 8), 3, 0)
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x), torch.tensor([1])), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


def test_no_network_has_dropout_or_normalises_its_input() -> None:
    for name in ARCHITECTURES:
        model = build(name, CIFAR, 10, 0)
        assert all(m.p == 0 for m in model.modules() if isinstance(m, nn.Dropout))

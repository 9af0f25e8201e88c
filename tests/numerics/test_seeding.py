import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from workers.science import seeding
from workers.science.seeding import normal_per_example, uniform_per_example

DRAWS = [uniform_per_example, normal_per_example]


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_of_an_example_do_not_depend_on_the_batch(draw) -> None:  # type: ignore[no-untyped-def]
    index = torch.tensor([5, 900_000, 0, 17])
    whole = draw(3, index, 1, (3, 4, 4))
    assert whole.shape == (4, 3, 4, 4)
    assert whole.dtype == torch.float32
    assert torch.equal(whole[1:3], draw(3, index[1:3], 1, (3, 4, 4)))
    assert torch.equal(whole.flip(0), draw(3, index.flip(0), 1, (3, 4, 4)))
    assert torch.equal(whole, draw(3, [5, 900_000, 0, 17], 1, (3, 4, 4)))


@pytest.mark.parametrize("draw", DRAWS)
def test_seed_index_restart_and_stream_each_give_other_numbers(draw) -> None:  # type: ignore[no-untyped-def]
    draws = [
        draw(0, [0], 0, (50,)),
        draw(1, [0], 0, (50,)),
        draw(0, [1], 0, (50,)),
        draw(0, [0], 1, (50,)),
        draw(0, [0], 0, (50,), stream="other"),
    ]
    for i, one in enumerate(draws):
        assert all(not torch.isclose(one, other, atol=1e-6).any() for other in draws[:i])


def test_the_distributions_are_right() -> None:
    uniform = uniform_per_example(0, range(400), 0, (500,)).double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.003
    assert abs(uniform.var() - 1 / 12) < 0.001
    normal = normal_per_example(0, range(400), 0, (501,)).double()
    assert abs(normal.mean()) < 0.01
    assert abs(normal.var() - 1) < 0.02
    assert abs((normal**4).mean() - 3) < 0.1
    assert abs((normal.abs() < 1.96).double().mean() - 0.95) < 0.003


def test_golden_numbers() -> None:
    """Stored results rest on these numbers: a change of NumPy that moves them must be seen."""
    raw = seeding.example_bits(0, 1, 2).random_raw(2)
    assert [int(v) for v in raw] == GOLDEN_RAW
    assert uniform_per_example(0, [1], 2, (2,)).tolist() == [[(v >> 40) / 2**24 for v in GOLDEN_RAW]]


def by_a_generator_each(draw: str, seed: int, index: list[int], restart: int, size: int, stream: str) -> torch.Tensor:
    """The formula of before: a bit generator per example, and the arithmetic on all examples at once."""
    half = (size + 1) // 2
    count = size if draw == "uniform" else 2 * half
    bits = np.stack([seeding.example_bits(seed, i, restart, stream).random_raw(count) for i in index])
    if draw == "uniform":
        return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24))
    unit = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(unit[:, :half])), 2 * np.pi * unit[:, half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, :size]
    return torch.from_numpy(normal.astype(np.float32))


@pytest.mark.parametrize("size", [1, 2, 7, 192, 3072])
@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_one_generator_that_is_moved_draws_what_one_per_example_drew(draw: str, size: int) -> None:
    index = [0, 3, 49_999, 2**40, 3]
    for seed, restart, stream in ((0, 0, "start"), (2**63 - 1, 7, "recipe")):
        new = {"uniform": uniform_per_example, "normal": normal_per_example}[draw]
        assert torch.equal(
            new(seed, index, restart, (size,), stream), by_a_generator_each(draw, seed, index, restart, size, stream)
        )


GOLDEN_RAW = [15_773_348_394_662_272_833, 12_548_639_256_956_580_589]


def test_deterministic_sets_the_flags_and_puts_them_back() -> None:
    cudnn: Any = torch.backends.cudnn  # torch does not declare `conv`
    memory: Any = torch.utils.deterministic  # or `fill_uninitialized_memory`

    def flags() -> tuple[str, bool, bool]:
        return (
            cudnn.conv.fp32_precision,
            torch.are_deterministic_algorithms_enabled(),
            memory.fill_uninitialized_memory,
        )

    before, inside = flags(), []

    def fail() -> None:
        with seeding.deterministic("cpu"):
            inside.append(flags())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [("ieee", True, False)]
    assert flags() == before == (before[0], False, True)
    with seeding.deterministic("cpu", tf32=True):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_flags_are_put_back_when_the_last_of_several_threads_leaves() -> None:
    first, second = seeding.deterministic("cpu"), seeding.deterministic("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_that_initialise_at_once_draw_their_own_numbers() -> None:
    """The random state is the process's: a thread that seeds it while another draws would give that one its numbers."""

    def drawn(seed: int) -> list[float]:
        with seeding.seeded_initialisation(seed):
            numbers = []
            for _ in range(20):
                numbers.append(float(torch.rand(())))
                time.sleep(0.001)
            return numbers

    alone = [drawn(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn, range(4))) == alone


def test_seeded_initialisation_leaves_the_process_alone() -> None:
    before = torch.get_rng_state()
    with seeding.seeded_initialisation(5):
        one = torch.rand(3)
    assert torch.equal(before, torch.get_rng_state())
    with seeding.seeded_initialisation(5):
        assert torch.equal(one, torch.rand(3))

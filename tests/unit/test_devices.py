"""What errors say about a device, how much of its memory a worker takes, and whether it computes."""

import errno
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers import devices
from workers.devices import DeviceUnfit, has_kernels, memory_fraction, ran_out_of_memory

CPU = torch.device("cpu")
GIGABYTE = 1 << 30

# As they are raised by torch 2.15 and the libraries under it.
OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    torch.OutOfMemoryError("Allocation was preemptively rejected because it would exceed per_process_memory_fraction"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("[cudnn_frontend] Error: No valid execution plans built."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("CUDA ran out of memory outside PyTorch's allocator."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        'NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/'
        'CUDACachingAllocator.cpp":1090, please report a bug to PyTorch.'
    ),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    MemoryError(),
]
OF_THE_DEVICE = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
]
OF_THE_TASK = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation"),
    ValueError("out of memory of mine"),
    KeyError("CUDA error"),
]


@pytest.mark.parametrize("error", OF_MEMORY, ids=lambda error: str(error)[:40])
def test_memory_that_ran_out_has_many_names(error: Exception) -> None:
    assert ran_out_of_memory(error)


@pytest.mark.parametrize("error", OF_THE_DEVICE, ids=lambda error: str(error)[:40])
def test_an_error_of_the_device_is_not_about_memory(error: Exception) -> None:
    assert not ran_out_of_memory(error)


@pytest.mark.parametrize("error", OF_THE_TASK, ids=lambda error: str(error)[:40])
def test_an_error_of_the_task_is_not_about_memory(error: Exception) -> None:
    assert not ran_out_of_memory(error)


def test_what_this_machine_says_when_its_memory_is_too_small() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    assert ran_out_of_memory(raised.value)


class TestProbe:
    def test_a_device_that_computes_passes(self) -> None:
        devices.probe(CPU)
        assert devices.computes(CPU)

    def test_one_that_computes_something_else_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right, calls = devices._small_step, []

        def wrong_first(device: torch.device) -> torch.Tensor:
            calls.append(device)
            return right(device) + (1.0 if len(calls) == 1 else 0.0)

        monkeypatch.setattr(devices, "_small_step", wrong_first)
        with pytest.raises(DeviceUnfit, match="wrongly"):
            devices.probe(CPU)

    def test_one_without_a_kernel_says_what_the_driver_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_kernel(_: torch.device) -> torch.Tensor:
            raise torch.AcceleratorError("CUDA error: no kernel image is available\nCUDA kernel errors might be")

        monkeypatch.setattr(devices, "_small_step", no_kernel)
        with pytest.raises(
            DeviceUnfit, match=r"cuda:3 cannot run a small convolution: .*no kernel image is available$"
        ):
            devices.probe(torch.device("cuda:3"))
        assert not devices.computes(torch.device("cuda:3"))

    @pytest.mark.parametrize(
        "error", [one for one in OF_MEMORY if not isinstance(one, OSError)], ids=lambda error: str(error)[:40]
    )
    def test_a_full_one_still_computes_and_gets_no_first_bundle(
        self, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        def full(device: torch.device) -> torch.Tensor:
            raise error

        monkeypatch.setattr(devices, "_small_step", full)
        assert devices.computes(torch.device("cuda:3"))
        with pytest.raises(DeviceUnfit, match="cannot run a small convolution"):
            devices.probe(torch.device("cuda:3"))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there_is_unfit(self) -> None:
        assert not devices.computes(torch.device("cuda:0"))


class TestKernels:
    """What a build of torch is for, beside what torch itself warns of."""

    def test_the_rule_is_torchs_own(self) -> None:
        gpus = [75, 80, 86, 89, 90, 100, 103, 120, 121]  # those that torch calls by one name alone
        for code in (75, 80, 86, 90, 100, 120):
            ours = [has_kernels(f"{gpu // 10}.{gpu % 10}", [f"sm_{code}"]) for gpu in gpus]
            assert ours == [torch.cuda._code_compatible_with_device(gpu, code) for gpu in gpus], code

    def test_one_of_many_is_enough(self) -> None:
        wheel = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
        assert [gpu for gpu in ("6.1", "7.0", "7.5", "8.9", "11.0", "12.1") if has_kernels(gpu, wheel)] == [
            "7.5",
            "8.9",
            "12.1",
        ]
        assert has_kernels("9.0", ["sm_90a"])

    def test_what_the_driver_compiles_is_for_all_later_ones(self) -> None:
        assert [has_kernels(gpu, ["compute_80"]) for gpu in ("7.5", "8.0", "13.0")] == [False, True, True]
        assert not has_kernels("8.0", [])

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_where_torch_can_use_no_gpu_it_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert devices.all_described() == ([], ""), "there is none"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML counts those that CUDA does not start on
        described, trouble = devices.all_described()
        assert described == []
        assert trouble.startswith("RuntimeError: Found no NVIDIA driver"), trouble


class TestDescribed:
    """What is said of a GPU to who looks for what is wrong with it."""

    @pytest.fixture
    def described(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None, Exception | None, int], Any]:
        """What is said of one that raises these, when it is asked for its memory and when it computes."""
        of = SimpleNamespace(name="H100", uuid="1b2c", major=9, minor=0, total_memory=80 * GIGABYTE)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: of)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])

        def says(asked: Exception | None, computing: Exception | None, free: int) -> tuple[int, str]:
            def memory(_: torch.device) -> tuple[int, int]:
                if asked is not None:
                    raise asked
                return free, 80 * GIGABYTE

            def step(device: torch.device) -> torch.Tensor:
                if computing is not None:
                    raise computing
                return torch.zeros(3)

            monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
            monkeypatch.setattr(devices, "_small_step", step)
            found = devices.described(torch.device("cuda:0"))
            assert (found["name"], found["total_bytes"], found["fits"]) == ("H100", 80 * GIGABYTE, True)
            return found["free_bytes"], found["trouble"]

        return says

    def test_a_full_one_is_in_no_trouble_but_has_nothing_free(self, described: Callable[..., Any]) -> None:
        full = torch.AcceleratorError("CUDA error: out of memory")
        no_engine = RuntimeError("GET was unable to find an engine to execute this computation")
        assert described(None, None, 79 * GIGABYTE) == (79 * GIGABYTE, "")
        assert described(full, None, 0) == (0, "")
        assert described(None, full, 1 << 20) == (1 << 20, "")
        assert described(None, no_engine, 1 << 20) == (1 << 20, "")

    def test_with_memory_left_the_same_words_are_trouble(self, described: Callable[..., Any]) -> None:
        free, trouble = described(None, RuntimeError("unable to find an engine to execute this computation"), GIGABYTE)
        assert (free, "unable to find an engine" in trouble) == (GIGABYTE, True)

    def test_one_without_kernels_is_in_trouble(self, described: Callable[..., Any]) -> None:
        no_kernel = torch.AcceleratorError("CUDA error: no kernel image is available")
        assert "no kernel image" in described(None, no_kernel, 1 << 20)[1]
        assert "no kernel image" in described(no_kernel, None, 0)[1]


class TestMemory:
    def test_shares_leave_room_for_the_contexts_of_all(self) -> None:
        total = 24 * GIGABYTE
        for share in (0.5, 0.25, 0.125):
            tenants = round(1 / share)
            allocated = memory_fraction(share, total) * total
            assert tenants * (allocated + devices.CONTEXT_BYTES) <= total
        assert memory_fraction(1.0, total) == memory_fraction(2.0, total) == 1.0

    def test_a_share_that_is_hardly_a_context_still_gets_some(self) -> None:
        assert memory_fraction(0.05, 8 * GIGABYTE) == 0.025

    def test_what_is_kept_is_a_part_of_the_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_total_bytes", lambda _: 24 * GIGABYTE)
        gpu = torch.device("cuda:0")
        assert devices.cache_bytes(gpu, 1.0, 4 * GIGABYTE) == 4 * GIGABYTE
        assert devices.cache_bytes(gpu, 0.25, 4 * GIGABYTE) < 0.25 * 0.25 * 24 * GIGABYTE
        assert devices.cache_bytes(CPU, 1.0, 4 * GIGABYTE) == 4 * GIGABYTE


@pytest.mark.parametrize(
    ("total", "share", "images"),
    [
        (8, 1.0, 256), (24, 1.0, 256), (40, 1.0, 512), (48, 1.0, 768), (80, 1.0, 1024), (141, 1.0, 1024),
        (80, 0.5, 512), (80, 0.25, 256), (141, 0.125, 256),
    ],
)  # fmt: skip
def test_images_at_a_time_follow_the_memory_that_a_process_may_use(
    monkeypatch: pytest.MonkeyPatch, total: int, share: float, images: int
) -> None:
    monkeypatch.setattr(devices, "_total_bytes", lambda _: total * GIGABYTE)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: pytest.fail("what is free changes from run to run"))
    assert devices.batch_images(torch.device("cuda:0"), share) == images
    assert devices.batch_images(CPU, share) == 256


class TestCompiling:
    """What `torch.compile` needs of a machine."""

    CPLUSPLUS, C, HEADERS = "C++ compiler (g++)", "C compiler (gcc)", devices.PYTHON_HEADERS

    @pytest.fixture
    def programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Puts programs on a path that has no others. Python has its headers."""
        monkeypatch.setenv("PATH", str(tmp_path))
        for name in ("CC", "CXX"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "Python.h").touch()
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})

        def put(*names: str) -> None:
            for name in names:
                (tmp_path / name).touch(0o755)

        return put

    def test_a_cpu_needs_a_compiler_for_cplusplus(self, programs: Callable[..., None]) -> None:
        programs("gcc", "clang", *([] if sys.platform == "darwin" else ["clang++"]))  # which torch does not look for
        assert devices.lacks_for_compile("cpu") == [self.CPLUSPLUS]
        programs("g++", "clang++")
        assert devices.lacks_for_compile("cpu") == []

    @pytest.mark.parametrize("name", ["gcc", "clang"])
    def test_a_gpu_needs_one_for_c_too(self, programs: Callable[..., None], name: str) -> None:
        assert devices.lacks_for_compile("cuda") == [self.CPLUSPLUS, self.C]
        programs("g++", "clang++")
        assert devices.lacks_for_compile("cuda") == [self.C]
        programs(name)
        assert devices.lacks_for_compile("cuda") == []

    def test_the_ones_that_the_environment_names_are_the_only_ones(
        self, programs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        programs("g++", "clang++", "gcc")
        monkeypatch.setenv("CC", "mine")
        monkeypatch.setenv("CXX", "mine -O1")
        assert devices.lacks_for_compile("cuda") == [self.CPLUSPLUS, self.C]
        programs("mine")
        assert devices.lacks_for_compile("cuda") == []

    def test_a_gpu_needs_pythons_headers(self, programs: Callable[..., None], tmp_path: Path) -> None:
        programs("g++", "clang++", "gcc")
        (tmp_path / "Python.h").unlink()
        assert devices.lacks_for_compile("cuda") == [self.HEADERS]
        assert devices.lacks_for_compile("cpu") == []

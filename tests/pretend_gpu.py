"""A GPU that is none: its tensors compute on the CPU, and whatever would make the host wait for it is noted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
DEVICE = torch.device("meta")
"""Its tensors say that they are on `meta`, where torch has no numbers: none can be read unnoticed."""
READ = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")
"""Operations that give the host a number, or a tensor whose size is one."""


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Torch refuses it of a tensor that is not its own."""
        return self.cpu().tolist()

    @classmethod  # torch declares its own as a function without a class
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} of a tensor on the pretended GPU, outside of it")


class PretendGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, `DEVICE` computes. `waits` counts by operation what the host would have waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_leaves([args, kwargs]) if isinstance(value, OnGpu)]
        device = kwargs.get("device") or (DEVICE if given else CPU)
        if _waits(func.overloadpacket.__name__, args, kwargs, device):
            self.waits[func.overloadpacket.__name__] += 1
        if "device" in kwargs:
            kwargs["device"] = CPU
        made = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        in_place = {id(value.held): value for value in given}
        return tree_map(lambda value: in_place.get(id(value), _on(device, value)), made)


def _waits(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> bool:
    if name in READ:
        return isinstance(args[0], OnGpu)
    if name in ("index", "index_put", "index_put_"):
        return any(isinstance(value, OnGpu) and value.dtype == torch.bool for value in args[1])
    if name in ("_to_copy", "copy_"):
        source, to = (args[0], device) if name == "_to_copy" else (args[1], args[0].device)
        if isinstance(source, OnGpu):
            return to != DEVICE
        return to == DEVICE and not (kwargs.get("non_blocking") or args[2:] == (True,))
    return False


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def _on(device: torch.device, value: Any) -> Any:
    return OnGpu(value) if isinstance(value, Tensor) and device == DEVICE else value

"""Which tensor of a file is which of a network: by a key map, without a common prefix, out of several copies."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from workers.science.errors import Misshapen, WrongShape, WrongTensors, listed

PREFIXES = ("module.", "model.", "_orig_mod.", "net.")  # of DataParallel, Lightning, torch.compile and other wrappers
COUNTERS = ("num_batches_tracked", "n_averaged")  # of a batch norm and of an average; no network computes with them
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Matching:
    """`names` maps the file's names to the network's; `stripped_prefix` was in front of all of them."""

    names: dict[str, str]
    stripped_prefix: str | None


def match(in_file: Mapping[str, Shape], own: Mapping[str, Shape], keys: Mapping[str, str]) -> Matching:
    """The tensors of a file (`in_file`, shapes by name) as those of a network (`own`).

    `keys` maps prefixes of the file's names to the network's (the longest that fits). Then `PREFIXES` that all names
    begin with are left out. In a file with several copies of the network, a key `{PREFIX: ""}` chooses one.
    Raises `WrongTensors` with all that is missing, unknown or has another shape, and with the prefixes of copies.
    """
    needed = {name for name in own if not name.endswith(COUNTERS)}
    copies = _copies(in_file.keys(), needed)
    if len(copies) > 1:
        chosen = _chosen(copies, keys)
        left_out = {copy + name for copy in copies if copy != chosen for name in own}
        in_file = {name: shape for name, shape in in_file.items() if name not in left_out}
    renamed = {name: _renamed(name, keys) for name in in_file if name not in COUNTERS}
    prefix = _common_prefix(renamed.values(), needed)
    renamed = {name: new.removeprefix(prefix) for name, new in renamed.items()}
    if twice := sorted(name for name, count in Counter(renamed.values()).items() if count > 1):
        raise WrongShape(f"two tensors of the file become {listed(twice)}: check the key map")
    _require_all(in_file, renamed, own, needed, [copy for copy in copies if copy and copy not in keys])
    return Matching(renamed, prefix or None)


def _require_all(
    in_file: Mapping[str, Shape],
    renamed: Mapping[str, str],
    own: Mapping[str, Shape],
    needed: set[str],
    elsewhere: list[str],
) -> None:
    missing = sorted(needed.difference(renamed.values()))
    unknown = sorted(name for name, new in renamed.items() if new not in own)
    misshapen = [
        Misshapen(new, str(in_file[name]), str(own[new]))
        for name, new in sorted(renamed.items())
        if new in own and in_file[name] != own[new]
    ]
    if missing or unknown or misshapen:
        raise WrongTensors(missing, unknown, misshapen, elsewhere if missing else [])


def _chosen(copies: list[str], keys: Mapping[str, str]) -> str:
    """The prefix of the copy that the key map names. Raises `WrongTensors` if it names none, or several."""
    chosen = [copy for copy in copies if keys.get(copy) == ""]
    if len(chosen) != 1:
        raise WrongTensors([], [], [], copies)
    return chosen[0]


def _copies(names: Collection[str], needed: set[str]) -> list[str]:
    """The prefixes under which a file has all tensors of the network."""
    present, probe = set(names), max(needed, key=len)
    prefixes = sorted(name.removesuffix(probe) for name in present if name.endswith(probe))
    return [
        prefix
        for prefix in prefixes
        if (not prefix or prefix.endswith(".")) and all(prefix + name in present for name in needed)
    ]


def _common_prefix(names: Collection[str], needed: set[str]) -> str:
    """The `PREFIXES`, one after the other, that all names begin with, unless the network's own names do."""
    prefix = ""
    while not needed <= {name.removeprefix(prefix) for name in names}:
        more = next((p for p in PREFIXES if all(name.startswith(prefix + p) for name in names)), None)
        if more is None or not names:
            break
        prefix += more
    return prefix


def _renamed(name: str, keys: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in keys if name.startswith(prefix)), key=len, default=None)
    return name if prefix is None else keys[prefix] + name.removeprefix(prefix)

"""The version of each kind and type of task: bumped by hand if a default changes or a number gets another meaning.

A bump changes the digest of that type of task alone, so nothing else is computed again. A comment beside the version
says what changed. A queued task of an older version is planned again (`service/queue/replanning.py`), a succeeded one
stays.
"""

from collections.abc import Mapping
from types import MappingProxyType

from service.model.json import JsonMapping
from service.model.task_kinds import method_of

VERSIONS: Mapping[str, int] = MappingProxyType(
    {
        # 2: the noise of the recipe is a stream of its own, by seed, epoch and image.
        "train/adversarial": 2,
        "train/trades": 2,
        # 2: exact for confident networks, whose loss and gradient underflowed before; the head is in float64.
        "measure/sam_sharpness": 2,
        "measure/asam_sharpness": 2,
        "measure/adaptive_average": 2,
        "measure/adaptive_worst": 2,
        "measure/top_eigenvalue_network": 2,
        "measure/fisher_rao": 2,
        "measure/input_gradient_norm": 2,
        "measure/input_curvature": 2,
        # 2: every layer has probes of its own, and the trace is the sum over layers.
        "measure/hessian_trace_network": 2,
        # 2: sizes of Jacobians from 1e-37 to 1e37; its start does not depend on the batch.
        "measure/lipschitz": 2,
        # 2: images without features are attacked like the others.
        "measure/detector": 2,
        # 2: a NaN logit under noise counts as wrong.
        "measure/pac_bayes_flatness": 2,
    }
)
"""By `kind/type`, as in `measure/sam_sharpness` or `attack/square`; a type that is not here has version 1."""

LATER: JsonMapping = MappingProxyType({"order": "permutation"})
"""Fields that older stored specs do not have, with the value that these specs stand for."""


def version_of(kind: str, name: str = "") -> int:
    """The version of a kind of task (`train`, `measure`, `attack`, `control`): of its recipe, measure or attack `name`.

    >>> version_of("measure", "closed_forms")
    1
    """
    return VERSIONS.get(f"{kind}/{name}" if name else kind, 1)


def version_of_spec(spec: JsonMapping) -> int:
    """The version that a task of this stored spec would have if it were planned now."""
    if spec["kind"] == "attack":
        return version_of_attack(spec["attack"])
    return version_of(spec["kind"], method_of(spec))


def version_of_attack(attack: JsonMapping) -> int:
    """A transfer's numbers change with its own version and with that of the attack that makes its examples."""
    own = version_of("attack", attack["type"])
    return own if "attack" not in attack else own + version_of_attack(attack["attack"]) - 1

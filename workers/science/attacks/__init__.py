"""Every attack by name. An entry is a function that fills `base.Attack`, in a file of its own."""

from collections.abc import Callable

from workers.science.attacks.apgd import apgd
from workers.science.attacks.autoattack import autoattack
from workers.science.attacks.base import Attack, AttackInput, AttackOutput, Observer, OnProgress
from workers.science.attacks.cw import cw
from workers.science.attacks.fgsm import fgsm
from workers.science.attacks.noise import noise
from workers.science.attacks.pgd import pgd
from workers.science.attacks.prepare import prepare
from workers.science.attacks.square import square
from workers.science.attacks.transfer import transfer

# `service/specs/attacks.py` has the names and parameters: `tests/contract/test_catalog.py` compares them.
ATTACKS: dict[str, Callable[..., AttackOutput]] = {
    "pgd": pgd,
    "fgsm": fgsm,
    "apgd": apgd,
    "square": square,
    "autoattack": autoattack,
    "cw": cw,
    "noise": noise,
    "transfer": transfer,
}

WITH_TRAJECTORY = frozenset({"pgd", "fgsm", "apgd", "cw", "noise"})
"""The attacks that an observer can follow; the others raise `ValueError` if there is one."""

__all__ = ["ATTACKS", "WITH_TRAJECTORY", "Attack", "AttackInput", "AttackOutput", "Observer", "OnProgress", "prepare"]

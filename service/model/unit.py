"""What statistics count: trained networks, or the attack seeds of one of them. A module that clients import cheaply."""

from typing import Literal

Unit = Literal["network", "attack_seed"]
UNITS: dict[Unit, str] = {"network": "networks", "attack_seed": "attack_seeds"}

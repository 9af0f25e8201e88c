"""The units that statistics count: trained networks, or attack seeds of one network. Cheap to import, for clients."""

from typing import Literal

Unit = Literal["network", "attack_seed"]
UNITS: dict[Unit, str] = {"network": "networks", "attack_seed": "attack_seeds"}

"""The roles of users, and the scopes of their tokens."""

from collections.abc import Mapping
from typing import Literal, get_args

Role = Literal["reader", "researcher", "admin"]
Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""Each scope includes the ones before it."""
ROLES: Mapping[str, Scope] = {"reader": "read", "researcher": "submit", "admin": "admin"}
"""The widest scope that any token of a user of that role has."""

"""JSON as Python reads it."""

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""An object of a stored document, a request or an answer. Any: the version that wrote it decides on its values."""
JsonMapping = Mapping[str, Any]
"""The same, if it is only read."""

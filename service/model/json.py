"""JSON as Python reads it."""

from collections.abc import Mapping
from typing import Any

JsonObject = dict[str, Any]
"""An object of a stored document, a request or an answer. Any: its values are those of whichever version wrote it."""
JsonMapping = Mapping[str, Any]
"""The same, if it is only read."""

"""What every spec is made of: frozen models that refuse unknown fields, and numbers that may be fractions."""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Spec(BaseModel):
    """A frozen value. Its fields' defaults are part of the digest: changing one needs a new task `version`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def _number(value: Any) -> Any:
    """`"8/255"`, `"0.03"` or a number, as float64; minus zero is zero."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        value = _parsed(value)
    return 0.0 if isinstance(value, float) and value == 0 else value


def _parsed(text: str) -> float:
    top, slash, bottom = text.partition("/")
    try:
        number = int(top) / int(bottom) if slash else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{shorten(text)} divides by zero") from None
    except (ValueError, OverflowError):
        raise ValueError(f'{shorten(text)} is not a number or a fraction such as "8/255"') from None
    if not math.isfinite(number):
        raise ValueError(f"{shorten(text)} is not a finite number")
    return number


def of_images(value: float) -> float:
    """A distance by which a pixel may move: more than 1 was meant in units of 0 to 255."""
    if value > 1:
        meant = f': did you mean "{value:g}/255"?' if value <= 255 else ""
        raise ValueError(f"{value:g} is more than 1, and pixels are in [0, 1]{meant}")
    return value


def shorten(value: Any) -> str:
    """A value as a message shows it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


Number = Annotated[
    float,
    BeforeValidator(_number, json_schema_input_type=float | str),
    Field(description='A number, or a fraction as a string such as "8/255".'),
]

# Keys can be asked for as `labels.KEY`, and no database keeps a NUL character.
LabelKey = Annotated[str, Field(min_length=1, max_length=100, pattern=r'^[^\x00-\x1f\x7f"\\]*$')]
Labels = dict[LabelKey, Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]]

Whole = Annotated[int, Strict()]  # true is no number, and neither is 2.5
Priority = Annotated[
    Whole,
    Field(
        ge=-100, le=100, description="Orders your own jobs, the highest first; between users fair share comes first."
    ),
]

Scale = Annotated[
    Number,
    Field(ge=1e-3, le=1e4, description="The head becomes s W, s b; trained networks are scaled after training."),
]

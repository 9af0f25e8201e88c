"""What every spec is made of: frozen models that refuse unknown fields, and numbers that may be fractions."""

import math
import re
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError

from service.model.names import TEXT_PATTERN


class Spec(BaseModel):
    """A frozen value. Its fields' defaults are part of the digest: changing one needs a new task `version`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def without_effect(spec: Spec, *names: str, **values: object) -> None:
    """Set fields that change no number, given the other fields, to their default or to `values`: equal work has one
    digest.

    Only for validators: it changes the spec in place, before anybody else has it.
    """
    fields = type(spec).model_fields
    spec.__dict__.update({name: fields[name].default for name in names} | values)


TOO_SMALL = "is too small: it would be taken for 0"
# `workers/science/__main__.py` has these patterns too: `tests/contract/test_catalog.py` compares them.
DECIMAL = r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]+)?|\.[0-9]+)"
WHOLE_NUMBER = re.compile("-?(?:0|[1-9][0-9]{0,29})")
FRACTION = re.compile(r" *(-?(?:0|[1-9][0-9]*)) */ *(-?(?:0|[1-9][0-9]*)) *")
NUMBER = re.compile(rf" *({DECIMAL})([eE][+-]?[0-9]+)? *")


def number(text: str) -> float:
    """The number in a text, in specs, filters and options: as JSON writes one (.5 too), or one whole number
    over another.

    Raises `ValueError` for anything else, for a number that is too large, and for one that float64 rounds to 0.
    """
    decimal = NUMBER.fullmatch(text)
    match = decimal or FRACTION.fullmatch(text)
    if match is None:
        rule = "in a fraction both are whole numbers" if "/" in text else 'such as 0.03, 3e-2 or "8/255"'
        raise ValueError(f"{shorten(text)} is not a number or a fraction, {rule}")
    top, more = match.groups()
    try:
        value = float(top + (more or "")) if decimal is not None else float(Fraction(int(top), int(more)))
    except ZeroDivisionError:
        raise ValueError(f"{shorten(text)} divides by zero") from None
    except (ValueError, OverflowError):
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{shorten(text)} is not a number that float64 has")
    if value == 0 and Fraction(top) != 0:
        raise ValueError(f"{shorten(text)} {TOO_SMALL}")
    return value + 0.0  # minus zero is zero


def whole(text: str) -> int:
    """The whole number that a text stands for, in specs and queries: digits, and none more than that number has.

    Raises `ValueError` for anything else, such as `1_0`, `+5` and `5.0`.
    """
    if WHOLE_NUMBER.fullmatch(text) is None:
        raise ValueError(f"{shorten(text)} is not a whole number, such as 10")
    return int(text)


def underflows(text: str) -> bool:
    """Whether a decimal that is not 0 is so small that float64 makes it 0."""
    return float(text) == 0 and re.search("[1-9]", re.split("[eE]", text)[0]) is not None


def truth(text: str) -> bool:
    """The value of `true` or `false` in filters and options; in JSON these are values of their own."""
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{shorten(text)} is neither true nor false")
    return text.lower() == "true"


ACROSS = "cross_field"
"""The type of an error of several fields together, each of which is right alone."""


def across(sentence: str) -> PydanticCustomError:
    return PydanticCustomError(ACROSS, "{sentence}", {"sentence": sentence})


def _number(value: object) -> object:
    """A number, or a text that says one, as float64; minus zero is zero."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    if isinstance(value, str):
        return number(value)
    return 0.0 if isinstance(value, float) and value == 0 else value


def _whole(value: object) -> object:
    """A whole number, or a text of its digits; 1.0 is none, so that a seed has one way to be written."""
    return whole(value) if isinstance(value, str) else value


def of_images(value: float) -> float:
    """A distance by which a pixel may move. A value above 1 was probably meant in units of 0 to 255."""
    if value > 1:
        exact = Fraction(repr(value)) / 255
        meant = f': did you mean "{_over_255(exact)}"?' if value <= 255 else ""
        raise ValueError(f"{value:g} is more than 1, and pixels are in [0, 1]{meant}")
    return value


def _over_255(fraction: Fraction) -> str:
    """As whole numbers, over 255 if possible."""
    return f"{fraction * 255}/255" if (fraction * 255).denominator == 1 else str(fraction)


def shorten(value: object) -> str:
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
LabelText = Annotated[str, Field(max_length=1000, pattern=TEXT_PATTERN)]
MAX_LABELS, MAX_LABEL_BYTES = 50, 10_000


def _few_bytes(labels: dict[str, str]) -> dict[str, str]:
    """Refuse large labels: every job of a sweep stores them."""
    size = sum(len(text.encode()) for item in labels.items() for text in item)
    if size > MAX_LABEL_BYTES:
        raise ValueError(f"these labels have {size:,} bytes in all, at most {MAX_LABEL_BYTES:,} are kept with a job")
    return labels


Labels = Annotated[
    dict[LabelKey, LabelText],
    Field(max_length=MAX_LABELS, description=f"At most {MAX_LABELS}, of {MAX_LABEL_BYTES:,} bytes in all."),
    AfterValidator(_few_bytes),
]

Whole = Annotated[int, Strict(), BeforeValidator(_whole, json_schema_input_type=int | str)]
Truth = Annotated[bool, Strict()]  # neither 1 nor "yes"

Order = Literal["permutation", "file"]
"""The order whose first images are the `samples`: one fixed permutation, or the file's, as RobustBench and AutoAttack
take them."""
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

"""Retractions: requests to hide results or to show them again, and the answers."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictBool

from api.http.schemas.examples import JOB_ID, RESTORATIONS_EXAMPLE, RETRACTION_EXAMPLE, RETRACTIONS_EXAMPLE

Measure = Annotated[
    str | None,
    Field(description="A further measure: only its numbers are meant.", max_length=200, examples=["sam_sharpness"]),
]


class Retraction(BaseModel):
    """Why results are retracted, and whether their jobs are to be computed again, as another replicate."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [RETRACTION_EXAMPLE]})

    reason: Annotated[str, Field(min_length=3, max_length=2000, pattern=r"^[^\x00]*$")]
    rerun: StrictBool = False


class Retractions(Retraction):
    """The same for every result that a filter chooses."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [RETRACTIONS_EXAMPLE]})

    filter: Annotated[str, Field(pattern=r"\S", description="As for `GET /v1/results`; a blank one is refused.")]
    measure: Measure = None


class Restorations(BaseModel):
    """Which retractions are taken back: those that hide results which a filter chooses."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [RESTORATIONS_EXAMPLE]})

    filter: Annotated[str, Field(pattern=r"\S", description="As for `GET /v1/results`; a blank one is refused.")]
    measure: Measure = None


class Retracted(BaseModel):
    retracted: list[str] = Field(description="Jobs whose results are hidden from now on.", examples=[[JOB_ID]])
    resubmitted: list[str] = Field(description="The jobs that compute them again, where that was asked for.")
    tasks: list[str] = Field(default=[], description="The tasks that were retracted.", examples=[[JOB_ID]])
    unmeasured: list[str] = Field(
        default=[], description="Jobs whose results are shown without the numbers of a further measure."
    )
    replanned: int = Field(default=0, description="Live jobs that get a new generation of these tasks.", examples=[2])
    still_registered: list[str] = Field(
        default=[], description="Names under which the retracted weights are registered, and stay usable."
    )


class Restored(BaseModel):
    restored: list[str] = Field(description="Jobs whose results are shown again.", examples=[[JOB_ID]])
    tasks: list[str] = Field(default=[], description="The tasks that are restored.", examples=[[JOB_ID]])
    superseded: list[str] = Field(
        default=[], description="Those that new jobs do not join, because there is a newer generation."
    )
    measured: list[str] = Field(
        default=[], description="Jobs whose results show the numbers of a further measure again."
    )

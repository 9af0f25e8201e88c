"""Results, findings about them from later results, and their curves."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.examples import DIGEST, JOB_EXAMPLE, JOB_ID, RESULT_EXAMPLE
from api.http.schemas.worst_cases import WorstCase
from service.model.json import JsonObject
from service.specs.numbers import METRICS, described

WILSON = "Of the 95 % interval from its images (Wilson), for this one network."


class Flag(BaseModel):
    """A result that is equal but for one field, where more of it left more examples robust."""

    flag: Literal["not_monotone"]
    field: str = Field(examples=["attack.steps"])
    job_id: str = Field(examples=[JOB_ID])
    value: int | float = Field(description="What that result has in the field.", examples=[40])
    robust_accuracy: float = Field(description="Of that result, its repeats averaged.", examples=[0.61])
    results: int = Field(description="Its repeats: attack seeds, replicates.", examples=[1])


class TrainedAgain(BaseModel):
    """The weights of a network that the result rests on were lost, and its training gave others when it ran again.

    The result stands for the lost ones, which cannot be looked at any more; new jobs use the others.
    """

    flag: Literal["trained_again"]
    task_id: str = Field(description="The training.", examples=[JOB_ID])
    weights_sha256: str = Field(description="What was lost.", examples=[DIGEST])
    trained_again_as: str = Field(examples=[DIGEST])


class MixedWeights(BaseModel):
    """A measure or the training of the result has numbers of other weights than its attack: they are left out.

    Earlier versions left such results where a training ran again and gave other weights.
    """

    flag: Literal["mixed_weights"]
    task_id: str = Field(examples=[JOB_ID])
    part: str = Field(description="`train`, or the type of the measure.", examples=["closed_forms"])
    weights_sha256: str = Field(description="What that task used or made.", examples=[DIGEST])


def _with_metrics(schema: JsonObject) -> None:
    """Name every headline number, with its formula: the table of numbers says which there are."""
    described_by = {name: number for number in described() for name in number["columns"]}
    for name in METRICS:
        number = described_by[name]
        shown = {"title": name.replace("_", " ").capitalize(), "anyOf": [{"type": "number"}, {"type": "null"}]}
        shown["description"] = f"{number['formula']} ({number['unit']}); null: {number['null']}"
        schema["properties"][name] = shown | schema["properties"].get(name, {})


class Result(BaseModel):
    """One finished job: what was asked for, and what came out. Further numbers stand beside these by their names.

    Shares of images carry their Wilson 95 % interval as `NAME_ci95_low` and `NAME_ci95_high`, null where the number of
    images is not known: robust_accuracy_any_iterate, robust_top5_accuracy, robust_accuracy_of_correct, flip_rate and
    test_accuracy too.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_metrics)

    job_id: str = Field(examples=[JOB_ID])
    architecture: str = Field(examples=["simple_cnn"])
    dataset: str = Field(examples=["digits"])
    scale: float = Field(examples=[5.0])
    attack: JsonObject = Field(examples=[JOB_EXAMPLE["attack"]])
    recipe: JsonObject
    clean_accuracy: float | None = Field(examples=[0.97])
    robust_accuracy: float | None = Field(examples=[0.568])
    clean_accuracy_ci95_low: float | None = Field(description=WILSON, examples=[0.936])
    clean_accuracy_ci95_high: float | None = Field(description=WILSON, examples=[0.986])
    robust_accuracy_ci95_low: float | None = Field(description=WILSON, examples=[0.499])
    robust_accuracy_ci95_high: float | None = Field(description=WILSON, examples=[0.635])
    masked_fraction: float | None = Field(examples=[0.02])
    zero_gradient_fraction: float | None = Field(examples=[0.0])
    verdict: str | None = Field(examples=["trusted"])
    verdict_reasons: list[str] | None = Field(examples=[["masked"]])
    log_relative_sharpness_median: float | None = Field(default=None, examples=[-34.1])
    threat_model: str | None = Field(description="The attack's ball; null without one.", examples=["linf 8/255"])
    adversary: Literal["white_box", "black_box", "transfer", "noise"]
    flags: list[Flag | TrainedAgain | MixedWeights] = Field(
        description="What was found since: what other results say against it, lost weights. Its verdict stays.",
        examples=[[]],
    )
    worst_case: WorstCase | None = Field(description="Of the network, over all attacks of the threat model.")
    parts: JsonObject = Field(description="All numbers of each task it rests on, with their provenance.")


class ResultPage(BaseModel):
    items: list[JsonObject] = Field(
        description="Rows as in Result, or the fields asked for.", examples=[[RESULT_EXAMPLE]]
    )
    next_cursor: str | None = Field(examples=[None])
    retracted: int | None = Field(
        default=None,
        description="On the first page: how many results of the filter are hidden, counted up to 1,000.",
        examples=[0],
    )


Curves = dict[str, JsonObject]  # by part and name; a curve has a list of numbers for each of its columns
CURVES: JsonObject = {"attack": {"trajectory": {"step": [0, 1], "loss_median": [0.1, 2.0]}}}


class Standing(BaseModel):
    """Whether a result stands: when, by whom and why it was retracted, or nulls."""

    retracted_at: str | None
    retracted_by: str | None
    retraction_reason: str | None


class Trajectory(Standing):
    job_id: str = Field(examples=[JOB_ID])
    curves: Curves = Field(examples=[CURVES])

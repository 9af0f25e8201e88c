"""The catalogue of everything that can be named in a job."""

from pydantic import BaseModel, Field

from api.http.schemas.examples import JOB_EXAMPLE
from service.model.json import JsonObject


class StoredNumber(BaseModel):
    """A number that results can have, or all those whose names follow one pattern."""

    name: str = Field(examples=["{split}loss_{statistic}{population}"])
    formula: str
    unit: str = Field(examples=["nats"])
    low: float | None = Field(description="The least value; null is no bound.", examples=[0.0])
    high: float | None = Field(description="The largest value.", examples=[None])
    null: str = Field(description="When it is null.", examples=["no such image"])
    source: str
    group: str
    task_kind: str = Field(description="The kind of task that leaves it; `job`: the service computes it.")
    of: str = Field(description="Which tasks of the kind leave it, or the type of measure.", examples=["closed_forms"])
    file: str = Field(description="Where it is computed.")
    names: list[str] = Field(description="Every name that the pattern stands for.")
    columns: list[str] = Field(description="Those of them that have a column of their own, by the column's name.")
    indexed: list[str] = Field(description="The columns by which results are sorted fast.")


class Catalog(BaseModel):
    """By name, with parameters, bounds and defaults as JSON schemas."""

    architectures: dict[str, JsonObject]
    datasets: dict[str, JsonObject]
    registered_datasets: list[JsonObject] = Field(description="As in `GET /v1/datasets`.")
    recipes: dict[str, JsonObject]
    recipe_presets: dict[str, JsonObject] = Field(
        description="By a name that stands for a whole recipe, what differs from the recipe's defaults.",
        examples=[{"adversarial_literature": {"name": "adversarial", "weight_decay": 5e-4}}],
    )
    attacks: dict[str, JsonObject]
    attack_presets: dict[str, JsonObject] = Field(examples=[{"pgd_linf": JOB_EXAMPLE["attack"]}])
    measures: dict[str, JsonObject]
    always_measured: list[str]
    numbers: list[StoredNumber] = Field(description="The dictionary of every number that a result can have.")
    job: JsonObject = Field(description="The JSON schema of a job.")
    sweep: JsonObject = Field(description="The JSON schema of a sweep.")

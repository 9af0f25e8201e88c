"""Worst cases over all attacks of a threat model."""

from pydantic import BaseModel, Field

from api.http.schemas.examples import JOB_EXAMPLE
from service.model.json import JsonObject


class NamedAttack(BaseModel):
    """An attack that a worst case is over."""

    attack: JsonObject = Field(examples=[JOB_EXAMPLE["attack"]])
    preset: str | None = Field(examples=["pgd_linf"])
    version: int = Field(examples=[1])
    results: int = Field(description="Its seeds, replicates and scales.", examples=[4])
    scales: list[float] = Field(examples=[[0.5, 1.0, 5.0]])
    robust_accuracy: float = Field(description="Of the images that it alone left right everywhere.", examples=[0.45])


class AllAttacks(BaseModel):
    """The images that every stored attack of one threat model left right, of one network: bits, joined by AND.

    Scales count where the bias is scaled too, because the predictions are the same. Retracted results, attacks of an
    older version, and those that left the ball, met a value that is not finite, or a network that answers at random are
    left out, and counted by the reason. The panel of controls, which looks at 256 images, is not in it.
    """

    threat_model: str = Field(examples=["linf 8/255"])
    ci95_low: float = Field(description="Of Wilson's interval over the images.", examples=[0.39])
    ci95_high: float = Field(examples=[0.45])
    n: int = Field(description="Images.", examples=[1000])
    attacks: list[NamedAttack] = Field(description="The strongest first.")
    results: int = Field(examples=[4])
    left_out: dict[str, int] = Field(examples=[{"superseded": 1}])
    flags: list[str] = Field(description="Of the results that count.", examples=[["not_monotone"]])


class WorstCase(AllAttacks):
    """The worst case of a result's network in its threat model."""

    robust_accuracy: float = Field(examples=[0.42])


class NetworkWorstCase(AllAttacks):
    """The worst case of a network in a threat model, and which network that is."""

    weights_sha256: str = Field(examples=["4f2978e34179abf6991c70fe5fcbd7a4d2a6002b8174c0e9f81e029971d73bb1"])
    architecture: str = Field(examples=["simple_cnn"])
    recipe: JsonObject
    train_version: int | None = Field(description="Of the training task.", examples=[1])
    dataset: str = Field(examples=["digits"])
    samples: int = Field(examples=[1000])
    order: str = Field(default="permutation", examples=["permutation"])
    scale: float = Field(description="1 wherever the bias is scaled too: all those scales count.", examples=[1.0])
    robust_accuracy_worst_case: float = Field(examples=[0.42])
    attack_count: int = Field(description="Of different attacks.", examples=[3])


class WorstCases(BaseModel):
    items: list[NetworkWorstCase]
    retracted: int = Field(description="How many results the filters choose that are retracted; they do not count.")

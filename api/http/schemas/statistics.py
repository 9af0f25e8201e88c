"""Statistics over many results: groups, comparisons, boards, correlations, curves of several."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from api.http.schemas.examples import JOB_EXAMPLE, JOB_ID
from api.http.schemas.results import Standing, Trajectory
from service.model.json import JsonObject

HIDDEN: int = Field(
    default=0, description="Results of the filter that are hidden because they are retracted, counted up to 1,000."
)


class Aggregate(BaseModel):
    """Groups in the order of `by`. Every statistic but `best` and `worst`, which are of single results, is over
    the units that `spread_of` names: the trained networks, each with the mean of its repeats (attack seeds,
    replicates, storage options)."""

    by: list[str] = Field(examples=[["scale"]])
    metrics: dict[str, list[str]] = Field(examples=[{"robust_accuracy": ["mean", "count"]}])
    items: list[JsonObject] = Field(
        description="Each group: the values of `by`, the numbers of `results` and of `networks`, and the statistics of "
        "each metric. `ci95_of` says what an interval is of: `networks` (or `attack_seeds`), by Student's t, cut at 0 "
        "and 1 for shares; or `images`, by Wilson, for an accuracy where a single network or several without a spread "
        "tell nothing of others.",
        examples=[[{"scale": 5.0, "results": 15, "networks": 3, "robust_accuracy": {"mean": 0.57, "count": 3}}]],
    )
    spread_of: Literal["networks", "attack_seeds"] = Field(description="What is counted and what spreads.")
    mixed: dict[str, list[object]] = Field(description="Fields, other than seeds, that differ within a group.")
    retracted: int = HIDDEN


class TrajectoryOfSeveral(Trajectory):
    architecture: str
    dataset: str
    scale: float
    seed: int
    robust_accuracy: float | None


class Trajectories(BaseModel):
    items: list[TrajectoryOfSeveral]


class Pair(BaseModel):
    """Two results on the examples that all have: how many each withstands, and McNemar's exact test."""

    a: str
    b: str
    only_a: int
    only_b: int
    both: int
    neither: int
    difference: float = Field(description="Robust accuracy of a less that of b.")
    difference_low: float = Field(description="Of its 95 % bootstrap interval over examples.")
    difference_high: float
    p_value: float


class Union(BaseModel):
    """The worst case per example over attacks on one network."""

    robust_accuracy: float
    broken_only_by: dict[str, int] = Field(description="Examples that no other of the attacks breaks, by job.")
    left_out: dict[str, str] = Field(
        description="Results that prove nothing, by job, and why: one of the reasons of verdicts, `superseded` by a "
        "newer version of the attack, or `retracted`.",
        examples=[{}],
    )


class Compared(Standing):
    job_id: str = Field(examples=[JOB_ID])
    architecture: str
    dataset: str
    scale: float
    seed: int
    samples: int
    clean_accuracy: float | None
    robust_accuracy: float | None
    verdict: str | None
    weights_sha256: str | None
    threat_model: str | None = Field(examples=["linf 8/255"])


class Comparison(BaseModel):
    results: list[Compared]
    examples: int = Field(description="Which all of them have: the first of one fixed permutation, or of the file.")
    differing: dict[str, list[object]] = Field(description="Fields of the specs, with each one's value.")
    pairs: list[Pair]
    union: Union | None
    union_refused: str | None = Field(description="Why there is no union.")


class CountedAttack(BaseModel):
    """An attack that a row's worst cases are over, and how many of the row's networks it met."""

    attack: JsonObject = Field(examples=[JOB_EXAMPLE["attack"]])
    preset: str | None = Field(examples=["pgd_linf"])
    version: int = Field(examples=[1])
    networks: int = Field(examples=[3])
    results: int = Field(description="Its seeds, replicates and scales.", examples=[12])


class Rank(BaseModel):
    """The networks of one architecture and recipe; they differ in their weights."""

    rank: int
    architecture: str
    recipe: JsonObject
    train_version: int | None = Field(description="Of the training task.", examples=[1])
    scale: float = Field(description="Of the results that were asked for.")
    networks: int = Field(description="Distinct weights.", examples=[3])
    seeds: int = Field(description="The same number under its older name.", deprecated=True, examples=[3])
    results: int = Field(description="That were asked for, repeats included.", examples=[5])
    robust_accuracy_worst_case: float = Field(
        description="Mean over networks of the share of images that every stored attack of the threat model left "
        "right. Rows are sorted by it.",
        examples=[0.42],
    )
    ci95_low: float | None = Field(
        description="Of the worst case: Student's over networks; of one network, or of equal ones, Wilson's over images"
    )
    ci95_high: float | None
    ci95_of: Literal["networks", "images"] = Field(description="Over what the interval is.")
    best: float = Field(description="Worst case of the best network.")
    robust_accuracy: float = Field(
        description="Mean over networks, each under the strongest single attack of those asked for, repeats averaged."
    )
    clean_accuracy: float | None
    attacks: list[CountedAttack]
    left_out: dict[str, int] = Field(
        description="Stored results that prove nothing in this threat model, by the reason.",
        examples=[{"superseded": 1}],
    )
    flags: list[str] = Field(
        description="Of any result that was asked for or counts in a worst case.", examples=[["not_monotone"]]
    )


class Board(BaseModel):
    """Networks under one threat model, the most robust first."""

    model_config = ConfigDict(extra="allow")

    dataset: str
    threat_model: str = Field(examples=["linf 8/255"])
    norm: str = Field(examples=["linf"])
    eps: float = Field(examples=[8 / 255])
    samples: int
    order: str = Field(examples=["permutation"])
    scale_bias: bool
    attack: JsonObject | None = Field(
        description="Where the results that were asked for have one alone.", examples=[JOB_EXAMPLE["attack"]]
    )
    preset: str | None = Field(examples=["pgd_linf"])
    version: int = Field(description="The latest of the attacks' versions; each stands beside its attack.")
    rows: list[Rank]


class Leaderboard(BaseModel):
    items: list[Board]
    retracted: int = HIDDEN


class OverScales(BaseModel):
    n: int = Field(examples=[336])
    results: int = Field(description="That these points are the means of.", examples=[336])
    tau: float | None = Field(examples=[-0.41])
    note: str = Field(examples=["confounded by design: points of one network at several scales share ..."])


class Correlation(BaseModel):
    """Kendall's tau-b in one group. The fields of `by` stand beside these; nulls below ten networks."""

    model_config = ConfigDict(extra="allow")

    dataset: str = Field(examples=["cifar10"])
    attack: JsonObject = Field(examples=[JOB_EXAMPLE["attack"]])
    samples: int = Field(examples=[1000])
    order: str = Field(examples=["permutation"])
    threat_model: str | None = Field(default=None, examples=["linf 8/255"])
    version: int = Field(examples=[1])
    measure_version: int = Field(examples=[1])
    verdict_version: int | None = Field(
        default=None,
        description="Of the rule that chose the results by their verdict, or counted a number.",
        examples=[5],
    )
    measure_spec: JsonObject | None = Field(
        default=None,
        description="Of the further measure that `measure` is a number of: its parameters and version.",
        examples=[{"type": "sam_sharpness", "images": 1024, "rho": 0.05, "m": 128, "version": 1}],
    )
    target_spec: JsonObject | None = Field(default=None, description="The same of `target`.")
    n: int = Field(description="Trained networks at s = 1.", examples=[48])
    results: int = Field(description="At s = 1, which are averaged within a network first.", examples=[144])
    architectures: int = Field(examples=[4])
    pooled: float | None = Field(examples=[-0.12])
    pooled_low: float | None = Field(examples=[-0.31])
    pooled_high: float | None = Field(examples=[0.08])
    within: float | None = Field(description="Mean over architectures.", examples=[-0.05])
    within_low: float | None = Field(examples=[-0.27])
    within_high: float | None = Field(examples=[0.16])
    over_scales: OverScales


class Correlations(BaseModel):
    measure: str = Field(examples=["log_relative_sharpness_median"])
    target: str = Field(examples=["robust_accuracy"])
    items: list[Correlation]
    retracted: int = HIDDEN

"""Statistics of results: groups, comparisons, leaderboards, correlations, curves of several."""

from typing import Annotated, Literal

from fastapi import Query, Request

from api.http.deps import NumberFromText, Questions, TruthFromText
from api.http.errors import documented
from api.http.filters import Filter, documented_filters, filters_of
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.examples import JOB_ID
from api.http.schemas.statistics import Aggregate, Comparison, Correlations, Leaderboard, Trajectories
from api.http.schemas.worst_cases import WorstCases
from service.model.query import names_of
from service.model.unit import Unit
from service.results import aggregates, comparing, correlating, leaderboard, worst_case
from service.results.insights import Insights
from service.results.questions import nodes_of
from service.store.result_fields import RESULTS

router = Router(prefix="/v1", tags=["statistics"])
Retracted = Annotated[bool, TruthFromText, Query(description="Count retracted results too.")]
OWN = ("attack", "scale")  # parameters of the leaderboard itself
Trusted = Annotated[
    bool, TruthFromText, Query(description="Only results with the verdict `trusted` by this version's rule.")
]
Ids = Annotated[str, Query(description="Job ids by comma.", min_length=1, examples=[f"{JOB_ID},{JOB_ID[:-1]}b"])]


@router.get(
    "/results:aggregate",
    dependencies=[scope("read")],
    response_model=Aggregate,
    responses=documented(422),
    openapi_extra=documented_filters(RESULTS),
)
def aggregate_results(
    request: Request,
    insights: Questions,
    by: Annotated[
        str,
        Query(
            description="Up to 20 fields by comma; none: all results are one group.", examples=["architecture,scale"]
        ),
    ] = "",
    metrics: Annotated[
        str,
        Query(
            description="`METRIC:STATISTIC,...` of up to 20 metrics: mean, std, ci95 (over networks by Student's t; "
            "of an accuracy without a spread, over images by Wilson), median, q05 to q95, min, max, count; of single "
            "results best and worst (with their job).",
            examples=["robust_accuracy:mean,ci95,clean_accuracy:mean"],
        ),
    ] = aggregates.DEFAULT,
    unit: Annotated[
        Unit,
        Query(
            description="What is counted: trained networks, each with the mean of its repeats, or the attack seeds of "
            "one network, refused where a group has several."
        ),
    ] = "network",
    filter: Filter = None,
    allow_mixed: Annotated[bool, TruthFromText, Query(description="Let a group differ in more than seeds.")] = False,
    include_retracted: Retracted = False,
) -> Answer:
    """Statistics over groups of results, n being the number of trained networks: their repeats are averaged first.

    Groups that differ in more than seeds are refused, unless told otherwise."""
    nodes = nodes_of(filter, filters_of(request, RESULTS))
    wanted = aggregates.metrics_of(metrics)
    return aggregates.aggregate(
        insights.database, nodes, names_of(by), wanted, unit=unit, allow_mixed=allow_mixed, retracted=include_retracted
    )


@router.get(
    "/results:compare", dependencies=[scope("read")], response_model=Comparison, responses=documented(404, 409, 422)
)
def compare_results(insights: Questions, ids: Ids) -> Answer:
    """Results side by side: the fields that differ, McNemar's exact test and a bootstrap interval for every two on
    the examples that all have, and the worst case per example where they are attacks on one network in one ball."""
    return comparing.compare(insights.database, _whole(insights, ids))


@router.get(
    "/results:trajectories",
    dependencies=[scope("read")],
    response_model=Trajectories,
    responses=documented(404, 409, 422),
)
def get_trajectories(
    insights: Questions,
    ids: Ids,
    parts: Annotated[
        str, Query(description="attack, baseline, train, ... by comma; all where left out.", examples=["attack,train"])
    ] = "",
) -> Answer:
    """The curves of several results in one answer."""
    return {"items": insights.trajectories(_whole(insights, ids), names_of(parts))}


@router.get(
    "/leaderboard",
    dependencies=[scope("read")],
    response_model=Leaderboard,
    responses=documented(422),
    openapi_extra=documented_filters(RESULTS, OWN),
)
def get_leaderboard(
    request: Request,
    insights: Questions,
    attack: Annotated[
        str | None, Query(description="A preset; all attacks where left out.", examples=["pgd_linf"])
    ] = None,
    scale: Annotated[
        Literal["all"] | Annotated[float, NumberFromText],
        Query(description="Of this scale, or `all`.", examples=["all"]),
    ] = 1.0,
    filter: Filter = None,
    trusted: Trusted = True,
) -> Answer:
    """Networks by their worst case: a board for each threat model, data set and number of samples.

    The worst case of a network is over every stored attack of the threat model, at every scale whose predictions are
    the same; `attack`, `scale` and filters choose which networks are on a board. Noise and attacks without a ball rank
    nothing."""
    nodes = nodes_of(filter, filters_of(request, RESULTS, OWN))
    wanted = None if scale == "all" else float(scale)
    boards = leaderboard.leaderboard(insights.database, nodes, attack=attack, scale=wanted, trusted=trusted)
    return {"items": boards, "retracted": insights.hidden(nodes)}


@router.get(
    "/worst-cases",
    dependencies=[scope("read")],
    response_model=WorstCases,
    responses=documented(422),
    openapi_extra=documented_filters(RESULTS),
)
def get_worst_cases(request: Request, insights: Questions, filter: Filter = None) -> Answer:
    """The share of images that every stored attack of a threat model left right, by network and threat model.

    Filters choose networks by their results; each worst case names the attacks that it is over, whatever was asked."""
    nodes = nodes_of(filter, filters_of(request, RESULTS))
    return {"items": worst_case.of_networks(insights.database, nodes), "retracted": insights.hidden(nodes)}


@router.get(
    "/correlations",
    dependencies=[scope("read")],
    response_model=Correlations,
    responses=documented(422),
    openapi_extra=documented_filters(RESULTS),
)
def get_correlations(
    request: Request,
    insights: Questions,
    measure: Annotated[str, Query(description="A number.", examples=["log_relative_sharpness_median"])],
    target: Annotated[
        str, Query(description="The number that it should rank alike.", examples=["robust_accuracy"])
    ] = "robust_accuracy",
    by: Annotated[
        str,
        Query(
            description="Further fields by comma; data set, attack, samples, versions and parameters of the measure "
            "always are.",
            examples=["recipe"],
        ),
    ] = "",
    filter: Filter = None,
    trusted: Trusted = True,
) -> Answer:
    """Kendall's tau-b at s = 1, one point per network, pooled and within architectures, with bootstrap intervals.

    What is too much to resample is refused: n networks of a group make n² pairs, and count as 10,000 where
    they are fewer; 10,000,000 are allowed in all groups together. Groups below ten networks are not resampled."""
    nodes = nodes_of(filter, filters_of(request, RESULTS))
    items = correlating.correlations(insights.database, nodes, measure, target=target, by=names_of(by), trusted=trusted)
    return {"measure": measure, "target": target, "items": items, "retracted": insights.hidden(nodes)}


def _whole(insights: Insights, ids: str) -> list[str]:
    return [insights.identify("job", ident) for ident in names_of(ids)]

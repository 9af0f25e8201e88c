"""A typing error is no empty answer: values of closed lists, names, times and cursors are what they say or refused."""

import asyncio
import csv
import io
import itertools
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update

from api.http.app import create_app
from api.http.events import Start, _followed, _Past
from api.http.feed import MOST_PENDING, Feed, Reader
from service.errors import InvalidQuery
from service.lab.access import Access, Caller
from service.model import times
from service.queue import retractions
from service.results import exporting, leaderboard, networks
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.settings import Settings
from service.store import tables
from service.store.job_fields import JOBS
from service.store.result_fields import RESULTS
from service.store.result_tables import results

Ask = Callable[[Question], dict[str, Any]]
on_both = pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, kept: Any) -> str:
    """Where SQL decides, a test is `on_both` by default."""
    url: str = kept.emptied(request.param).url
    return url


@pytest.fixture
def insights(lab: Any) -> Insights:
    """Eight jobs of two sweeps of one name, and one of another; all are done."""
    lab.submit_sweep({"scale": [1, 5], "attack": ["pgd_linf", "transfer"]}, user="ann", name="my-name")
    lab.submit_sweep({"scale": [1, 5], "seed": [1, 2]}, user="bob", name="my-name")
    lab.submit_sweep({"scale": [7]}, user="bob", name="other", labels={"for": "tests"})
    lab.finish()
    return Insights(lab.database)


def refused(ask: Ask, **asked: Any) -> InvalidQuery:
    with pytest.raises(InvalidQuery) as caught:
        ask(Question(**asked))
    return caught.value


TYPING_ERRORS = [
    ("not verdict in (suspct, invald)", 16, "unknown verdict 'suspct'; did you mean suspect?"),
    ("verdict != suspect and verdict not in (trusted, invald)", 48, "did you mean invalid?"),
    ("verdict = ''", 10, "unknown verdict ''"),
    ("verdict_reasons = maskd", 18, "did you mean masked"),
    ("verdict_checks.masked = passd", 24, "did you mean passed"),
    ("verdict_checks.maskd = passed", 0, "did you mean verdict_checks.masked"),
    ("attack.norm = l3", 14, "known are: linf, l2"),
    ("norm != lnf", 8, "did you mean linf"),
    ("attack.attack.norm = l3", 21, "known are: linf, l2"),
    ("attack.loss = crossentropy", 14, "did you mean cross_entropy"),
    ("attack.judge = finl", 15, "did you mean final"),
    ("attack.kind = gausian", 14, "did you mean gaussian"),
    ("attack = pgd_linf", 9, "known are: pgd, fgsm"),
    ("attack.type = pdg", 14, "did you mean pgd"),
    ("recipe = trade", 9, "did you mean trades"),
    ("recipe.name in (standard, standart)", 26, "did you mean standard"),
    ("recipe.schedule = cosin", 18, "did you mean cosine"),
    ("architecture = resnet81", 15, "did you mean resnet18"),
    ("attack.source.architecture = mpl", 29, "did you mean mlp"),
    ("dataset = digit", 10, "did you mean digits"),
    ("dataset = npz:mine", 10, "unknown dataset 'npz:mine'"),
    ("order = permutaton", 8, "did you mean permutation"),
    ("measures = sam_sharpnes", 11, "did you mean sam_sharpness"),
    ("measures = closed_forms", 11, "unknown measures 'closed_forms'"),
    ("user = bbo", 7, "did you mean bob"),
    ("owner not in (ann, anne)", 19, "did you mean ann"),
    ("verdict > trustd", 0, "which can be asked for by !=, =, in, not in, ~, not by >"),
    ("architecture <= mlp", 0, "architecture is a text without an order"),
    ("user >= ann", 0, "user is a text without an order"),
    ("not verdict ~ suspct", 14, "no verdict contains 'suspct'; did you mean suspect?"),
    ("architecture ~ ResNet", 15, "no architecture contains 'ResNet' (known are: simple_cnn, mlp, resnet18,"),
    ("dataset ~ digts", 10, "did you mean digits"),
    ("measures ~ sam_sharpnss", 11, "did you mean sam_sharpness"),
    ("verdict_reasons ~ maskd", 18, "did you mean masked"),
    ("user ~ bbo", 7, "the name of no user contains 'bbo'"),
    ("sweep ~ my-name", 8, "name it whole with `=`"),
    ("recipe.checkpoint = mine", 20, "unknown recipe.checkpoint 'mine'"),
    ("recipe.weights_sha256 = mine", 24, "64 hexadecimal digits"),
    ("spec_digest = foo", 14, "'foo' is no spec_digest, which is a SHA-256 of 64 hexadecimal digits"),
    ("spec_digest ~ foo", 14, "'foo' is no part of a spec_digest"),
    ("sweep = my-nam", 8, "there is no sweep with the id or the name 'my-nam'; did you mean my-name?"),
]
OF_JOBS = [
    ("state > succeedd", 0, "state is a text without an order, which"),
    ("state = faild", 8, "unknown state 'faild'; did you mean failed?"),
    ("not state ~ faild", 12, "no state contains 'faild'; did you mean failed?"),
    ("id = foo", 5, "'foo' is no id, which is an id such as 01a22e44-"),
    ("id in (01a22e44-9123-71d6-aad1-a6e470f2988b, 1)", 45, "'1' is no id"),
    ("id ~ job", 5, "'job' is no part of a id"),
]
OF_RESULTS = [
    ("not flags ~ not_monoton3", 12, "did you mean not_monotone"),
    ("retracted_by = nobody1", 15, "unknown retracted_by 'nobody1'"),
    ("provenance.precision = float99", 23, "known are: float32, tf32, bf16"),
    ("provenance.dataset_files_sha256 = foo", 34, "64 hexadecimal digits"),
    ("measures.sam_sharpness.type = foo", 30, "known are: sam_sharpness"),
    ("job_id = foo", 9, "'foo' is no job_id, which is an id such as 01a22e44-"),
    ("weights_sha256 = foo", 17, "64 hexadecimal digits"),
    ("attack_digest != foo", 17, "64 hexadecimal digits"),
    ("threat_model = linf", 15, "'linf' is no threat_model such as 'linf 8/255' or 'l2 0.5' (known are: linf 8/255)"),
    ("threat_model = 'linf 8/256'", 15, "no result has the threat_model 'linf 0.03125' (known are: linf 8/255)"),
    ("threat_model = 'l3 8/255'", 15, "'l3 8/255' is no threat_model"),
    ("threat_model = 'linf 0'", 15, "is no threat_model"),
    ("threat_model = 'linf eight'", 15, "is no threat_model"),
    ("threat_model ~ l3", 15, "no threat_model contains 'l3'"),
    ("adversary = whitebox", 12, "did you mean white_box"),
    ("flags = not_monoton", 8, "did you mean not_monotone"),
    ("provenance.task_kind = atack", 23, "did you mean attack"),
    ("provenance.dataset = digit", 21, "did you mean digits"),
    ("sweep_id = nothing", 11, "there is no sweep_id with the id or the name 'nothing'"),
]


def test_an_unknown_value_is_refused_with_the_nearest(insights: Insights) -> None:
    for ask, texts in ((insights.jobs, [*OF_JOBS, *TYPING_ERRORS]), (insights.results, [*TYPING_ERRORS, *OF_RESULTS])):
        for text, position, said in texts:
            error = refused(ask, filter=text)
            assert (error.parameter, error.position) == ("filter", position), text
            assert said in error.sentence, (text, error.sentence)
    for name, value in (("state", "faild"), ("verdict", "suspct"), ("sweep", "my-nam"), ("architecture", "mpl")):
        assert refused(insights.jobs, filters={name: [value]}).parameter == name


def test_a_text_that_is_contained_may_be_any(insights: Insights) -> None:
    for text in ("architecture ~ ml", "verdict ~ trust", "user ~ b", "attack.norm ~ lin and dataset ~ digi"):
        assert insights.jobs(Question(filter=text))["items"], text
    for text in ("state ~ fail", "measures ~ lipsch", "spec_digest ~ 0123456789ab", "id ~ ffff-ffff"):
        assert insights.jobs(Question(filter=text))["items"] == [], text


def test_a_threat_model_however_its_eps_is_spelled(lab: Any, insights: Insights) -> None:
    for text in ("linf 8/255", "linf 16/510", "linf 0.03137254901960784"):
        assert len(insights.results(Question({"threat_model": [text]}))["items"]) == 9
        assert len(insights.results(Question(filter="threat_model ~ linf and threat_model ~ 8/255"))["items"]) == 9
    boards = partial(leaderboard.leaderboard, lab.database)
    assert boards(nodes_of(None, {"threat_model": ["linf 8/255"]})) == boards([])
    with pytest.raises(InvalidQuery, match="known are: linf 8/255"):
        boards(nodes_of(None, {"threat_model": ["linf 8/256"]}))


def test_without_results_any_threat_model_is_one(lab: Any) -> None:
    insights = Insights(lab.database)
    assert insights.results(Question({"threat_model": ["linf 8/256"]}))["items"] == []
    assert "is no threat_model" in refused(insights.results, filter="threat_model = linf").sentence


def test_a_digest_in_capitals(insights: Insights) -> None:
    [row, *_] = insights.results(Question(fields=("job_id", "spec_digest", "weights_sha256")))["items"]
    for name in row:
        assert row in insights.results(Question({name: [row[name].upper()]}, fields=tuple(row)))["items"], name


def test_who_retracted_without_a_job_is_known(lab: Any, insights: Insights) -> None:
    [row, *_] = insights.results(Question())["items"]
    retractions.retract(lab.service, row["job_id"], "wrong", user="carol", admin=True)
    for text in ("retracted_by = carol", "retracted_by ~ caro"):
        found = insights.results(Question(filter=text, retracted=True))["items"]
        assert row["job_id"] in [one["job_id"] for one in found]
        assert {one["retracted_by"] for one in found} == {"carol"}


def test_a_known_value_that_no_row_has(insights: Insights) -> None:
    for text in ("state = failed", "architecture = resnet18", "dataset = cifar10", "measures = lipschitz", "norm = l2"):
        assert insights.jobs(Question(filter=text))["items"] == [], text


def test_a_registered_data_set_is_known(lab: Any, insights: Insights) -> None:
    row = {"name": "mine", "train_sha256": "0" * 64, "test_sha256": "0" * 64, "created_by": "ann", "created_at": 0.0}
    row |= {"channels": 1, "height": 8, "width": 8, "classes": 10, "train_count": 5, "test_count": 5}
    with lab.database.write() as connection:
        connection.execute(tables.datasets.insert().values(row))
    assert insights.results(Question(filter="dataset = npz:mine"))["items"] == []
    assert "did you mean npz:mine" in refused(insights.results, filter="dataset = npz:mien").sentence


@on_both
def test_a_sweep_by_its_name_its_id_or_the_beginning_of_it(lab: Any, insights: Insights) -> None:
    first, second, other = (row.id for row in lab.rows(tables.sweeps))
    for ask in (insights.jobs, insights.results):
        for text, count in (
            ("sweep = my-name", 8), ("sweep = other", 1), ("sweep != other", 8), ("sweep != my-name", 1),
            ("sweep in (other, my-name)", 9), ("sweep not in (my-name)", 1), (f"sweep = {first}", 4),
            (f"sweep in ({second}, other)", 5), (f"sweep = {other[:-1]}", 1),
            (f"sweep not in ({first[:-1]}, other)", 4), ("sweep ~ -", 9), ("not sweep = my-name", 1),
        ):  # fmt: skip
            assert len(ask(Question(filter=text, limit=100))["items"]) == count, text
        assert len(ask(Question({"sweep": ["my-name", other]}))["items"]) == 9
    assert "there is no sweep" in refused(insights.jobs, filter=f"sweep = {first[:7]}").sentence
    shared = next(first[:n] for n in range(35, 0, -1) if second.startswith(first[:n]))
    assert len(shared) >= 8, "sweeps of one minute share the beginning of their ids"
    said = refused(insights.jobs, filter=f"sweep = {shared}").sentence
    assert "the ids of several sweeps begin with" in said
    assert first in said


@on_both
def test_a_job_and_a_task_by_the_beginning_of_it(lab: Any, insights: Insights) -> None:
    every = [row["job_id"] for row in insights.results(Question())["items"]]
    assert len(every) == 9
    short = insights.short_ids(every)
    for ask, field, name in ((insights.jobs, "id", "id"), (insights.results, "job_id", "job_id")):
        for ident in every:
            for prefix in (short[ident], short[ident].upper(), ident[:-1], ident):
                assert [row[name] for row in ask(Question(filter=f"{field} = {prefix}"))["items"]] == [ident]
            assert len(ask(Question(filter=f"{field} != {short[ident]}"))["items"]) == 8
        two = [short[ident] for ident in every[:2]]
        assert len(ask(Question(filter=f"{field} in ({two[0]}, {two[1]})"))["items"]) == 2
        assert len(ask(Question({field: two}))["items"]) == 2
        shared = next(every[0][:n] for n in range(35, 0, -1) if every[1].startswith(every[0][:n]))
        said = refused(ask, filter=f"{field} = {shared}").sentence
        assert f"the {field} of more than one job begins with" in said
        assert min(ident for ident in every if ident.startswith(shared)) in said
        assert "there is no job whose" in refused(ask, filter=f"{field} = {'0' * 9}").sentence
    digests = {row.digest for row in lab.rows(tables.tasks, kind="attack")}
    for digest in digests:
        assert insights.results(Question(filter=f"attack_digest = {digest[:12]}")) == insights.results(
            Question(filter=f"attack_digest = {digest}")
        )
        assert insights.results(Question(filter=f"attack_digest = {digest[:12]}"))["items"]


def test_a_sweep_of_more_jobs_than_a_statement_has_parameters(lab: Any, insights: Insights) -> None:
    rows = [
        {"id": f"{n:08x}-0000-7000-8000-000000000000", "name": "nightly", "user": "ann", "spec": {}, "priority": 0,
         "labels": {}, "paused": False, "created_at": 0.0} for n in range(6000)
    ]  # fmt: skip
    with lab.database.write() as connection:
        connection.execute(tables.sweeps.insert(), rows)
    assert insights.jobs(Question(filter="sweep = nightly"))["items"] == []
    assert len(insights.jobs(Question(filter="sweep != nightly"))["items"]) == 9


def at(lab: Any, *moments: float) -> None:
    """Let the jobs of this many have been submitted then, in their order."""
    with lab.database.write() as connection:
        for row, moment in zip(lab.rows(tables.jobs), moments, strict=False):
            for table, name in ((tables.jobs, "id"), (results, "job_id")):
                values = {"created_at": moment, "finished_at": moment}
                connection.execute(update(table).where(table.c[name] == row.id).values(values))


NOON = datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2026, 2, 1, tzinfo=UTC).timestamp()
MOMENTS = [NOON + n for n in (0.0, 0.0004, 0.0006, 0.1239, 0.9996)] + [MIDNIGHT - 0.0004, MIDNIGHT - 0.0006]


def test_a_date_alone_is_that_day(lab: Any, insights: Insights) -> None:
    at(lab, *MOMENTS, MIDNIGHT, MIDNIGHT + 86_400)
    for text, count in (
        ("created_at = 2026-01-31", 6), ("created_at != 2026-01-31", 3), ("created_at in (2026-01-31, 2026-02-02)", 7),
        ("created_at not in (2026-01-31, 2026-02-02)", 2), ("created_at < 2026-02-01", 6),
        ("created_at <= 2026-01-31", 6), ("created_at > 2026-01-31", 3), ("created_at >= 2026-02-01", 3),
        ("created_at = 20260131", 6), ("created_at = '2026-01-31T12:00:00'", 2), ("created_at = 2026-01-30", 0),
        ("created_at = 2026-01-31T13:00:00+01:00", 2),
    ):  # fmt: skip
        for ask in (insights.jobs, insights.results):
            assert len(ask(Question(filter=text))["items"]) == count, text
    assert len(insights.jobs(Question({"created_at": ["2026-01-31"]}))["items"]) == 6
    assert len(insights.jobs(Question(filter="created_at = 9999-12-31"))["items"]) == 0


@on_both
def test_a_time_that_is_shown_finds_its_row_and_is_the_same_in_every_format(lab: Any, insights: Insights) -> None:
    at(lab, *MOMENTS)
    with lab.database.write() as connection:
        connection.execute(update(results).values(retracted_at=results.c.created_at))
    times_of = {"results": ("created_at", "finished_at", "retracted_at"), "jobs": ("created_at", "finished_at")}
    assert {name for name, field in RESULTS.known.items() if field.kind == "time"} == set(times_of["results"])
    assert {name for name, field in JOBS.known.items() if field.kind == "time"} == set(times_of["jobs"])
    names = ("job_id", *times_of["results"])
    every = insights.results(Question(fields=names, retracted=True))["items"]
    rows = {row["job_id"]: {name: row[name] for name in names} for row in every}
    assert len(rows) == 9
    for job_id, shown in rows.items():
        for ask, key, noun in ((insights.jobs, "id", "jobs"), (insights.results, "job_id", "results")):
            for name in times_of[noun]:
                question = Question(filter=f'{name} = "{shown[name]}"', retracted=noun == "results")
                found = [row[key] for row in ask(question)["items"]]
                assert job_id in found, (name, shown)
                assert {rows[one][name] for one in found} == {shown[name]}
    for fields in (names, (*names, "labels.for")):  # the second is made of whole rows
        table = exporting.table(lab.database, Question(fields=fields, retracted=True))
        lines = csv.DictReader(io.StringIO("".join(exporting.csv_lines(table))))
        assert {line["job_id"]: {name: line[name] for name in names} for line in lines} == rows
        parquet = pq.read_table(io.BytesIO(b"".join(exporting.parquet_bytes(table)))).to_pylist()
        for row in parquet:
            as_text = {name: row[name].isoformat(timespec="milliseconds")[:-6] + "Z" for name in names[1:]}
            assert {"job_id": row["job_id"], **as_text} == rows[row["job_id"]]
        assert len(parquet) == 9
    as_json = exporting.json_lines(insights.all_results(Question(fields=names, retracted=True)))
    assert {row["job_id"]: {name: row[name] for name in names} for row in map(json.loads, as_json)} == rows


@given(st.floats(-6e10, 2.5e11))
def test_the_span_of_a_shown_time_has_it(seconds: float) -> None:
    shown = times.iso(seconds)
    assert shown is not None
    first, end = times.span(shown)
    assert first <= seconds < end
    assert (times.iso(first), times.milliseconds(end)) == (shown, times.milliseconds(seconds) + 1)


def damaged(cursor: str) -> Iterator[str]:
    for place, sign in enumerate(cursor):
        yield cursor[:place] + ("A" if sign != "A" else "B") + cursor[place + 1 :]
        yield cursor[:place] + cursor[place + 1 :]
        yield cursor[:place] + " " + cursor[place:]
    yield from (cursor + "=", cursor + "A", cursor + "\n", "", "x", "\x00", "é", "bnVsbA")


def test_a_cursor_that_is_damaged_in_any_place_is_refused(lab: Any, insights: Insights) -> None:
    def of_sweeps(question: Question) -> dict[str, Any]:
        return insights.sweeps(user=None, cursor=question.cursor, limit=question.limit)

    def of_networks(question: Question) -> dict[str, Any]:
        return networks.trained(lab.database, {}, question.cursor, question.limit)

    asks: dict[str, Ask] = {"jobs": insights.jobs, "results": insights.results, "sweeps": of_sweeps}
    asks["networks"] = of_networks
    cursors = {name: ask(Question(limit=1))["next_cursor"] for name, ask in asks.items()}
    for name, ask in asks.items():
        assert len(ask(Question(limit=1, cursor=cursors[name]))["items"]) == 1
        for cursor in damaged(cursors[name]):
            assert "this is not a cursor" in refused(ask, cursor=cursor, limit=1).sentence, (name, cursor)
    for name, other in itertools.permutations(asks, 2):
        assert "cursor" in refused(asks[name], cursor=cursors[other], limit=1).sentence


def test_pages_of_sweeps_belong_to_their_user(lab: Any, insights: Insights) -> None:
    for _ in range(3):
        lab.submit_sweep({"scale": [1]}, user="bob")
    ids: list[str] = []
    cursor = None
    while cursor is not None or not ids:
        page = insights.sweeps(user="bob", cursor=cursor, limit=2)
        ids, cursor = [*ids, *(item["id"] for item in page["items"])], page["next_cursor"] or None
    assert ids == [row.id for row in lab.rows(tables.sweeps, user="bob")][::-1]
    cursor = insights.sweeps(user="bob", cursor=None, limit=1)["next_cursor"]
    for user in ("ann", None):
        with pytest.raises(InvalidQuery, match="another question"):
            insights.sweeps(user=user, cursor=cursor, limit=1)
    for user, said in (("bbo", "did you mean bob"), ("a\x00", "control character"), ("", "unknown user ''")):
        with pytest.raises(InvalidQuery, match=said):
            insights.sweeps(user=user, cursor=None, limit=1)


def test_networks_of_what_there_is(lab: Any, insights: Insights) -> None:
    assert networks.trained(lab.database, {"architecture": "resnet18"}, None, 10)["items"] == []
    for name, value in (("architecture", "mpl"), ("dataset", "digit"), ("recipe", "standart"), ("recipe", "imported")):
        with pytest.raises(InvalidQuery, match=f"{name}: unknown {name}"):
            networks.trained(lab.database, {name: value}, None, 10)
    with pytest.raises(InvalidQuery, match="64 hexadecimal digits"):
        networks.trained(lab.database, {"weights_sha256": "foo"}, None, 10)


@pytest.fixture
def http(lab: Any, insights: Insights, tmp_path: Path) -> Iterator[TestClient]:
    url = lab.database.engine.url.render_as_string(hide_password=False)
    app = create_app(Settings(home=tmp_path, database_url=url))
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
        yield http
    app.state.service.database.close()


FREE_TEXT = {"reason", "retraction_reason"}
ALSO_NEEDED = {
    "/v1/correlations": {"measure": "log_relative_sharpness_median"},
    "/v1/results:aggregate": {"by": "scale", "metrics": "robust_accuracy:mean"},
    "/v1/events": {"follow": "false"},
    "/v1/results:compare": {"ids": "0" * 8 + "," + "1" * 8},
    "/v1/results:trajectories": {"ids": "0" * 8},
}
OF_WHAT_IS_NOT_THERE = {("/v1/results:trajectories", "ids"), ("/v1/events", "sweep"), ("/v1/events", "job")}
"""Names of things: 404, as in a path."""


def test_each_text_field_has_a_closed_meaning_or_is_named_here_as_free_text() -> None:
    for fields in (JOBS, RESULTS):
        texts = {name for name, field in fields.known.items() if field.kind in ("text", "list")}
        assert {"user", "architecture", "verdict", "measures"} <= texts
        assert {name for name in texts if fields.known[name].meaning is None} == FREE_TEXT & texts
        assert FREE_TEXT & texts


def query_parameters(http: TestClient) -> list[tuple[str, str]]:
    """`(path, name)` of each parameter of each question that names nothing in its path."""
    paths = http.get("/openapi.json").json()["paths"]
    return [
        (path, one["name"])
        for path, verbs in paths.items()
        if "get" in verbs and "{" not in path
        for one in verbs["get"].get("parameters", [])
        if one["in"] == "query" and one["name"] not in FREE_TEXT and path != "/v1/ids"  # which shortens any text
    ]


def test_no_parameter_of_any_route_takes_any_text(http: TestClient) -> None:
    parameters = query_parameters(http)
    assert len({path for path, _ in parameters}) > 10
    assert {("/v1/jobs", "state"), ("/v1/networks", "recipe"), ("/v1/tokens", "user")} <= set(parameters)
    for path, name in parameters:
        answer = http.get(path, params={**ALSO_NEEDED.get(path, {}), name: "nothing of this"})
        assert answer.status_code == (404 if (path, name) in OF_WHAT_IS_NOT_THERE else 422), (path, name, answer.text)
        assert name in answer.text or answer.status_code == 404, (path, name, answer.text)


@on_both
def test_over_rest(http: TestClient) -> None:
    closed = {name for fields in (JOBS, RESULTS) for name, field in fields.known.items() if field.meaning is not None}
    short = {name for name in closed if "." not in name or name.startswith("recipe.")}
    chosen = [(path, name) for path, name in query_parameters(http) if name in short and path != "/v1/events"]
    assert len(chosen) > 50
    for path, name in chosen:
        for value in ("nothing of this", "a\x00", "x" * 5000):
            answer = http.get(path, params={**ALSO_NEEDED.get(path, {}), name: value})
            assert answer.status_code == 422, (path, name, answer.text)
            assert name in answer.text
            assert len(answer.text) < 1000
    correlated = http.get("/v1/correlations", params={"measure": "log_relative_sharpness_median", "recipe": "standart"})
    assert (correlated.status_code, "did you mean standard" in correlated.text) == (422, True)
    assert len(http.get("/v1/jobs", params={"sweep": "my-name"}).json()["items"]) == 8
    for format in ("csv", "ndjson", "parquet"):
        answer = http.get("/v1/results", params={"format": format, "filter": "not verdict in (suspct, invald)"})
        assert (answer.status_code, "did you mean suspect" in answer.text) == (422, True)


def ids_of(text: str) -> list[tuple[str, Any]]:
    """`(event, data)` of a stream."""
    parts = [dict(line.split(": ", 1) for line in part.split("\n") if ": " in line) for part in text.split("\n\n")]
    return [(part.get("event", ""), json.loads(part.get("data", "null"))) for part in parts if part]


def test_whole_numbers_of_a_query_are_digits(http: TestClient) -> None:
    """As in specs and filters: Python's `int` and pydantic would take most of these."""
    pages: list[tuple[str, str, dict[str, str]]] = [
        (f"/v1/{noun}", "limit", {}) for noun in ("results", "jobs", "sweeps", "networks")
    ]
    for path, name, more in (*pages, ("/v1/events", "after", {"follow": "false"})):
        for text in ("1_0", "+5", "5.0", "5e0", "٥", " 5", "5 ", "05", "", "9" * 5000):
            answer = http.get(path, params={name: text, **more})
            assert answer.status_code == 422, (path, text, answer.text)
            assert name in answer.text
            assert len(answer.text) < 1000
        assert http.get(path, params={name: "5", **more}).status_code == 200
    assert http.get("/v1/events?follow=false", headers={"Last-Event-ID": "1_0"}).status_code == 422
    assert "greater than or equal to 1" in http.get("/v1/results?limit=-1").text


def test_an_event_that_is_not_there_yet(lab: Any, http: TestClient) -> None:
    newest = max(row.id for row in lab.rows(tables.events))
    for asked, name in (
        ({"params": {"after": newest + 1}}, "after"),
        ({"headers": {"Last-Event-ID": "9" * 12}}, "Last"),
    ):
        answer = http.get("/v1/events", **asked)
        assert answer.status_code == 422
        assert f"the newest is {newest}" in answer.text
        assert name in answer.text
    answer = http.get("/v1/events", params={"after": newest, "follow": False})
    assert ids_of(answer.text) == [("", None), ("end", {"last_id": newest})]


def test_who_is_behind_when_events_are_dropped_is_told_of_the_gap(lab: Any) -> None:
    """In the middle of a stream: its reader took nothing for so long that what waited for it was given up."""
    ann, insights, access = Caller("ann"), Insights(lab.database), Access(lab.database)
    newest = insights.last_event()
    start = Start(newest, newest + 1, {"sweep_id": None, "job_id": None})
    reader, all_of_it = Reader(ann, since=newest), list[Any]()

    async def told() -> list[bytes]:
        stream = _followed(_Past(insights, access, ann, start), reader, Feed(insights, access, lambda: False))
        begin = await anext(stream)
        for seed in range(MOST_PENDING + 1):
            lab.submit(seed=100 + seed)
            reader.give([])
        all_of_it.extend(lab.rows(tables.events))
        kept = all_of_it[-2].id
        with lab.database.write() as connection:
            connection.execute(tables.events.delete().where(tables.events.c.id < kept))
        came = [begin, await anext(stream), await anext(stream)]
        assert isinstance(stream, AsyncGenerator)
        await stream.aclose()
        return came

    begin, gap, rest = asyncio.run(told())
    kept = lab.rows(tables.events)[0].id
    assert begin == f"id: {newest}\n\n".encode()
    assert ids_of(gap.decode()) == [("gap", {"from": newest + 1, "to": kept - 1})]
    assert [one["id"] for _, one in ids_of(rest.decode())] == [kept, kept + 1]
    with lab.database.write() as connection:  # what is left is to have no gap: the lab looks at all of it
        connection.execute(tables.events.insert(), [dict(row._mapping) for row in all_of_it if row.id < kept])


def test_events_that_were_dropped_are_told_as_a_gap(lab: Any, http: TestClient) -> None:
    events, newest_sweep = lab.rows(tables.events), lab.rows(tables.sweeps)[-1].id
    oldest = events[len(events) // 2].id
    with lab.database.write() as connection:
        connection.execute(tables.events.delete().where(tables.events.c.id < oldest))

    def told(**asked: Any) -> list[tuple[str, Any]]:
        return [told for told in ids_of(http.get("/v1/events", params={**asked, "follow": False}).text) if told[0]]

    gap = ("gap", {"from": 1, "to": oldest - 1})
    assert told(after=0)[0] == gap
    assert told(after=0)[1][1]["id"] == oldest
    assert told(after=5)[0] == ("gap", {"from": 6, "to": oldest - 1})
    assert told(after=oldest - 1)[0][1]["id"] == oldest
    assert told(sweep=lab.rows(tables.sweeps)[0].id)[0] == gap
    with lab.database.write() as connection:  # a sweep that was submitted after what is gone misses nothing
        connection.execute(update(tables.sweeps).where(tables.sweeps.c.id == newest_sweep).values(created_at=4e9))
    assert "gap" not in [event for event, _ in told(sweep=newest_sweep)]
    with lab.database.write() as connection:  # what is left is to have no gap: the lab looks at all of it
        connection.execute(tables.events.insert(), [dict(row._mapping) for row in events if row.id < oldest])

"""The filter grammar: every filter means on both databases what its tree means in plain Python."""

import base64
import hashlib
import io
import json
import operator
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update
from sqlalchemy import text as sql

from api.http.app import create_app
from service.errors import InvalidQuery
from service.model.dotted import flat
from service.model.executor import Succeeded
from service.model.query import And, Comparison, Node, Not, Operator, Or, Value, names_of, parse
from service.model.verdict import OUTCOMES, VERDICTS
from service.results import aggregates, exporting
from service.results.insights import Insights, Question
from service.results.questions import nodes_of
from service.settings import Settings
from service.specs import JobSpec
from service.specs.attacks import PRESETS
from service.specs.base import number
from service.specs.parameters import closed_lists
from service.specs.recipes import KNOWN
from service.store import tables
from service.store.job_fields import JOBS
from service.store.keyset import CHECKSUM_BYTES
from service.store.result_fields import RESULTS
from service.store.result_tables import cells
from service.store.spec_fields import SHORT, SPEC_KINDS

EASY = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PYTHON: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "~": lambda text, part: part in text,
}  # fmt: skip
KEYWORDS = ("and", "or", "not", "in", "is", "null")
NUMBERS = ["0", "1", "0.5", "8/255", "-2.5", "1e-3", "0.25", "5", "10", "25", "0.1"]
VALUES: dict[str, list[str]] = {
    "text": [
        "mlp", "simple_cnn", "linf", "l2", "pgd", "cw", "transfer", "ann", "Bob o'Hara", "trusted", "invalid", "", "p",
        "é\"\\'", "cross_entropy", "float32", "tests", "passed", "2.1", "standard", "digits", "N", "%",
    ],
    "number": NUMBERS,
    "integer": ["0", "1", "2", "10", "16", "25", "100"],
    "boolean": ["true", "false", "True"],
    "time": ["2020-01-01", "2999-12-31T23:59:59Z", "2026-01-01T12:00:00+02:00"],
    "list": ["masked", "zero_gradient", "sam_sharpness", "fisher_rao", "e"],
}  # fmt: skip
OPERATORS = {
    "text": ["=", "!=", "<", "<=", ">", ">=", "~", "in", "not in"],
    "boolean": ["=", "!=", "in", "not in"],
    "list": ["=", "in", "~"],
}
ORDER = ("<", "<=", ">", ">=")
CLOSED: dict[str, list[str]] = {
    **{name: list(texts) for name, texts in closed_lists().items()},
    **{short: list(closed_lists()[name]) for short, name in SHORT.items()},
    "dataset": ["digits", "cifar10"], "adversary": ["white_box", "black_box", "transfer", "noise"],
    "user": ["ann", "Bob o'Hara"], "owner": ["ann", "Bob o'Hara"], "state": ["succeeded", "failed"],
    "verdict": list(VERDICTS), "verdict_reasons": ["masked", "zero_gradient"], "flags": ["not_monotone"],
    "measures": ["sam_sharpness", "fisher_rao", "lipschitz"], "verdict_checks.masked": list(OUTCOMES),
    "verdict_checks.weaker_than:square": list(OUTCOMES), "retracted_by": ["ann", "Bob o'Hara"],
    "threat_model": ["linf 8/255", "l2 0.5"],
    **{name: ["01a22e44-9123-71d6-aad1-a6e470f2988b"] for name in ("id", "job_id")},
    **{
        name: ["0" * 64, "a1" * 32]
        for name in ("spec_digest", "attack_digest", "weights_sha256", *SPEC_KINDS)
        if name.endswith((".checkpoint", "_digest", "weights_sha256"))
    },
}  # fmt: skip
KINDS: dict[str, str] = {
    **{name: field.kind for name, field in RESULTS.known.items()}, "labels.for": "text", "labels.none": "text",
    "verdict_checks.masked": "text", "verdict_checks.weaker_than:square": "text", "provenance.torch": "text",
    "provenance.wall_seconds": "number", "provenance.code_dirty": "boolean", "flip_rate": "number",
    "sam_sharpness": "number",
}  # fmt: skip


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, kept: Any) -> str:
    """What differs between the two is the store's, and its contract runs on both by default."""
    url: str = kept.emptied(request.param).url
    return url


@pytest.fixture
def history(lab: Any) -> Insights:
    """Results of all sorts: with and without a ball, labels, numbers; of two users; some numbers missing."""
    grid = {"scale": [1, 5], "attack": ["pgd_linf", "pgd_l2", "cw", "transfer"], "seed": [0, 1]}
    lab.submit_sweep(grid, user="ann", labels={"for": "tests"})
    lab.submit(user="Bob o'Hara", architecture="simple_cnn", measures=["sam_sharpness", "fisher_rao"], attack_seed=2)
    lab.submit(user="Bob o'Hara", recipe={"name": "adversarial", "epochs": 10}, scale=5, scale_bias=False)
    while grants := lab.grant():
        for i, grant in enumerate(grants):
            outcome = lab.outcome(grant, **numbers_of(grant, i))
            outcome.provenance.update({"torch": f"2.{i % 3}", "wall_seconds": i / 4 if i % 3 else "long"})
            outcome.provenance.update({} if i % 4 else {"code_dirty": True})
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))
    return Insights(lab.database)


def numbers_of(grant: Any, i: int) -> dict[str, Any]:
    spec = grant.spec
    if spec["kind"] == "attack":
        return {"robust_accuracy": (i % 5) / 4, "flip_rate": None if i % 3 else 0.25, "robust_loss": 8 / 255 * (i % 2)}
    if spec["kind"] == "measure":
        named = {spec["measure"]["type"]: float(i % 2)}
        return {"log_relative_sharpness_median": -2.5 if i % 2 else None, **named}
    return {}


def word(text: str, bare: bool = False) -> str:
    if bare and re.fullmatch(r"[\w./:+-]+", text, re.ASCII) and text.lower() not in KEYWORDS:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def rendered(node: Node, brackets: bool = True, bare: bool = False) -> str:
    """The text of a tree: with `brackets` round everything, or only where it would mean another tree without."""

    def within(inner: Node, *looser: type[Node]) -> str:
        text = rendered(inner, brackets, bare)
        return f"({text})" if brackets or isinstance(inner, looser) else text

    match node:
        case Comparison(name, "is null" | "is not null" as how):
            return f"{name} {how}"
        case Comparison(name, "in" | "not in" as how, values):
            return f"{name} {how.upper()} ({', '.join(word(value.text, bare) for value in values)})"
        case Comparison(name, how, values):
            return f"{name}{how}{word(values[0].text, bare)}"
        case Not(inner):
            return f"not {within(inner, And, Or)}"
        case And(parts):
            return " and ".join(within(part, And, Or) for part in parts)
        case Or(parts):
            return " or ".join(within(part, Or) for part in parts)


@st.composite
def comparison(draw: st.DrawFn, kinds: dict[str, str]) -> Comparison:
    name = draw(st.sampled_from(sorted(kinds)))
    kind = kinds[name]
    named = name in CLOSED or name in ("sweep", "sweep_id")
    allowed = OPERATORS.get(kind, [*OPERATORS["boolean"], *OPERATORS["text"][2:6]])
    how = draw(st.sampled_from([*(one for one in allowed if not (named and one in ORDER)), "is null", "is not null"]))
    many = 0 if "null" in how else 3 if "in" in how else 1
    known = how in OPERATORS["boolean"]
    if (known or how == "~") and name in ("sweep", "sweep_id"):  # which stand for ids: `test_a_sweep_by_its_name`
        how = "is null"
        many = 0
    values = VALUES[kind]
    if name in CLOSED:
        values = CLOSED[name] if known else [text[: 1 + len(text) // 2] for text in CLOSED[name]]
    values = draw(st.lists(st.sampled_from(values), min_size=min(many, 1), max_size=many))
    return Comparison(name, cast(Operator, how), tuple(map(Value, values)))


def trees(kinds: dict[str, str]) -> st.SearchStrategy[Node]:
    found: st.SearchStrategy[Node] = st.recursive(
        comparison(kinds),
        lambda inner: st.one_of(
            st.builds(Not, inner),
            st.builds(And, st.lists(inner, min_size=2, max_size=3).map(tuple)),
            st.builds(Or, st.lists(inner, min_size=2, max_size=3).map(tuple)),
        ),
        max_leaves=6,
    )
    return found


def typed(kind: str, text: str) -> Any:
    match kind:
        case "number" | "integer":
            return number(text)
        case "boolean":
            return text.lower() == "true"
        case "time":  # a day, or a millisecond
            day = len(text) == len("2020-01-01")
            first = round(1000 * datetime.fromisoformat(text + "T00:00:00Z" if day else text).timestamp())
            return range(first, first + (86_400_000 if day else 1))
    return text


def in_time(how: str, value: int, spans: list[range]) -> bool:
    """Whether a time in milliseconds is, comes before or behind what a filter asks for."""
    [first, *_] = spans
    within = any(value in span for span in spans)
    return {
        "=": within, "in": within, "!=": not within, "not in": not within, "<": value < first.start,
        "<=": value < first.stop, ">": value >= first.stop, ">=": value >= first.start,
    }[how]  # fmt: skip


def holds(node: Node, row: dict[str, Any], kinds: dict[str, str]) -> bool:
    """What the tree means, as the docstring of the grammar says it."""
    match node:
        case Not(inner):
            return not holds(inner, row, kinds)
        case And(parts):
            return all(holds(part, row, kinds) for part in parts)
        case Or(parts):
            return any(holds(part, row, kinds) for part in parts)
    assert isinstance(node, Comparison)
    kind, how = kinds[node.field], node.operator
    value: Any = row.get(node.field)
    wanted = [typed(kind, given.text) for given in node.values]
    present: list[Any] = value if kind == "list" else [] if value is None else [value]
    if "null" in how:
        return (how == "is null") == (not present)
    if kind == "time":
        return bool(present) and in_time(how, present[0], wanted)
    if "in" in how:
        return bool(present) and (how == "in") == any(one in wanted for one in present)
    return any(PYTHON[how](one, wanted[0]) for one in present)


def rows_of(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by the names of fields, times in milliseconds."""
    rows = []
    for item in items:
        row = dict(flat(item))
        row |= {"verdict_reasons": item["verdict_reasons"], "measures": item["measures"]}
        row |= {"attack": row["attack.type"], "recipe": row["recipe.name"], "sweep": row["sweep_id"]}
        ball = item["attack"].get("attack", item["attack"])  # of a transfer, that of the attack it rests on
        row |= {"attack.norm": ball.get("norm"), "norm": ball.get("norm"), "attack.eps": ball.get("eps")}
        for name in ("created_at", "finished_at"):
            row[name] = round(1000 * datetime.fromisoformat(item[name]).timestamp())
        row["owner"] = row["user"]
        if not isinstance(row.get("provenance.wall_seconds"), float):
            row["provenance.wall_seconds"] = None
        rows.append(row)
    return rows


def test_a_filter_means_what_its_tree_means(history: Insights) -> None:
    rows = rows_of(history.results(Question(limit=1000, fields=("*",)))["items"])
    assert len(rows) == 18
    assert {row["sam_sharpness"] for row in rows if "sam_sharpness" in row} != set()

    @EASY
    @given(trees(KINDS), st.booleans(), st.booleans())
    def check(node: Node, brackets: bool, bare: bool) -> None:
        text = rendered(node, brackets, bare)
        assert parse(text) == node
        found = history.results(Question(filter=text, limit=1000))["items"]
        assert {row["job_id"] for row in found} == {row["job_id"] for row in rows if holds(node, row, KINDS)}, text

    check()


def test_a_filter_of_jobs(history: Insights) -> None:
    fields = {name: field.kind for name, field in JOBS.known.items() if field.kind != "time" and name != "reason"}
    kinds: dict[str, str] = {**fields, "labels.for": "text", "verdict_checks.masked": "text"}
    rows = []
    for item in history.jobs(Question(limit=1000))["items"]:
        result = rows_of([history.result(item["id"])])[0]
        rows.append({**result, "id": item["id"], "state": item["state"], "priority": item["priority"]})

    @EASY
    @given(trees(kinds))
    def check(node: Node) -> None:
        found = history.jobs(Question(filter=rendered(node), limit=1000))["items"]
        assert {row["id"] for row in found} == {row["id"] for row in rows if holds(node, row, kinds)}, rendered(node)

    check()


def test_missing_values() -> None:
    row = {"attack.eps": None}
    for text, truth in [
        ("attack.eps = 1", False), ("attack.eps != 1", False), ("not attack.eps = 1", True),
        ("attack.eps is null", True),
        ("attack.eps not in (1)", False), ("not attack.eps not in (1)", True),
    ]:  # fmt: skip
        assert holds(parse(text), row, {"attack.eps": "number"}) is truth


REFUSED = [
    ("architecture = mlp and atack.eps = 1", 23, "did you mean attack.eps"),
    ("flip_rat > 0", 0, "did you mean flip_rate"),
    ("scale = five", 8, "not a number or a fraction"),
    ("scale in (1, 2/0)", 13, "divides by zero"),
    ("seed = 1.5", 7, "not a whole number"),
    ("seed = 99999999999999999999", 7, "not a whole number"),
    ("attack.random_start = maybe", 22, "neither true nor false"),
    ("created_at > yesterday", 13, "no time such as"),
    ("attack.random_start < true", 0, "is a boolean"),
    ("scale ~ 5", 0, "is a number"),
    ("verdict_reasons != masked", 0, "use `not (verdict_reasons in"),
    ("architecture = ", 15, "it ends where there could be a value"),
    ("architecture mlp", 13, "an operator"),
    ("provenance.tourch = 2", 0, "did you mean provenance.torch"),
    ("user = 'a\x00'", 7, "control character"),
]


def test_what_is_refused_says_where(history: Insights) -> None:
    for text, position, said in REFUSED:
        with pytest.raises(InvalidQuery, match="filter") as refused:
            history.results(Question(filter=text))
        assert refused.value.position == position, text
        assert said in refused.value.sentence


def test_nothing_that_is_typed_breaks_it(history: Insights) -> None:
    pieces = st.sampled_from(
        ["and", "or", "not", "(", ")", "=", "!=", "<", "~", "in", "is", "null", ",", "'", '"', "\\", "scale", "5",
         "8/255", "attack.eps", "labels.x", "labels.", ".", "provenance.", "nan", "1e999", "-", "created_at",
         "9999-12-31", "\x00", "\ud800", "measures", "verdict_reasons", "flip_rate", " ", "𝟙", "٣"]
    )  # fmt: skip
    texts = st.one_of(st.text(max_size=40), st.lists(pieces, max_size=12).map(" ".join))

    @settings(EASY, max_examples=150)
    @given(
        texts, st.sampled_from(["created_at", "-scale", "verdict,-flip_rate", "labels.for", "measures", "colour", ""])
    )
    def check(text: str, sort: str) -> None:
        for ask in (history.results, history.jobs):
            with suppress(InvalidQuery):
                ask(Question(filter=text, sort=sort, limit=2))

    check()


def test_a_forged_cursor_is_refused(history: Insights) -> None:
    sorts = ["created_at", "-scale", "architecture", "verdict,-flip_rate", "attack.random_start", "recipe.epochs"]
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\x00"),
        st.lists(st.integers(), max_size=2), st.just(10**400),
    )  # fmt: skip

    @settings(EASY, max_examples=80)
    @given(st.sampled_from(sorts), st.lists(values, max_size=3), values)
    def check(sort: str, ends: list[Any], sequence: Any) -> None:
        question = Question(sort=sort, limit=1)
        real = history.results(question)["next_cursor"]
        fingerprint = json.loads(base64.urlsafe_b64decode(real + "=" * (-len(real) % 4))[CHECKSUM_BYTES:])[0]
        packed = json.dumps([fingerprint, ends, sequence], separators=(",", ":")).encode()
        sealed = hashlib.sha256(packed).digest()[:CHECKSUM_BYTES] + packed
        forged = base64.urlsafe_b64encode(sealed).decode().rstrip("=")
        for cursor in (forged, forged[:-3], f"{sequence}"):
            with suppress(InvalidQuery):
                history.results(Question(sort=sort, cursor=cursor, limit=1))

    check()


def scalars_of_specs() -> set[str]:
    """The dotted names of all scalars of real specs: of every attack and recipe, also of a transfer's own."""
    recipes: list[Any] = [{"name": name} for name in KNOWN]
    sources = [{"architecture": "mlp", "recipe": recipe} for recipe in recipes]
    inner = [attack for attack in PRESETS.values() if attack.type in ("pgd", "fgsm", "apgd")]
    attacks: list[Any] = [*PRESETS.values(), *({"type": "transfer", "attack": attack} for attack in inner)]
    attacks += [{"type": "transfer", "attack": inner[0], "source": source} for source in sources]
    specs = [{"attack": attack} for attack in attacks] + [{"attack": "cw", "recipe": recipe} for recipe in recipes]
    found: set[str] = set()
    for spec in specs:
        job = JobSpec.model_validate({"architecture": "mlp", "dataset": "digits", "samples": 20, **spec})
        found |= {name for name, _ in flat(job.model_dump(mode="json"))}
    return found - {"measures", "attack.source", "attack.source.recipe"}  # a list, and what there is none of


def test_every_scalar_of_a_spec_can_be_asked_for(history: Insights) -> None:
    assert scalars_of_specs() <= SPEC_KINDS.keys()
    assert {"attack.attack.random_start", "attack.source.recipe.lr", "attack.source.replicate"} <= scalars_of_specs()
    for name in SPEC_KINDS:
        assert len(history.results(Question(filter=f"{name} is null or {name} is not null", sort=name))["items"]) == 18


def test_labels_of_any_name_can_be_asked_for(lab: Any) -> None:
    labels = {"my key": "a", "café": "b", "x.y": "c", "k:1,2": "d", "(": "e", "and": "f"}
    lab.submit_sweep({"scale": [1]}, labels=labels)
    lab.submit_sweep({"scale": [5]})
    lab.finish()
    insights = Insights(lab.database)
    for key, value in labels.items():
        named = f'labels."{key}"'
        for text in (f"{named} = {value}", f"{named} in ({value})", f"{named} is not null"):
            assert len(insights.jobs(Question(filter=text))["items"]) == 1, text
            assert len(insights.results(Question(filter=text))["items"]) == 1, text
        assert len(insights.jobs(Question({"label": [f'"{key}":{value}']}))["items"]) == 1
        [first, _] = insights.results(Question(sort=f"-{named}", fields=names_of(f"job_id,{named}")))["items"]
        assert first["labels"] == {key: value}
        table = exporting.table(lab.database, Question(sort=f"-{named}", fields=names_of(named)))
        [[column]] = table.batches()
        assert column == [value, None]
    assert len(insights.jobs(Question({"label": ["my key:a", "x.y:c"]}))["items"]) == 1


def test_labels_that_were_stored_in_escapes_are_found(lab: Any) -> None:
    job_id = lab.submit()
    lab.finish()
    with lab.database.write() as connection:
        connection.execute(sql("""UPDATE jobs SET labels = '{"caf\\u00e9": "b"}'"""))
    for ask in (Insights(lab.database).jobs, Insights(lab.database).results):
        [row] = ask(Question(filter='labels."café" = b'))["items"]
        assert row.get("id", row.get("job_id")) == job_id


def test_a_whole_number_that_no_column_holds_breaks_no_question(lab: Any) -> None:
    for seed in range(3):
        lab.submit(seed=seed, recipe={"train_samples": 100})
    lab.finish()
    ids = [row.id for row in lab.rows(tables.jobs)]
    with lab.database.write() as connection:  # as specs could be before they had a bound
        for job_id, number in zip(ids, (10**12, 10**30), strict=False):
            [row] = connection.execute(select(tables.jobs.c.spec).where(tables.jobs.c.id == job_id))
            spec = {**row.spec, "recipe": {**row.spec["recipe"], "train_samples": number}}
            connection.execute(update(tables.jobs).where(tables.jobs.c.id == job_id).values(spec=spec))
        [cell] = connection.execute(select(cells))
        spec = {**cell.spec, "recipe": {**cell.spec["recipe"], "train_samples": 10**30}}
        connection.execute(update(cells).values(spec=spec))
    insights = Insights(lab.database)
    assert len(insights.jobs(Question(filter="recipe.train_samples > 5"))["items"]) == 2
    assert len(insights.jobs(Question(filter="recipe.train_samples = 100"))["items"]) == 1
    assert [job["id"] for job in insights.jobs(Question(sort="-recipe.train_samples"))["items"]] == [
        ids[0],
        ids[2],
        ids[1],
    ]
    assert insights.results(Question(filter="recipe.train_samples > 5"))["items"] == []


def test_what_the_provenance_says_of_the_data(lab: Any) -> None:
    lab.submit()
    for grant in iter(lambda: lab.grant(), []):
        for one in grant:
            outcome = lab.outcome(one)
            outcome.provenance.update({"seed": 3, "pid": 4711, "task_kind": one.spec["kind"], "dataset": "digits"})
            outcome.provenance.update({"dataset_files_sha256": ["ab" * 32, None], "attack_seed": None})
            lab.record(Succeeded(one.task_id, one.attempt, outcome))
    insights = Insights(lab.database)
    for text_, count in (
        ("provenance.seed = 3 and provenance.pid > 1", 1), ("provenance.task_kind = attack", 1),
        ("provenance.dataset = digits and versions.control = 1", 1), ("provenance.attack_seed is null", 1),
        (f"provenance.dataset_files_sha256 = {'ab' * 32}", 1), ("provenance.dataset_files_sha256 ~ ef", 0),
        ("provenance.dataset_files_sha256 is null", 0),
    ):  # fmt: skip
        assert len(insights.results(Question(filter=text_))["items"]) == count, text_


def test_simple_filters_count_too() -> None:
    assert len(nodes_of("scale = 1", {"label": ["a:b"] * 199})) == 200
    with pytest.raises(InvalidQuery, match="more than 200 comparisons"):
        nodes_of("scale = 1", {"label": ["a:b"] * 200})


def test_no_question_breaks_the_server(history: Insights, tmp_path: Path) -> None:
    """Whatever stands in `fields`, `sort`, `by`, `metrics` and `label`, in every format: rows, or what is wrong."""
    names = [
        "scale", "owner", "norm", "sweep", "attack", "attack.norm", "attack.source.seed", "attack.source.recipe.lr",
        "recipe", "recipe.train_samples", "labels", "labels.for", 'labels."a, b"', "labels.a.b", "versions",
        "versions.control", "versions.train.x", "provenance", "provenance.torch", "provenance.torch.x",
        "provenance.dataset_files_sha256", "verdict_checks", "verdict_checks.masked", "attack_digest", "spec_digest",
        "measures", "measures.sam_sharpness.rho", "measures.sam_sharpness.x", "verdict_reasons", "verdict_version",
        "flip_rate", "sam_sharpness", "seed", "created_at", "retracted_at", "colour", "", "*", "é", '"', ".", "-scale",
    ]  # fmt: skip
    statistics = [*aggregates.STATISTICS, "q05", "x"]
    listed = st.lists(st.sampled_from(names), max_size=6).map(",".join)
    metrics = st.lists(
        st.one_of(st.tuples(st.sampled_from(names), st.sampled_from(statistics)).map(":".join), st.sampled_from(names)),
        max_size=3,
    ).map(",".join)
    labels = st.lists(st.sampled_from(["for:tests", "a", "é:1", '"a:b":c', ":", 'x"y:1', "for:"]), max_size=2)
    settings_ = Settings(home=tmp_path, database_url=history.database.engine.url.render_as_string(hide_password=False))
    app = create_app(settings_)

    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:

        @settings(EASY, max_examples=60)
        @given(listed, listed, listed, metrics, labels, st.sampled_from(["json", "csv", "ndjson", "parquet"]))
        def check(fields: str, sort: str, by: str, metrics: str, label: list[str], format: str) -> None:
            asked: dict[str, Any] = {"sort": sort or "scale", "label": label}
            cases: list[tuple[str, dict[str, Any]]] = [
                ("/v1/results", {**asked, "fields": fields, "format": format, "limit": 2}),
                ("/v1/jobs", asked),
                ("/v1/results:aggregate", {"by": by, "metrics": metrics, "label": label, "allow_mixed": True}),
                ("/v1/correlations", {"by": by, "measure": "sam_sharpness", "trusted": False}),
            ]
            for path, more in cases:
                answer = http.get(path, params=more)
                assert answer.status_code in (200, 422), (path, more, answer.text)
                if answer.status_code == 200 and path == "/v1/results" and format == "parquet":
                    assert pq.read_table(io.BytesIO(answer.content)).num_rows >= 0

        check()
    app.state.service.database.close()

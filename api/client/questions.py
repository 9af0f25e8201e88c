"""The client's questions about results: rows, statistics, retractions, exports; as data frames on request."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from api.client.transport import Json, Parameter, Transport
from service.errors import UncannyError
from service.model.dotted import flat
from service.model.unit import Unit

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

Names = str | Sequence[str]
Format = Literal["csv", "ndjson", "parquet"]
ENDINGS = (".csv", ".ndjson", ".parquet")
FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".parquet": "parquet",
    "": "parquet",
}


class Questions(Transport):
    """Questions about results. A `filter` is in the grammar of the service.

    Simple filters are keywords, as in `scale=5`, or `scale=[5, 10]` for either; dotted fields as in
    `**{"attack.norm": "linf"}`.
    """

    def results(
        self,
        filter: str | None = None,
        *,
        sort: str = "-created_at",
        fields: Names = "",
        include_retracted: bool = False,
        **filters: Parameter,
    ) -> "Rows":
        """The result rows that match, fetched as they are taken; `fields` may name any stored number, `*` is all."""
        conditions = _conditions(filter, include_retracted, filters)
        return Rows(self, {"sort": sort, **({"fields": _listed(fields)} if fields else {}), **conditions})

    def result(self, job_id: str) -> Json:
        """One result whole: every number of the tasks it rests on, with their provenance."""
        return self._request("GET", f"/v1/results/{job_id}")

    def aggregate(
        self,
        by: Names = "",
        metrics: Names = "",
        filter: str | None = None,
        *,
        unit: Unit = "network",
        allow_mixed: bool = False,
        include_retracted: bool = False,
        **filters: Parameter,
    ) -> "Aggregate":
        """Statistics over groups: `by="scale"`, `metrics="robust_accuracy:mean,ci95"`; a row per group.

        They are over trained networks, each with the mean of its repeats; with `unit="attack_seed"` over the attack
        seeds of one network. Groups that differ in more than seeds are refused, unless `allow_mixed=True`.
        """
        params: Json = {"by": _listed(by), "unit": unit, "allow_mixed": allow_mixed}
        params |= {"metrics": _listed(metrics)} if metrics else {}
        answer = self._request(
            "GET", "/v1/results:aggregate", params={**params, **_conditions(filter, include_retracted, filters)}
        )
        return Aggregate(**answer)

    def compare(self, *job_ids: str) -> Json:
        """Results side by side: what differs, McNemar's test of every two, the union of attacks in one ball."""
        return self._request("GET", "/v1/results:compare", params={"ids": ",".join(job_ids)})

    def leaderboard(
        self,
        filter: str | None = None,
        *,
        attack: str | None = None,
        scale: float | str = 1,
        trusted: bool = True,
        **filters: Parameter,
    ) -> list[Json]:
        """A board for each threat model, data set and number of samples, by worst case; `scale` may be `all`."""
        params = {"scale": scale, "trusted": trusted, **({"attack": attack} if attack else {}), **filters}
        items: list[Json] = self._request(
            "GET", "/v1/leaderboard", params={**params, **({"filter": filter} if filter else {})}
        )["items"]
        return items

    def worst_cases(self, filter: str | None = None, **filters: Parameter) -> list[Json]:
        """`robust_accuracy_worst_case` of each network in each threat model, with the attacks that it is over."""
        params = {**filters, **({"filter": filter} if filter else {})}
        items: list[Json] = self._request("GET", "/v1/worst-cases", params=params)["items"]
        return items

    def correlations(
        self,
        measure: str,
        filter: str | None = None,
        *,
        target: str = "robust_accuracy",
        by: Names = "",
        trusted: bool = True,
        **filters: Parameter,
    ) -> list[Json]:
        """Kendall's tau-b of a measure with `target`, one point per network at s = 1, with bootstrap intervals."""
        params = {"measure": measure, "target": target, "by": _listed(by), "trusted": trusted, **filters}
        items: list[Json] = self._request(
            "GET", "/v1/correlations", params={**params, **({"filter": filter} if filter else {})}
        )["items"]
        return items

    def trajectory(self, job_id: str) -> Json:
        """The curves of a result: `{"attack": {"trajectory": {...}}, "train": {"epochs": {...}}, ...}`."""
        curves: Json = self._request("GET", f"/v1/results/{job_id}/trajectory")["curves"]
        return curves

    def trajectories(self, *job_ids: str, parts: Names = "") -> list[Json]:
        """The curves of several results in one answer: of these parts (`attack`, `train`, ...), or of all."""
        params = {"ids": ",".join(job_ids), "parts": _listed(parts)}
        items: list[Json] = self._request("GET", "/v1/results:trajectories", params=params)["items"]
        return items

    def retract(
        self,
        job_id: str = "",
        reason: str = "",
        *,
        filter: str = "",
        training: str = "",
        task: str = "",
        measure: str = "",
        rerun: bool = False,
    ) -> Json:
        """Hide a result and all that show the same numbers, or every result that a filter chooses.

        With the `training` of a job, or any `task`, everything that rests on it; with a filter and a further `measure`
        only that measure's numbers. With `rerun` they are computed again.
        """
        body: Json = {"reason": reason, "rerun": rerun}
        return self._retraction("retract", job_id, filter, training, task, measure, body)

    def restore(
        self, job_id: str = "", *, filter: str = "", training: str = "", task: str = "", measure: str = ""
    ) -> Json:
        """Take back the retraction that hides a result, that of a task, or all that a filter chooses."""
        return self._retraction("restore", job_id, filter, training, task, measure, {})

    def _retraction(
        self, verb: str, job_id: str, filter: str, training: str, task: str, measure: str, body: Json
    ) -> Json:
        if sum(map(bool, (job_id, filter, training, task))) != 1:
            raise UncannyError("name one of: a job, a filter, the training of a job, a task")
        if measure and not filter:
            raise UncannyError("a measure is that of the results of a filter")
        if filter:
            body = {**body, "filter": filter, **({"measure": measure} if measure else {})}
            return self._request("POST", f"/v1/results:{verb}", json=body, repeatable=True)
        if training:
            tasks = self._request("GET", f"/v1/jobs/{training}")["tasks"]
            [task] = [item["id"] for item in tasks if "train" in item["roles"]]
        path = f"/v1/tasks/{task}:{verb}" if task else f"/v1/results/{job_id}:{verb}"
        return self._request("POST", path, json=body or None, repeatable=True)

    def export(
        self,
        path: str | Path,
        filter: str | None = None,
        *,
        format: Format | None = None,
        **more: Any,  # Any: as `results` takes them
    ) -> Path:
        """Write every row that matches to a file, as it comes. The format follows from the name of the file.

        `more` is as for `results`. The file is there whole or not at all.
        """
        path = Path(path)
        wanted = format or FORMATS.get(path.suffix)
        if wanted is None:
            raise UncannyError(f"{path} ends in none of {', '.join(ENDINGS)}: say which format is meant")
        with whole(path) as partial:
            self._download("/v1/results", {**self.results(filter, **more).params, "format": wanted}, partial)
        return path


@dataclass(frozen=True)
class Rows:
    """Results that match a question: iterated page by page, or all at once as a frame."""

    client: Questions
    params: Mapping[str, Parameter]

    def __iter__(self) -> Iterator[Json]:
        return self.client._pages("/v1/results", self.params)

    @property
    def retracted(self) -> int:
        """How many results match and are hidden because they are retracted, counted up to 1,000."""
        return int(self.client._request("GET", "/v1/results", params={**self.params, "limit": 1})["retracted"] or 0)

    def to_polars(self) -> "pl.DataFrame":
        """Every row, typed, a column per dotted name. Raises `UncannyError` without polars."""
        polars = _library("polars")
        with self._parquet() as path:
            frame: pl.DataFrame = polars.read_parquet(path)
        return frame

    def to_pandas(self) -> "pd.DataFrame":
        """The same for pandas."""
        pandas = _library("pandas")
        with self._parquet() as path:
            frame: pd.DataFrame = pandas.read_parquet(path)
        return frame

    @contextmanager
    def _parquet(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "results.parquet"
            self.client._download("/v1/results", {**self.params, "format": "parquet"}, path)
            yield path


@dataclass(frozen=True)
class Aggregate:
    """Groups in the order of `by`. `spread_of` says what is counted: networks, or attack seeds.

    `mixed` has the fields, other than seeds, that differ within a group. `retracted` results match but are in no group.
    """

    by: list[str]
    metrics: dict[str, list[str]]
    spread_of: str
    items: list[Json]
    mixed: dict[str, list[object]]
    retracted: int = 0

    def __iter__(self) -> Iterator[Json]:
        return iter(self.items)

    def flat(self) -> list[Json]:
        """The groups with dotted names: `{"scale": 1.0, "results": 3, "robust_accuracy.mean": 0.4, ...}`."""
        return [dict(flat(item)) for item in self.items]

    def to_polars(self) -> "pl.DataFrame":
        """A row per group. Raises `UncannyError` without polars."""
        frame: pl.DataFrame = _library("polars").DataFrame(self.flat(), infer_schema_length=None)
        return frame

    def to_pandas(self) -> "pd.DataFrame":
        frame: pd.DataFrame = _library("pandas").DataFrame(self.flat())
        return frame


def _conditions(filter: str | None, include_retracted: bool, filters: Mapping[str, Parameter]) -> Json:
    conditions: Json = {"filter": filter} if filter else {}
    return conditions | ({"include_retracted": True} if include_retracted else {}) | dict(filters)


def _listed(names: Names) -> str:
    return names if isinstance(names, str) else ",".join(names)


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise UncannyError(f"a frame needs {name}: `pip install {name}`") from None


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when all is written. Raises `UncannyError` if that fails."""
    partial = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UncannyError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)

"""A database of every earlier schema is upgraded, and the API answers from it as from one of the newest schema."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from contract.old_databases import load, revisions, rows_of
from fastapi.testclient import TestClient

from api.http.app import create_app
from service.operations import upgrading
from service.settings import Settings

REVISIONS = revisions()
QUICK = REVISIONS[-3:]


def answers(home: Path, revision: str) -> dict[str, Any]:
    """What the API says of the database of this revision, once it is upgraded."""
    with closing(load(home / "uncanny.db", revision)) as database:
        database.upgrade()
        upgrading.upgrade(database)
        database.check_schema()
    with TestClient(create_app(Settings(home=home)), base_url="http://127.0.0.1") as http:
        found = {path: http.get(path).json() for path in ("/v1/jobs", "/v1/results", "/v1/sweeps", "/v1/networks")}
        jobs = found["/v1/jobs"]["items"]
        assert len(jobs) == 4
        paths = [f"/v1/jobs/{job['id']}" for job in jobs]
        paths += [f"/v1/results/{job['id']}" for job in jobs if job["state"] == "succeeded"]
        return found | {path: http.get(path).raise_for_status().json() for path in paths}


@pytest.fixture(scope="module")
def of_the_newest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return answers(tmp_path_factory.mktemp("newest"), REVISIONS[-1])


@pytest.mark.parametrize(
    "revision", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in REVISIONS[:-1]]
)
def test_an_upgraded_one_answers_as_one_of_the_newest_schema(
    tmp_path: Path, of_the_newest: dict[str, Any], revision: str
) -> None:
    assert answers(tmp_path, revision) == of_the_newest


def test_there_is_one_for_every_migration() -> None:
    lacking = [revision for revision in REVISIONS if not rows_of(revision).exists()]
    assert lacking == [], "run `python tests/contract/old_databases.py`"

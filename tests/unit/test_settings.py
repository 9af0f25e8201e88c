"""Settings: flags over environment over defaults, and nothing else reads the environment."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from service.settings import BadSettings, Settings

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("UNCANNY_") or name in ("RAY_ADDRESS", "UV"):
            monkeypatch.delenv(name)


def test_the_embedded_default_lies_under_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/uncanny.db"
    assert settings.artifacts == str(tmp_path / "artifacts")
    assert settings.data == tmp_path / "data"
    assert settings.logs == tmp_path / "logs"
    assert settings.ray_address == ""


def test_home_is_the_users() -> None:
    assert Settings().database == f"sqlite:///{Path.home()}/.uncanny/uncanny.db"


def test_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "UNCANNY_HOME": str(tmp_path), "UNCANNY_PORT": "9", "UNCANNY_ARTIFACT_ROOT": "s3://lab/artifacts",
        "UNCANNY_DATA_DIR": str(tmp_path / "images"), "RAY_ADDRESS": "ray-head:6379",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.home, settings.port, settings.artifacts) == (tmp_path, 9, "s3://lab/artifacts")
    assert (settings.data, settings.ray_address) == (tmp_path / "images", "ray-head:6379")


def test_flags_have_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNCANNY_PORT", "9")
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    settings = Settings(port=10, ray_address="local")
    assert (settings.port, settings.ray_address) == (10, "local")


def test_paths_may_be_written_from_home_or_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(home=Path("here")).home == tmp_path / "here"
    assert Settings(home=Path("~/lab")).home == Path.home() / "lab"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_any_spelling_of_postgresql_takes_our_driver(scheme: str) -> None:
    assert Settings(database_url=f"{scheme}://u:p@h/d").database == "postgresql+psycopg://u:p@h/d"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"), ("PORT", "-1"), ("LEASE_SECONDS", "0"), ("LEASE_SECONDS", "nan"), ("MAX_ERRORS", "0"),
        ("CPUS_PER_TASK", "0"), ("GPUS_PER_TASK", "-1"), ("LOOKAHEAD", "-1"), ("BACKOFF_SECONDS", "-1"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"UNCANNY_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


class TestPasswordFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        (tmp_path / "password").write_text("p@ss/wörd:%\n")
        return tmp_path / "password"

    def test_its_first_line_is_the_password_whatever_is_in_it(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("UNCANNY_DATABASE_PASSWORD_FILE", str(file))
        url = make_url(Settings(database_url="postgresql://ann@db:5433/lab?sslmode=require").database)
        assert (url.username, url.password, url.host, url.port) == ("ann", "p@ss/wörd:%", "db", 5433)
        assert (url.database, url.query["sslmode"]) == ("lab", "require")

    def test_it_travels_to_child_processes_as_a_path(self, file: Path) -> None:
        environment = Settings(database_password_file=file).environment()
        assert environment == {"UNCANNY_DATABASE_PASSWORD_FILE": str(file)}

    @pytest.mark.parametrize("url", ["postgresql://db/lab", "postgresql://ann:secret@db/lab", ""])
    def test_a_url_that_it_does_not_fit(self, file: Path, url: str) -> None:
        with pytest.raises(BadSettings, match="a user alone in the database URL"):
            _ = Settings(database_url=url, database_password_file=file).database

    def test_a_file_that_is_not_there_or_empty(self, tmp_path: Path) -> None:
        settings = Settings(database_url="postgresql://ann@db/lab", database_password_file=tmp_path / "password")
        with pytest.raises(BadSettings, match="cannot be read"):
            _ = settings.database
        (tmp_path / "password").touch()
        with pytest.raises(BadSettings, match="a password in it"):
            _ = settings.database


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:///%3Amemory%3A", "sqlite:///file::memory:?uri=true",
        "sqlite:///file:lab?mode=memory&cache=shared&uri=true", "sqlite:///?cache=shared",
    ],
)  # fmt: skip
def test_a_database_in_memory_is_refused(url: str) -> None:
    """Each process of the service would have one of its own, and all would be lost."""
    with pytest.raises(BadSettings, match="a database in memory"):
        _ = Settings(database_url=url).database


def test_a_file_whose_name_only_has_memory_in_it_is_none() -> None:
    assert Settings(database_url="sqlite:////srv/memory/lab.db").database == "sqlite:////srv/memory/lab.db"

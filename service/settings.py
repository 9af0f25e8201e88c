"""The only reader of the environment: settings, by `UNCANNY_...` variable or flag."""

import json
import re
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.errors import UncannyError
from service.limits import MAX_SWEEP_JOBS, Limits


class BadSettings(UncannyError):
    """The settings contradict each other, or name a file that cannot be read."""


Kind = Literal["train", "measure", "attack", "control"]
ROOT_PATH = re.compile(r"(?!/(v1|docs|healthz|readyz|openapi\.json)(/|$))(/[\w.~-]+)+", re.ASCII)
KINDS: tuple[Kind, ...] = get_args(Kind)


class TaskResources(BaseModel):
    """What tasks of one kind take on the cluster; what is left out is as for all kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0, description="Also where the cluster has none yet.")
    memory_bytes: int = Field(default=0, ge=0, description="Of main memory, reserved; 0 reserves none.")
    accelerator: str = Field(default="", description="A type of GPU as Ray names it, such as A100.")
    custom: dict[str, float] = Field(default_factory=dict, description="Custom resources of the cluster.")

    @field_validator("gpus")
    @classmethod
    def _share_or_whole(cls, gpus: float | None) -> float | None:
        return whole_above_one(gpus)


def whole_above_one(gpus: float | None) -> float | None:
    """Ray gives shares of one GPU, or whole ones."""
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ValueError("a share of one GPU or a whole number of them, such as 0.25, 1 or 2")
    return gpus


class Settings(BaseSettings):
    """Where things are and how patient the service is. Flags of the commands override the environment."""

    model_config = SettingsConfigDict(env_prefix="UNCANNY_", extra="ignore", frozen=True)

    home: Path = Field(
        default=Path("~/.uncanny"), description="Database, artifacts, data and logs of the embedded default."
    )
    database_url: str = Field(
        default="", description="postgresql://... for the lab; a SQLite file under home when empty."
    )
    database_password_file: Path | None = Field(
        default=None, description="A file with the password for a database URL that has a user and none."
    )
    artifact_root: str = Field(
        default="", description="Folder or fsspec URL reachable from every node; under home when empty."
    )
    data_dir: Path | None = Field(
        default=None, description="Where data sets lie or are downloaded to; under home when empty."
    )
    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)
    root_path: str = Field(
        default="", description="The path under which a proxy shows the service, as in /uncanny; none when empty."
    )
    auth: bool = Field(default=False, description="Ask every request for a token; needed to listen beyond loopback.")
    requests_per_minute: int = Field(
        default=6000, ge=0, description="Of one user, where tokens are asked for; 0 is no limit."
    )
    max_open_requests: int = Field(
        default=256,
        ge=0,
        description="Of one user at once, streams among them, where tokens are asked for; 0: no limit.",
    )
    statement_seconds: float = Field(
        default=60.0, gt=0, description="That the database may take for one statement of a request: 503 then."
    )
    insecure: bool = Field(default=False, description="Listen beyond this machine without asking who is there.")
    url: str = Field(default="", description="Where clients find the service; the one of this home when empty.")
    token: str = Field(default="", description="What clients say who they are with.")
    max_body_bytes: int = Field(
        default=16 << 20, gt=0, description="Largest sweep; all other JSON bodies have at most 1 MiB."
    )
    max_upload_bytes: int = Field(default=8 << 30, gt=0, description="Largest artifact that may be uploaded.")
    uv: str = Field(default="", validation_alias="UV", description="Set where `uv run` started this.")
    ray_address: str = Field(
        default="", validation_alias="RAY_ADDRESS", description="An existing cluster; a local Ray when empty."
    )
    ray_port: int = Field(
        default=0, ge=0, le=65535, description="Of the local Ray head that is to be used; `serve` sets it."
    )

    lease_seconds: float = Field(
        default=20.0, gt=0, description="A dispatcher that is silent for so long loses its tasks."
    )
    max_errors: int = Field(default=3, ge=1, description="Application errors after which a task has failed.")
    max_suspect_losses: int = Field(
        default=3, ge=1, description="Workers that a task may kill before it is held for review."
    )
    backoff_seconds: float = Field(
        default=5.0, ge=0, description="Wait before the first retry; doubled each time, with jitter."
    )
    stalled_seconds: float = Field(
        default=600.0, gt=0, description="A running task that does not advance for so long is reported."
    )
    stalled_limit_seconds: float = Field(
        default=3600.0, gt=0, description="One that does not advance for so long is restarted."
    )
    stop_seconds: float = Field(
        default=10.0, ge=0, description="What running tasks get to finish when the service is told to stop."
    )
    cpus_per_task: float = Field(default=1.0, gt=0)
    gpus_per_task: float = Field(default=1.0, ge=0, description="Share of a GPU per task, where the cluster has GPUs.")
    resources: dict[Kind, TaskResources] = Field(
        default_factory=dict,
        description='What each kind of task takes, as JSON: {"train": {"gpus": 1, "memory_bytes": 16000000000}, '
        '"attack": {"gpus": 0.25, "accelerator": "A100"}}.',
    )
    epoch_state_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Least time between two epoch checkpoints of a training, which take 2 % of its time at most; "
        "0: one after every epoch.",
    )
    gc_every_seconds: float = Field(
        default=0.0, ge=0, description="How often the leading dispatcher collects garbage; 0: only `uncanny gc` does."
    )
    gc_age_seconds: float = Field(
        default=86_400.0, ge=3600, description="Bytes that nothing refers to go when they are older than this."
    )
    artifact_quota_bytes: int | None = Field(
        default=None, ge=0, description="Beyond this, epoch states and trajectories of what is over go too."
    )
    event_days: float | None = Field(
        default=None, gt=0, description="How long events are kept; for ever when left out."
    )
    usage_half_life_seconds: float = Field(
        default=7 * 86_400.0, gt=0, description="Usage of so long ago counts half when users are compared."
    )
    weight: float = Field(default=1.0, gt=0, description="Weight of users who have none of their own.")
    max_sweep_jobs: int = Field(
        default=MAX_SWEEP_JOBS, ge=1, description="Jobs that one sweep may have, as it is written."
    )
    max_queued_jobs: int | None = Field(
        default=None, ge=0, description="Jobs that such a user may have queued or running; no limit when left out."
    )
    max_gpus: float | None = Field(
        default=None, gt=0, description="GPUs (without any: slots) that such a user may use at once."
    )
    decision_log: int = Field(default=1000, ge=1, description="Claims that are kept to be replayed.")
    lookahead: int = Field(default=2, ge=0, description="Bundles claimed beyond what the cluster can place now.")

    @field_validator("gpus_per_task")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float | None:
        return whole_above_one(gpus)

    @field_validator("root_path")
    @classmethod
    def _path(cls, path: str) -> str:
        path = path.rstrip("/")
        if path and not ROOT_PATH.fullmatch(path):
            raise ValueError(
                "a path such as /uncanny, of letters, digits and . _ ~ -, that is none of the service's own"
            )
        return path

    @field_validator("home", "data_dir", "database_password_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None

    def environment(self) -> dict[str, str]:
        """These settings as a child process reads them; flags that were given travel this way."""
        fields = type(self).model_fields.items()
        names = {name: str(field.validation_alias or f"UNCANNY_{name.upper()}") for name, field in fields}
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return {names[name]: _written(value) for name, value in given.items() if value is not None}

    @property
    def program(self) -> str:
        """How this program was called, for the commands that it suggests."""
        return "uv run uncanny" if self.uv else "uncanny"

    @property
    def database(self) -> str:
        """The SQLAlchemy URL of the store."""
        path = str(self.home.expanduser().absolute() / "uncanny.db")
        url = self.database_url or "sqlite:///" + path.replace("%", "%25").replace("?", "%3F")
        for prefix in ("postgres://", "postgresql://"):
            if url.startswith(prefix):
                url = "postgresql+psycopg://" + url.removeprefix(prefix)
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in ("sqlite", "postgresql+psycopg"):
            reason = f"it begins with {scheme}://" if separator else "it has no ://"
            raise BadSettings(
                f"UNCANNY_DATABASE_URL is of no database that Uncanny can use ({reason}): write "
                "postgresql://USER@HOST:PORT/NAME, or leave it empty for a file under home"
            )
        if scheme == "sqlite" and _in_memory(url):
            raise BadSettings(
                "UNCANNY_DATABASE_URL is a database in memory, which ends with its process and which no other one "
                "sees: write sqlite:////PATH, or leave it empty for a file under home"
            )
        return url if self.database_password_file is None else _with_password(url, self.database_password_file)

    @property
    def limits(self) -> Limits:
        """The limits of users who have none of their own."""
        return Limits(self.weight, self.max_queued_jobs, self.max_gpus)

    @property
    def artifacts(self) -> str:
        return self.artifact_root or str(self.home.expanduser().absolute() / "artifacts")

    @property
    def data(self) -> Path:
        return self.data_dir or self.home.expanduser().absolute() / "data"

    @property
    def logs(self) -> Path:
        return self.home.expanduser().absolute() / "logs"

    @property
    def spool(self) -> Path:
        """Where finished outcomes wait for a database that is away."""
        return self.home.expanduser().absolute() / "spool"


def _written(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps({name: resources.model_dump(exclude_unset=True) for name, resources in value.items()})
    return str(value)


def _in_memory(url: str) -> bool:
    """Whether SQLite makes no file for it, in each of the forms that SQLAlchemy takes."""
    path, _, query = url.partition("://")[2].partition("?")
    return not path.strip("/") or ":memory:" in unquote(path) or "mode=memory" in unquote(f"{path}?{query}")


def _with_password(url: str, file: Path) -> str:
    """The URL with that file's first line as its user's password. Raises `BadSettings` if that cannot be."""
    try:
        password = file.read_text(encoding="utf-8").partition("\n")[0].strip()
        parts = urlsplit(url)
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"UNCANNY_DATABASE_PASSWORD_FILE cannot be read: {error}") from None
    except ValueError:
        raise BadSettings("UNCANNY_DATABASE_URL cannot be read: write postgresql://USER@HOST:PORT/NAME") from None
    user, at, host = parts.netloc.rpartition("@")
    if not at or ":" in user or not password:
        raise BadSettings("UNCANNY_DATABASE_PASSWORD_FILE needs a password in it, and a user alone in the database URL")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))

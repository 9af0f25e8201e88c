"""The schema: one table per noun, typed columns for what queries need, JSON for the rest.

Ids are UUIDv7 as text; times are seconds since 1970 (UTC) by the database's clock.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

from service.specs.numbers import stored

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


Json = JSON(none_as_null=True)


def _id(name: str = "id", **options: bool) -> Column[str]:
    return Column(name, String(36), **options)  # type: ignore[arg-type]


datasets = Table(
    "datasets",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("train_sha256", String(64), nullable=False),
    Column("test_sha256", String(64), nullable=False),
    Column("channels", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("classes", Integer, nullable=False),
    Column("train_count", Integer, nullable=False),
    Column("test_count", Integer, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("created_at", Float(53), nullable=False),
)

# Weights made elsewhere: the uploaded file, how it is read, and the weights that are used.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("architecture", String(80), nullable=False),
    Column("dataset", String(200), nullable=False),
    Column("channels", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("classes", Integer, nullable=False),
    Column("weights_sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("uploaded_sha256", String(64), nullable=False),
    Column("keys", Json, nullable=False),
    Column("mean", Json, nullable=False),
    Column("std", Json, nullable=False),
    Column("expected_clean_accuracy", Float(53)),
    Column("tolerance", Float(53)),
    Column("stripped_prefix", Text),
    Column("converted_from", Json),
    Column("created_by", String(200), nullable=False),
    Column("created_at", Float(53), nullable=False),
)

sweeps = Table(
    "sweeps",
    metadata,
    _id(primary_key=True),
    Column("name", String(200), nullable=False),
    Column("user", String(200), nullable=False),
    Column("spec", Json, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("labels", Json, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("pause_reason", Text),  # if the service itself has paused it
    Column("created_at", Float(53), nullable=False),
)

FORMER = text("former_digest IS NOT NULL")

tasks = Table(
    "tasks",
    metadata,
    _id(primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("kind", String(20), nullable=False),
    Column("version", Integer, nullable=False),
    Column("spec", Json, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text),
    # The training that the task belongs to: a bundle has tasks of one training, which share its checkpoint.
    Column("train_digest", String(64), nullable=False),
    # The rank of the highest-ranked live, unpaused job that needs the task; the owner of that job is the sponsor.
    Column("priority", Integer, nullable=False),
    Column("sponsor", String(200), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("boosted", Boolean, nullable=False, server_default=text("false")),  # such a job is boosted, by an admin
    Column("needed_by", Integer, nullable=False),  # the number of such jobs when the task was last ranked
    Column("shared", Boolean, nullable=False, server_default=text("false")),  # such jobs have several owners
    Column("waiting_since", Float(53), nullable=False),
    Column("due", Float(53), nullable=False),  # the order of the tasks of one sponsor: `scheduling.due`
    Column("paused", Boolean, nullable=False),  # all live jobs that need it are paused
    # Three counters (service/README.md): grants, whose number fences off reports of earlier attempts; application
    # errors; workers that the task took down.
    Column("attempt", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("suspect_losses", Integer, nullable=False),
    Column("not_before", Float(53), nullable=False),
    Column("holder", String(200)),
    Column("lease_expires_at", Float(53)),
    Column("cancel_requested", Boolean, nullable=False),
    Column("worker", Text),
    Column("progress", Float(53), nullable=False),
    Column("detail", Json, nullable=False),
    Column("resume_digest", String(64)),
    Column("resume_bytes", BigInteger),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    # Found to be wrong later. `retracted_with` is the task that was retracted: itself, or the training it is based on.
    Column("retracted_at", Float(53)),
    Column("retracted_by", String(200)),
    Column("retraction_reason", Text),
    Column("retracted_with", String(36)),
    # The digest until the task was retracted or its weights were replaced. `digest` has been another one since, so that
    # the next job with this digest makes a new task.
    Column("former_digest", String(64)),
    Index("ix_tasks_former", "former_digest", postgresql_where=FORMER, sqlite_where=FORMER),
    Index("ix_tasks_retracted", "retracted_with", postgresql_where=FORMER, sqlite_where=FORMER),
    Index(
        "ix_tasks_claim",
        "sponsor",
        "kind",
        "due",
        "sequence",
        postgresql_where=text("state = 'queued' AND NOT paused"),
        sqlite_where=text("state = 'queued' AND paused = 0"),
    ),
    Index(
        "ix_tasks_running",
        "holder",
        postgresql_where=text("state = 'running'"),
        sqlite_where=text("state = 'running'"),
    ),
    Index(
        "ix_tasks_shared",
        "sponsor",
        postgresql_where=text("state = 'queued' AND NOT paused AND shared"),
        sqlite_where=text("state = 'queued' AND NOT paused AND shared"),
    ),
    Index("ix_tasks_train", "train_digest", "state"),
)

# `task_edges` and `job_tasks` are written only with the rows that they name, tens of thousands at once. They have no
# foreign keys: PostgreSQL would look each row up again, which takes as long as all the rest.
task_edges = Table(
    "task_edges",
    metadata,
    _id("parent_id", primary_key=True),
    _id("child_id", primary_key=True),
    Index("ix_task_edges_child", "child_id"),
)

attempts = Table(
    "attempts",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("worker", Text),
    Column("started_at", Float(53), nullable=False),
    Column("ended_at", Float(53)),
    Column("end", String(40)),  # succeeded, failed, or the reason of a loss
    Column("message", Text),
    Column("traceback", Text),
    Column("missing_digest", String(64)),  # of the weights that the attempt did not find
    Column("provenance", Json),
    # The bundle that the attempt is in, the device share of that bundle, and until when the sponsor was charged.
    Column("bundle", String(200)),
    Column("device_share", Float(53)),
    Column("charged_until", Float(53)),
)

jobs = Table(
    "jobs",
    metadata,
    _id(primary_key=True),
    Column("sequence", BigInteger, nullable=False, unique=True),
    Column("sweep_id", ForeignKey("sweeps.id")),
    Column("user", String(200), nullable=False),
    Column("spec", Json, nullable=False),
    Column("spec_digest", String(64), nullable=False),
    Column("architecture", String(80), nullable=False),
    Column("dataset", String(200), nullable=False),
    Column("scale", Float(53), nullable=False),
    Column("attack", String(40), nullable=False),
    Column("norm", String(10)),
    Column("eps", Float(53)),
    Column("recipe", String(80), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("samples", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("boosted", Boolean, nullable=False, server_default=text("false")),  # by an admin, above other users' jobs
    Column("labels", Json, nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53)),
    # The tasks by the parts that they play in the job; `job_tasks` has these tasks too.
    _id("train_task_id", nullable=False),
    _id("measure_task_id", nullable=False),
    _id("attack_task_id", nullable=False),
    _id("baseline_task_id", nullable=False),
    _id("control_task_id"),
    # The verdict: a pure function of stored bits, computed when the last task lands, and again when its rule changes.
    Column("masked_fraction", Float(53)),
    Column("masked_n", Integer),
    Column("masked_fraction_of_correct", Float(53)),
    Column("reverse_fraction", Float(53)),
    Column("verdict", String(20)),
    Column("verdict_reasons", Json),
    Column("verdict_checks", Json),
    Column("verdict_counts", Json),
    Column("verdict_version", Integer),
    Index("ix_jobs_sweep", "sweep_id", "state"),
    Index("ix_jobs_state", "state", "sequence"),
    Index("ix_jobs_user", "user", "sequence"),
    Index("ix_jobs_cell", "architecture", "dataset", "scale", "attack"),
    Index(
        "ix_jobs_unfinished",
        "user",
        postgresql_where=text("finished_at IS NULL"),
        sqlite_where=text("finished_at IS NULL"),
    ),
)

job_tasks = Table(
    "job_tasks",
    metadata,
    _id("job_id", primary_key=True),
    _id("task_id", primary_key=True),
    Index("ix_job_tasks_task", "task_id"),
)


def _numbers(kind: str) -> tuple[Column[Any], ...]:  # Any: floats and JSON
    """Numbers belong to the task and are stored once: all of them as JSON, the headline ones also as columns."""
    return *(Column(name, Float(53)) for name in stored(kind)), Column("numbers", Json, nullable=False)


trainings = Table(
    "trainings",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("checkpoint_digest", String(64), nullable=False),
    Column("checkpoint_bytes", BigInteger, nullable=False),
    # The weights that the same training gave when it ran again, after these were lost (`store/trained_again.py`).
    Column("trained_again_as", String(64)),
    *_numbers("train"),
    Index("ix_trainings_checkpoint", "checkpoint_digest"),
)

measurements = Table(
    "measurements",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    *_numbers("measure"),
)

attack_results = Table(
    "attack_results",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    *_numbers("attack"),
)

control_results = Table(
    "control_results",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    *_numbers("control"),
)

outcome_bits = Table(
    "outcome_bits",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("name", String(40), primary_key=True),
    Column("n", Integer, nullable=False),
    Column("packed", LargeBinary, nullable=False),
)

curves = Table(
    "curves",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("name", String(80), primary_key=True),
    Column("points", Json, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("task_id", String(36), primary_key=True),  # "" for an upload
    Column("kind", String(40), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Index("ix_artifacts_task", "task_id"),
)

# The mark that tells the artifact root from any other folder: one row, from its first use on.
artifact_roots = Table(
    "artifact_roots",
    metadata,
    Column("mark", String(200), primary_key=True),
    Column("adopted_at", Float(53), nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("kind", String(40), nullable=False),
    Column("sweep_id", String(36)),
    Column("job_id", String(36)),
    Column("task_id", String(36)),
    Column("attempt", Integer),
    Column("data", Json, nullable=False),
    Index("ix_events_sweep", "sweep_id", "id"),
    Index("ix_events_job", "job_id", "id"),
    Index("ix_events_task", "task_id", "id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("user", String(200), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("body_sha256", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("location", Text),
    Column("body", Json, nullable=False),
    Column("created_at", Float(53), nullable=False),
)

# One row per role (`dispatcher`): who leads, until when, and the status of the cluster that the leader last reported.
leases = Table(
    "leases",
    metadata,
    Column("role", String(40), primary_key=True),
    Column("holder", String(200), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("status", Json, nullable=False),
)

# Users by name. A null limit or weight is the default of the settings; a user without a row has all defaults.
users = Table(
    "users",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("weight", Float(53)),
    Column("max_queued_jobs", Integer),
    Column("max_gpus", Float(53)),
    Column("created_at", Float(53), nullable=False),
    Column("role", String(20), nullable=False, server_default="researcher"),
    Column("disabled_at", Float(53)),
)

# A token's secret is not here, only its SHA-256; by the prefix its owner recognises it.
tokens = Table(
    "tokens",
    metadata,
    _id(primary_key=True),
    Column("user", ForeignKey("users.name"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("prefix", String(20), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("scope", String(20), nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53)),
    Column("last_used_at", Float(53)),
    Column("revoked_at", Float(53)),
    _id("parent_id"),  # the token that it was made with; null if it was made in a shell, or before 0016
    Index("ix_tokens_user", "user"),
    Index("ix_tokens_parent", "parent_id"),
)

# What each sponsor has used: device seconds, decayed by the half-life until `as_of`, and those charged since then.
usage = Table(
    "usage",
    metadata,
    Column("user", String(200), primary_key=True),
    Column("device_seconds", Float(53), nullable=False),
    Column("as_of", Float(53), nullable=False),
    Column("recent_seconds", Float(53), nullable=False),
)

# The one queue: it has a row once it has been paused for the first time.
queues = Table(
    "queues",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("paused", Boolean, nullable=False),
    Column("changed_by", String(200), nullable=False),
    Column("changed_at", Float(53), nullable=False),
)

# The last claims: what the scheduler saw (packed) and what it decided, so that it can be replayed.
decisions = Table(
    "decisions",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Float(53), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("seen", LargeBinary, nullable=False),
    Column("decided", Json, nullable=False),
)

# The device seconds that succeeded tasks took, and their `units` (`model/estimates.py`): for estimates.
timings = Table(
    "timings",
    metadata,
    Column("task_id", ForeignKey("tasks.id"), primary_key=True),
    Column("kind", String(20), nullable=False),
    Column("method", String(80), nullable=False),
    Column("architecture", String(80), nullable=False),
    Column("dataset", String(200), nullable=False),
    Column("device", String(200), nullable=False),
    Column("device_seconds", Float(53), nullable=False),
    Column("units", Float(53), nullable=False),
    Column("at", Float(53), nullable=False),
    Index("ix_timings_alike", "kind", "method", "architecture", "dataset", "at"),
)

# Counters under their own row lock: job sequence numbers and gap-free event ids.
counters = Table(
    "counters",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

# The columns that name bytes under the artifact root, by their SHA-256.
NAMES_BYTES: tuple[Column[Any], ...] = (  # Any: `Table.c` has no types
    artifacts.c.digest,
    tasks.c.resume_digest,
    trainings.c.checkpoint_digest,
    checkpoints.c.weights_sha256,
    datasets.c.train_sha256,
    datasets.c.test_sha256,
)

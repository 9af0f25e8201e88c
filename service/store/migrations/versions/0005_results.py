"""Results that are asked for by index"""

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0002"
branch_labels = None
depends_on = None

METRICS = (
    "clean_accuracy",
    "clean_loss",
    "robust_accuracy",
    "robust_loss",
    "masked_fraction",
    "masked_fraction_of_correct",
    "reverse_fraction",
    "zero_gradient_fraction",
    "log_hessian_trace_median",
    "log_relative_sharpness_median",
    "log_relative_flatness_median",
    "test_accuracy",
    "train_seconds",
)
INDEXED = (
    "clean_accuracy",
    "robust_accuracy",
    "robust_loss",
    "masked_fraction",
    "zero_gradient_fraction",
    "log_hessian_trace_median",
    "log_relative_sharpness_median",
    "log_relative_flatness_median",
)
OWN = {"seed", "attack_seed", "replicate", "measures", "arrays"}
SHOWN = sa.text("retracted_at IS NULL")
FINISHED = """
SELECT jobs.id AS job_id, jobs.sequence, jobs."user", jobs.sweep_id, jobs.seed, jobs.spec, jobs.created_at,
    jobs.finished_at, jobs.train_task_id, jobs.measure_task_id, jobs.attack_task_id, jobs.masked_fraction,
    jobs.masked_fraction_of_correct, jobs.reverse_fraction, jobs.verdict, a.clean_accuracy, a.clean_loss,
    a.robust_accuracy, a.robust_loss, a.zero_gradient_fraction, m.log_hessian_trace_median,
    m.log_relative_sharpness_median, m.log_relative_flatness_median, r.test_accuracy, r.seconds AS train_seconds,
    t.version AS train_version, s.version AS measure_version, b.version AS attack_version, c.version AS control_version
FROM jobs
JOIN attack_results a ON a.task_id = jobs.attack_task_id
LEFT JOIN measurements m ON m.task_id = jobs.measure_task_id
LEFT JOIN trainings r ON r.task_id = jobs.train_task_id
JOIN tasks t ON t.id = jobs.train_task_id
JOIN tasks s ON s.id = jobs.measure_task_id
JOIN tasks b ON b.id = jobs.attack_task_id
LEFT JOIN tasks c ON c.id = jobs.control_task_id
WHERE jobs.state = 'succeeded' AND jobs.sequence > :after ORDER BY jobs.sequence LIMIT 1000
"""


def upgrade() -> None:
    cells = op.create_table(
        "cells",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("architecture", sa.String(80), nullable=False),
        sa.Column("dataset", sa.String(200), nullable=False),
        sa.Column("scale", sa.Float(53), nullable=False),
        sa.Column("attack", sa.String(40), nullable=False),
        sa.Column("norm", sa.String(10)),
        sa.Column("eps", sa.Float(53)),
        sa.Column("recipe", sa.String(80), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("spec", sa.JSON(none_as_null=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_cells"),
        sa.UniqueConstraint("digest", name="uq_cells_digest"),
    )
    results = op.create_table(
        "results",
        sa.Column("job_id", sa.String(36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("cell_id", sa.Integer(), nullable=False),
        sa.Column("user", sa.String(200), nullable=False),
        sa.Column("sweep_id", sa.String(36)),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("train_task_id", sa.String(36), nullable=False),
        sa.Column("measure_task_id", sa.String(36), nullable=False),
        sa.Column("attack_task_id", sa.String(36), nullable=False),
        sa.Column("repeated", sa.Boolean(), nullable=False),
        *(sa.Column(name, sa.Float(53)) for name in METRICS),
        sa.Column("verdict", sa.String(20), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("finished_at", sa.Float(53), nullable=False),
        sa.Column("retracted_at", sa.Float(53)),
        sa.Column("retracted_by", sa.String(200)),
        sa.Column("retraction_reason", sa.Text()),
        sa.PrimaryKeyConstraint("job_id", name="pk_results"),
        sa.ForeignKeyConstraint(["cell_id"], ["cells.id"], name="fk_results_cell_id"),
        sa.UniqueConstraint("sequence", name="uq_results_sequence"),
    )
    names = op.create_table(
        "number_names",
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_number_names"),
    )
    _fill(cells, results)
    _name(names)
    for name in INDEXED:
        op.create_index(
            f"ix_results_{name}",
            "results",
            [name, "sequence", "cell_id", "user"],
            postgresql_where=SHOWN,
            sqlite_where=SHOWN,
        )
    op.create_index(
        "ix_results_time", "results", ["sequence", "cell_id", "user"], postgresql_where=SHOWN, sqlite_where=SHOWN
    )
    covered = ["cell_id", "repeated", "robust_accuracy", "clean_accuracy", "masked_fraction"]
    op.create_index("ix_results_cell", "results", covered, postgresql_where=SHOWN, sqlite_where=SHOWN)
    op.create_index("ix_results_sweep", "results", ["sweep_id"])


def _fill(cells: sa.Table, results: sa.Table) -> None:
    """File the results of all jobs that have succeeded, in the order of the jobs."""
    connection, ids, attacks, after = op.get_bind(), {}, set(), -1
    typed = sa.text(FINISHED).columns(spec=sa.JSON)
    while rows := connection.execute(typed, {"after": after}).mappings().all():
        after = rows[-1]["sequence"]
        filed = []
        for row in map(dict, rows):
            versions = {kind: row.pop(f"{kind}_version") for kind in ("train", "measure", "attack", "control")}
            spec = _cell(row.pop("spec"), versions)
            digest = hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            if digest not in ids:
                inserted = connection.execute(sa.insert(cells).values(_columns(digest, spec)).returning(cells.c.id))
                ids[digest] = inserted.scalar_one()
            filed.append({**row, "cell_id": ids[digest], "repeated": row["attack_task_id"] in attacks})
            attacks.add(row["attack_task_id"])
        connection.execute(sa.insert(results), filed)


def _cell(spec: dict[str, Any], versions: dict[str, int | None]) -> dict[str, Any]:
    kept = {name: value for name, value in spec.items() if name not in OWN}
    if spec["scale"] == 1:
        kept["scale_bias"] = True
    return {**kept, "versions": versions}


def _columns(digest: str, spec: dict[str, Any]) -> dict[str, Any]:
    attack, recipe = spec["attack"], spec["recipe"]
    ball = attack.get("attack", attack)  # a transfer has the ball of the attack that makes its examples
    same = {name: spec[name] for name in ("architecture", "dataset", "scale", "samples")}
    return {
        **same,
        "digest": digest,
        "attack": attack["type"],
        "norm": ball.get("norm"),
        "eps": ball.get("eps"),
        "recipe": recipe["name"],
        "spec": spec,
    }


def _name(names: sa.Table) -> None:
    connection = op.get_bind()
    for kind, table in (("attack", "attack_results"), ("measure", "measurements")):
        found: set[str] = set()
        query = sa.text(f"SELECT numbers FROM {table}").columns(numbers=sa.JSON)
        for partition in connection.execute(query).scalars().partitions(1000):
            found |= {name for numbers in partition for name in numbers}
        if found:
            connection.execute(sa.insert(names), [{"kind": kind, "name": name} for name in sorted(found)])

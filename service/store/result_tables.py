"""Results as they are asked for: a narrow row a finished job, and what all seeds of a cell have in common once.

A result is still a view over its tasks, where each number is stored: these rows repeat the headline numbers, so that a
million of them can be filtered, sorted and aggregated by index. `filing` writes them when a job's last task lands.
"""

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, String, Table, Text, text

from service.specs.numbers import INDEXED, METRICS
from service.store.tables import Json, metadata

# Two results are comparable but for their seeds where they have the same cell: everything that was asked for, except
# seeds, replicates and further measures, and the versions of the tasks that computed it.
cells = Table(
    "cells",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("architecture", String(80), nullable=False),
    Column("dataset", String(200), nullable=False),
    Column("scale", Float(53), nullable=False),
    Column("attack", String(40), nullable=False),
    Column("norm", String(10)),
    Column("eps", Float(53)),
    Column("recipe", String(80), nullable=False),
    Column("samples", Integer, nullable=False),
    Column("spec", Json, nullable=False),
    Column("threat_model", String(80)),  # the ball, as `linf 8/255`; null where the attack has none
    # That of all cells whose attacks differ in nothing but strength, on whatever network of one architecture.
    Column("family", String(64), nullable=False, server_default=text("''")),
    Index("ix_cells_family", "family"),
    # All that filters ask of cells by column, so that a look at every one of them reads no spec.
    Index("ix_cells_asked", "architecture", "dataset", "attack", "scale", "norm", "eps", "recipe", "samples"),
)

SHOWN = text("retracted_at IS NULL")
HIDDEN = text("retracted_at IS NOT NULL")

results = Table(
    "results",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("sequence", BigInteger, nullable=False, unique=True),
    Column("cell_id", ForeignKey("cells.id"), nullable=False),
    Column("user", String(200), nullable=False),
    Column("sweep_id", String(36)),
    Column("seed", BigInteger, nullable=False),
    Column("attack_seed", BigInteger, nullable=False, server_default=text("0")),
    Column("replicate", BigInteger, nullable=False, server_default=text("0")),
    Column("arrays", Boolean, nullable=False, server_default=text("false")),
    Column("train_task_id", String(36), nullable=False),
    Column("measure_task_id", String(36), nullable=False),
    Column("attack_task_id", String(36), nullable=False),
    Column("weights_sha256", String(64)),  # of the network that the attack really used
    Column("repeated", Boolean, nullable=False),  # an earlier result has the same attack task: the same numbers
    # An earlier result of the cell is of the same network: another attack seed, a replicate, or the same numbers.
    Column("repeats_network", Boolean, nullable=False, server_default=text("false")),
    *(Column(name, Float(53)) for name in METRICS),
    Column("masked_n", Integer),
    # Other results of the network speak against it (`service/model/flags.py`).
    Column("not_monotone", Boolean, nullable=False, server_default=text("false")),
    # Weights that it rests on were lost, and their training gave others when it ran again.
    Column("trained_again", Boolean, nullable=False, server_default=text("false")),
    # A measure or its training used other weights than its attack; such numbers are left out (`store/own_weights.py`).
    Column("mixed_weights", Boolean, nullable=False, server_default=text("false")),
    Column("verdict", String(20), nullable=False),
    Column("verdict_version", Integer),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53), nullable=False),
    # Found to be wrong later: hidden, never deleted.
    Column("retracted_at", Float(53)),
    Column("retracted_by", String(200)),
    Column("retraction_reason", Text),
    Column("retracted_with", String(36)),  # the task whose retraction hides it; null where itself was retracted
    Index("ix_results_retracted", "retracted_with", "sequence", postgresql_where=HIDDEN, sqlite_where=HIDDEN),
    Index("ix_results_retracted_training", "train_task_id", postgresql_where=HIDDEN, sqlite_where=HIDDEN),
    # A page can be sorted by an indexed number without looking at all rows: of everything, where the cell and the user
    # can be told from the index, and within each cell, where a filter asks for few of them.
    *(
        Index(f"ix_results_{name}", name, "sequence", "cell_id", "user", postgresql_where=SHOWN, sqlite_where=SHOWN)
        for name in INDEXED
    ),
    Index("ix_results_time", "sequence", "cell_id", "user", postgresql_where=SHOWN, sqlite_where=SHOWN),
    *(
        Index(
            f"ix_results_cell_{name}",
            "cell_id",
            name,
            "sequence",
            "user",
            postgresql_where=SHOWN,
            sqlite_where=SHOWN,
        )
        for name in INDEXED
    ),
    Index("ix_results_cell_time", "cell_id", "sequence", "user", postgresql_where=SHOWN, sqlite_where=SHOWN),
    Index(
        "ix_results_cell",
        "cell_id",
        "user",
        "repeats_network",
        "robust_accuracy",
        "clean_accuracy",
        "masked_fraction",
        "retracted_at",  # always null, but SQLite reads the row where the index lacks a column of its condition
        postgresql_where=SHOWN,
        sqlite_where=SHOWN,
    ),
    Index("ix_results_sweep", "sweep_id"),
    Index("ix_results_weights", "weights_sha256", "cell_id"),
)

# Which numbers attacks and measures have ever left, so that a misspelt name is told from one without rows.
number_names = Table(
    "number_names",
    metadata,
    Column("kind", String(20), primary_key=True),
    Column("name", String(200), primary_key=True),
)

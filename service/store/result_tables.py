"""Results as questions read them: a narrow row for each finished job, and one row for what all seeds of a cell share.

All numbers of a result are stored with its tasks. These rows repeat the headline numbers, so that a million results can
be filtered, sorted and aggregated by index. `filing` writes them when a job succeeds.
"""

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, String, Table, Text, text

from service.specs.numbers import INDEXED, METRICS
from service.store.tables import Json, metadata

# Two results that differ only in their seeds have the same cell: everything that was asked for, except seeds,
# replicates, arrays and further measures, with the versions of the tasks that computed it.
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
    Column("threat_model", String(80)),  # the ball, as `linf 8/255`; null if the attack has none
    # Equal for cells whose attacks differ only in strength, on networks of one architecture (`filing.family`).
    Column("family", String(64), nullable=False, server_default=text("''")),
    Index("ix_cells_family", "family"),
    # All columns of cells that filters use, so that a scan of all cells reads no spec.
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
    # An earlier result of the cell is of the same network (another attack seed, a replicate, or the same numbers), or
    # may be.
    Column("repeats_network", Boolean, nullable=False, server_default=text("false")),
    *(Column(name, Float(53)) for name in METRICS),
    Column("masked_n", Integer),
    # Other results of the network speak against it (`service/model/flags.py`).
    Column("not_monotone", Boolean, nullable=False, server_default=text("false")),
    # Weights that the result rests on were lost, and their training gave others when it ran again.
    Column("trained_again", Boolean, nullable=False, server_default=text("false")),
    # A measure or the training has other weights than the attack; its numbers are left out (`store/own_weights.py`).
    Column("mixed_weights", Boolean, nullable=False, server_default=text("false")),
    Column("verdict", String(20), nullable=False),
    Column("verdict_version", Integer),
    Column("created_at", Float(53), nullable=False),
    Column("finished_at", Float(53), nullable=False),
    # Found to be wrong later: hidden, never deleted.
    Column("retracted_at", Float(53)),
    Column("retracted_by", String(200)),
    Column("retraction_reason", Text),
    Column("retracted_with", String(36)),  # the task whose retraction hides it; null if the result itself was retracted
    Index("ix_results_retracted", "retracted_with", "sequence", postgresql_where=HIDDEN, sqlite_where=HIDDEN),
    Index("ix_results_retracted_training", "train_task_id", postgresql_where=HIDDEN, sqlite_where=HIDDEN),
    # A page that is sorted by an indexed number does not read all rows. These indices serve a page of all results, as
    # they have the cell and the user; the indices within each cell serve a filter that chooses few cells.
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
        "retracted_at",  # always null, but SQLite reads the row if the index lacks a column of its condition
        postgresql_where=SHOWN,
        sqlite_where=SHOWN,
    ),
    Index("ix_results_sweep", "sweep_id"),
    Index("ix_results_weights", "weights_sha256", "cell_id"),
)

# The names of all numbers that attacks and measures ever left: they tell a misspelt name from a name without rows.
number_names = Table(
    "number_names",
    metadata,
    Column("kind", String(20), primary_key=True),
    Column("name", String(200), primary_key=True),
)

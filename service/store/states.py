"""Conditions on a task's state that partial indices stand for, and what current attempts say.

The conditions are written into statements instead of bound to them: only so does SQLite know that an index holds all of
them.
"""

from sqlalchemy import and_, func, literal, literal_column

from service.model.jobs import TaskState
from service.store.tables import attempts, tasks
from service.store.typed import json_text

QUEUED = tasks.c.state == literal_column(f"'{TaskState.QUEUED}'")
CLAIMABLE = and_(QUEUED, ~tasks.c.paused)
SHARED = and_(CLAIMABLE, tasks.c.shared)
RUNNING = tasks.c.state == literal_column(f"'{TaskState.RUNNING}'")
CURRENT = (attempts.c.task_id == tasks.c.id) & (attempts.c.number == tasks.c.attempt)
# By SHA-256, as far as an attempt noted them: the weights that it used, and those that a transfer's examples come from.
WEIGHTS_USED = json_text(attempts.c.provenance, literal("weights_sha256"))
SOURCE_USED = json_text(attempts.c.provenance, literal("source_weights_sha256"))
# What a task is the computation of, also where a newer generation has the digest in its place.
DIGEST = func.coalesce(tasks.c.former_digest, tasks.c.digest)

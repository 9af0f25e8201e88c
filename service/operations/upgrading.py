"""Bringing a database up to this version: its schema, and the verdicts of an older rule.

Unfinished tasks of an older version are planned again by the dispatcher, when it comes to them (`queue/replanning.py`).
"""

import logging
from dataclasses import dataclass

from service.errors import ArtifactRootUnusable, DatabaseAway, DatabaseDamaged
from service.lab.artifact_root import of_database
from service.model.verdict import VERSION
from service.results.judging import judge_results
from service.settings import Settings
from service.store import judging
from service.store.database import Database

log = logging.getLogger("uncanny.upgrading")

AT_ONCE = 1000  # jobs that are judged again in one transaction
ACTOR = "upgrade"


@dataclass(frozen=True)
class Upgraded:
    """How many results were judged again, and how many of them have another verdict than before."""

    judged: int = 0
    changed: int = 0


def upgrade(database: Database) -> Upgraded:
    """Bring schema and verdicts up to this version's. Safe to repeat, to run in two processes, and to interrupt."""
    database.upgrade()
    return judge_again(database)


def judge_again(database: Database) -> Upgraded:
    """Judge results of older rules again by this version's, from the stored bits; an event names each change."""
    judged = changed = after = 0
    while True:
        with database.write() as connection:
            outdated = judging.outdated(connection, after, AT_ONCE)
            if not outdated:
                break
            before = {job.job_id: job.verdict for job in outdated}
            changed += judge_results(connection, database.now(connection), ACTOR, before)
            judged, after = judged + len(outdated), outdated[-1].sequence
    if judged:
        log.info("%d results were judged again by version %d of the rule, %d differently", judged, VERSION, changed)
    return Upgraded(judged, changed)


def prepare_store(settings: Settings) -> None:
    """Upgrade the embedded database; only check a shared one.

    A database that has no artifact root yet takes the one of the settings. Raises `SchemaOutdated`, `DatabaseDamaged`.
    A database or root that is away may come back, so that is only a warning.
    """
    database = Database(settings.database)
    try:
        if not settings.database_url:
            upgrade(database)
        else:
            database.check_schema()
        of_database(database, settings.artifacts).require_mark()
    except DatabaseDamaged:
        raise
    except (DatabaseAway, ArtifactRootUnusable) as error:
        log.warning("%s", error)
    finally:
        database.close()

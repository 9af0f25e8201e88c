"""The fields by which jobs can be filtered and sorted."""

from service.model.jobs import JobState
from service.model.verdict import REASONS, VERDICTS
from service.store import meanings
from service.store.fields import Field, Fields
from service.store.meanings import one_of
from service.store.spec_fields import (
    CHECK_NAMES,
    SHORT,
    SPEC_KINDS,
    SPEC_MEANINGS,
    check_family,
    list_field,
    measures_field,
    spec_column,
    text_family,
    text_field,
)
from service.store.tables import jobs

# A value may be the beginning of an id, and for a sweep also its name.
LABELS, CHECK_OUTCOMES = text_family(jobs.c.labels), check_family(jobs.c.verdict_checks)
JOB_ID = meanings.id_of("job", jobs.c.id)
VERDICT, REASON = one_of(VERDICTS), one_of(REASONS)
JOB_SPEC = {
    name: Field(kind, spec_column(jobs, name, kind), meaning=SPEC_MEANINGS.get(name))
    for name, kind in SPEC_KINDS.items()
}
JOBS = Fields(
    {
        "id": text_field(jobs.c.id, JOB_ID),
        "state": text_field(jobs.c.state, one_of(tuple(JobState))),
        "user": text_field(jobs.c.user, meanings.user),
        "owner": text_field(jobs.c.user, meanings.user),
        "sweep": text_field(jobs.c.sweep_id, meanings.sweep),
        **JOB_SPEC,
        **{short: JOB_SPEC[name] for short, name in SHORT.items()},
        "measures": measures_field(jobs.c.id),
        "priority": Field("integer", jobs.c.priority),
        "reason": Field("text", jobs.c.reason),
        "verdict": text_field(jobs.c.verdict, VERDICT),
        "verdict_reasons": list_field(jobs.c.verdict_reasons, REASON),
        "spec_digest": text_field(jobs.c.spec_digest, meanings.digest),
        "created_at": Field("time", jobs.c.created_at),
        "finished_at": Field("time", jobs.c.finished_at),
    },
    {"labels": LABELS, "verdict_checks": CHECK_OUTCOMES},
    family_names=["labels.KEY", *CHECK_NAMES],
)

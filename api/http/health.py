"""Whether the service is alive and ready, and the state of its cluster."""

from fastapi import Request

from api.http.deps import ArtifactRoot, Questions
from api.http.errors import documented
from api.http.permissions import open_to_all, scope
from api.http.routing import Answer, Router
from api.http.schemas.health import Alive, Cluster, Ready
from service.lab import artifact_root

router = Router(tags=["health"])


@router.get("/healthz", dependencies=[open_to_all()], response_model=Alive)
async def healthz() -> Answer:
    """This process answers."""  # async, because all threads may be waiting for the database
    return {"status": "ok"}


@router.get("/readyz", dependencies=[open_to_all()], response_model=Ready, responses=documented())
def readyz(request: Request, insights: Questions, artifacts: ArtifactRoot) -> Answer:
    """The database answers and has the right schema, and room left; the artifact root is there.

    Jobs are accepted also while no dispatcher leads.
    """
    insights.database.check_schema()
    cluster = insights.cluster()
    # Only PostgreSQL knows its disk, and it reports a full one when it writes. So the probe writes if no dispatcher
    # leads, which a full disk may have caused, or if the last write of this process met a full disk.
    insights.database.check_room(doubt=not insights.database.is_sqlite and not cluster["leading"])
    artifact_root.check(insights.database, artifacts.root)
    version = request.app.version
    return {"status": "ready", "version": version, "dispatcher_leads": cluster["leading"]}


@router.get("/v1/cluster", dependencies=[scope("read")], response_model=Cluster, responses=documented())
def get_cluster(insights: Questions) -> Answer:
    """The leading dispatcher and what it last said of its cluster."""
    return insights.cluster()

"""Checkpoints: weights made elsewhere, for jobs to name instead of a recipe that trains."""

from api.http.deps import User, Verbs
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, RegistrationRoute, Router
from api.http.schemas.checkpoints import Checkpoint, CheckpointList, CheckpointSubmission
from service.errors import InvalidSpec
from service.lab.checkpoints import register, registered

router = Router(route_class=RegistrationRoute, prefix="/v1/checkpoints", tags=["checkpoints"])


@router.post(
    "",
    dependencies=[scope("submit")],
    status_code=201,
    response_model=Checkpoint,
    responses=documented(404, 409, 413, 422, 507),
)
def register_checkpoint(body: CheckpointSubmission, service: Verbs, user: User) -> Answer:
    """Register weights for an architecture: names and shapes are checked now. Jobs name them as `"checkpoint": NAME`,
    in place of recipe and seed. Again with the same: no change."""
    if not service.artifacts.exists(body.weights_sha256):
        sentence = f"it has not been uploaded: PUT /v1/artifacts/{body.weights_sha256} first"
        raise InvalidSpec([("/weights_sha256", sentence)])
    return register(service.database, service.artifacts, body.upload, user=user)


@router.get("", dependencies=[scope("read")], response_model=CheckpointList, responses=documented())
def list_checkpoints(service: Verbs) -> Answer:
    """The registered checkpoints. Those that trainings made are at `/v1/networks`."""
    return {"items": registered(service.database)}

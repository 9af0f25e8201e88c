"""Data sets: the lab's own, registered once and named by their digests from then on."""

from api.http.deps import Questions, User, Verbs
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, RegistrationRoute, Router
from api.http.schemas.datasets import Dataset, DatasetList, DatasetSubmission
from service.errors import InvalidSpec

router = Router(route_class=RegistrationRoute, prefix="/v1/datasets", tags=["datasets"])


@router.post(
    "", dependencies=[scope("submit")], status_code=201, response_model=Dataset, responses=documented(404, 409, 422)
)
def register_dataset(body: DatasetSubmission, service: Verbs, user: User) -> Answer:
    """Register two uploaded files (`train.npz`, `test.npz`) as `npz:NAME`. Again with the same files: no change."""
    digests = {"train_sha256": body.train_sha256, "test_sha256": body.test_sha256}
    missing = [
        (f"/{name}", _not_uploaded(digest)) for name, digest in digests.items() if not service.artifacts.exists(digest)
    ]
    if missing:
        raise InvalidSpec(missing)
    return service.register_dataset(body.name, body.train_sha256, body.test_sha256, user=user)


@router.get("", dependencies=[scope("read")], response_model=DatasetList, responses=documented())
def list_datasets(insights: Questions) -> Answer:
    """The registered data sets; the known ones are in the catalogue."""
    return {"items": insights.datasets()}


def _not_uploaded(digest: str) -> str:
    return f"artifact {digest} has not been uploaded: PUT /v1/artifacts/{digest} first"

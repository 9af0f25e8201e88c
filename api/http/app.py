"""The HTTP application: routes on the service's verbs and questions."""

from collections import Counter
from importlib import metadata

from anyio import CapacityLimiter
from fastapi import Depends, FastAPI

from api.http import (
    access,
    artifacts,
    catalog,
    checkpoints,
    datasets,
    docs,
    document,
    errors,
    events,
    health,
    ids,
    jobs,
    networks,
    queue,
    results,
    routing,
    statistics,
    sweeps,
    tasks,
)
from api.http.auth import ADMISSION_THREADS, Limiter
from api.http.conditional import Conditional
from api.http.deps import only_documented_parameters
from api.http.feed import Feed
from api.http.limits import BodyLimit
from api.http.media_types import acceptable
from api.http.open_requests import OpenRequests
from api.http.prefix import Prefix
from api.http.security import SecurityHeaders
from service.lab.access import Access
from service.lab.artifact_root import of_database
from service.queue.verbs import Service
from service.results.insights import Insights
from service.settings import Settings
from service.store import Database

ROUTERS = [
    *(jobs, sweeps, ids, queue),
    *(results, statistics, tasks, events),
    *(catalog, datasets, checkpoints, networks, artifacts),
    *(access, health),
]


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application on the store and the artifact root of these settings. Making it touches neither."""
    settings = settings or Settings()
    app = FastAPI(
        title="Uncanny",
        version=metadata.version("uncanny-bench"),
        description=document.DESCRIPTION,
        openapi_tags=document.TAGS,
        generate_unique_id_function=document.operation_id,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # such a redirect names the host, and `http` even if a proxy speaks TLS
        dependencies=[Depends(only_documented_parameters), Depends(acceptable)],
    )
    _set_state(app, settings)
    routing.install(app, [module.router for module in ROUTERS])
    docs.install(app)
    errors.install(app)
    _add_middleware(app, settings)
    document.install(app)
    return app


def _set_state(app: FastAPI, settings: Settings) -> None:
    """Set the state that all requests share: the verbs, the questions, the access of users, counts of open requests."""
    database = Database(settings.database, statement_seconds=settings.statement_seconds)
    app.state.settings = settings
    app.state.service = Service(
        database, of_database(database, settings.artifacts), settings.limits, max_sweep_jobs=settings.max_sweep_jobs
    )
    app.state.access = Access(database)
    app.state.limiter = Limiter()
    app.state.admission_threads = CapacityLimiter(ADMISSION_THREADS)
    app.state.turns = routing.new_turns()
    app.state.open_by, app.state.held_by = Counter[str](), Counter[str]()
    app.state.insights = Insights(database)
    app.state.feed = Feed(app.state.insights, app.state.access, lambda: getattr(app.state, "stopping", False))


def _add_middleware(app: FastAPI, settings: Settings) -> None:
    """The layers around the routes; the last one is the outermost."""
    app.add_middleware(Conditional)
    app.add_middleware(
        BodyLimit,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        held_by=app.state.held_by,
    )
    app.add_middleware(OpenRequests, open_by=app.state.open_by)
    app.add_middleware(SecurityHeaders)
    if settings.root_path:
        app.add_middleware(Prefix, root_path=settings.root_path, missing=SecurityHeaders(errors.missing))

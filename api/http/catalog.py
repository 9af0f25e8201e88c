"""The catalogue: everything that can be named in a job, with parameters and bounds."""

from dataclasses import asdict

from pydantic import BaseModel

from api.http.deps import Questions
from api.http.document import with_bounds
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.catalog import Catalog
from service.model.json import JsonObject
from service.specs import JobSpec, Sweep, catalog, fields, numbers
from service.specs.attacks import ATTACKS, PRESETS
from service.specs.measures import CLOSED_FORM_QUANTITIES, MEASURES
from service.specs.recipes import KNOWN
from service.specs.recipes import PRESETS as RECIPE_PRESETS

router = Router(prefix="/v1", tags=["catalog"])


@router.get("/catalog", dependencies=[scope("read")], response_model=Catalog, responses=documented())
def get_catalog(insights: Questions) -> Answer:
    """Architectures, data sets (the registered ones too), recipes, attacks with presets, measures, and the numbers."""
    return {
        "architectures": {name: asdict(info) for name, info in catalog.ARCHITECTURES.items()},
        "datasets": {name: asdict(info) for name, info in catalog.DATASETS.items()},
        "registered_datasets": insights.datasets(),
        "recipes": {name: _described(model) for name, model in KNOWN.items()},
        "recipe_presets": {name: fields(recipe) for name, recipe in RECIPE_PRESETS.items()},
        "attacks": {name: _described(model) for name, model in ATTACKS.items()},
        "attack_presets": {name: fields(attack) for name, attack in PRESETS.items()},
        "measures": {name: _described(model) for name, model in MEASURES.items()},
        "always_measured": CLOSED_FORM_QUANTITIES,
        "numbers": numbers.described(),
        "job": with_bounds(JobSpec.model_json_schema()),
        "sweep": with_bounds(Sweep.model_json_schema()),
    }


def _described(model: type[BaseModel]) -> JsonObject:
    """Parameters with their bounds and defaults, as JSON schema."""
    schema = with_bounds(model.model_json_schema())
    return {
        "summary": (model.__doc__ or "").partition("\n")[0],
        "parameters": schema["properties"],
        "required": schema.get("required", []),
        **({"$defs": schema["$defs"]} if "$defs" in schema else {}),
    }

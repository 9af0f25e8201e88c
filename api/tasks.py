"""Tasks: what jobs share."""

from typing import Any

from fastapi import APIRouter

from api.deps import Questions
from api.errors import documented
from api.schemas import Task

router = APIRouter(prefix="/v1/tasks", tags=["tasks"])


@router.get("/{task_id}", response_model=Task, responses=documented(404))
def get_task(task_id: str, insights: Questions) -> Any:
    """One task by id or digest: state, attempts with provenance, worker, progress, and how its digest came about."""
    return insights.task(task_id)

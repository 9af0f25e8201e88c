"""Top-5 accuracies of at most five classes, which are always 1, go; hidden results are found by their training"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    hidden = sa.text("retracted_at IS NOT NULL")
    op.create_index(
        "ix_results_retracted_training", "results", ["train_task_id"], postgresql_where=hidden, sqlite_where=hidden
    )
    _fill()


def _fill() -> None:
    """No data set of the catalogue has so few classes, but a lab's own may. Today these numbers are null."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    name = "json_extract(tasks.spec, '$.dataset.name')" if sqlite else "tasks.spec -> 'dataset' ->> 'name'"
    few = f"{name} IN (SELECT 'npz:' || datasets.name FROM datasets WHERE datasets.classes <= 5)"
    trainings = f"SELECT tasks.id FROM tasks WHERE tasks.kind = 'train' AND {few}"
    attacks = f"SELECT child_id FROM task_edges WHERE parent_id IN ({trainings})"
    for table, number, task_ids in (
        ("trainings", "test_top5_accuracy", trainings),
        ("attack_results", "robust_top5_accuracy", attacks),
    ):
        numbers = f"jsonb_set(numbers::jsonb, '{{{number}}}', 'null', false)::json"
        if sqlite:
            numbers = f"json_replace(numbers, '$.{number}', NULL)"
        op.execute(f"UPDATE {table} SET numbers = {numbers} WHERE task_id IN ({task_ids})")
    op.execute(f"DELETE FROM outcome_bits WHERE name = 'robust_top5' AND task_id IN ({attacks})")

"""Attack seed, replicate and `arrays` of each result as columns, so that no query reads its job for them"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NEW = {"attack_seed": "bigint", "replicate": "bigint", "arrays": "boolean"}


def upgrade() -> None:
    for name in ("attack_seed", "replicate"):
        op.add_column("results", sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.add_column("results", sa.Column("arrays", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    if op.get_bind().dialect.name == "sqlite":
        values = {name: f"json_extract(jobs.spec, '$.{name}')" for name in NEW}
    else:
        values = {name: f"CAST(jobs.spec ->> '{name}' AS {kind})" for name, kind in NEW.items()}
    changes = ", ".join(f"{name} = {value}" for name, value in values.items())
    op.execute(f"UPDATE results SET {changes} FROM jobs WHERE jobs.id = results.job_id")

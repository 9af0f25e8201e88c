"""The arrows between the folders, and the torch-free, Ray-free halves: import-linter's contracts in pyproject.toml."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("service.queue.dispatcher", {"torch", "ray", "fastapi", "scipy", "sklearn"}),
        ("service.queue.verbs", {"torch", "ray", "fastapi", "scipy", "sklearn"}),
        ("api.serve.server", {"torch", "ray", "alembic", "psycopg", "typer", "rich", "pyarrow"}),
        ("api.client", {"torch", "ray", "fastapi", "scipy", "sklearn", "polars", "pandas", "pyarrow"}),
        ("workers.science.training", {"ray", "sqlalchemy", "fastapi", "pydantic", "service", "api"}),
    ],
)
def test_what_a_process_really_loads(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*(name for name in {sorted(heavy)} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_only_settings_reads_our_environment() -> None:
    readers = {
        str(path.relative_to(REPOSITORY))
        for folder in ("service", "workers", "api")
        for path in (REPOSITORY / folder).rglob("*.py")
        if re.search(r"(environ(\.get)?[\[(]|getenv\()\s*[\"']UNCANNY_", path.read_text())
    }
    assert readers <= {"service/settings.py"}

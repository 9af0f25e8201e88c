"""What the README and the guides tell people to paste is pasted here, against a real server."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.cli.written import read

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")),
         *sorted(REPOSITORY.glob("service/**/*.md")), *sorted(REPOSITORY.glob("workers/**/*.md"))]  # fmt: skip
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = list(dict.fromkeys(re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)))
# Run elsewhere: installing, the demo, the service itself (test_demo, test_serve), the tests and tools, benchmarks.
ELSEWHERE = ("pip install uv", "uncanny serve", "uv run pytest", "uv run ruff")


def blocks() -> list[Any]:
    wanted = [(kind, text) for kind, text in BLOCKS if not any(command in text for command in ELSEWHERE)]
    return [pytest.param(kind, text, id=text.strip().splitlines()[0][:60]) for kind, text in wanted]


@pytest.fixture
def shell(server: Any, tmp_path: Path) -> dict[str, str]:
    """An environment in which `uv run X` is X of this environment, and clients find the server."""
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\nshift\nexec "$@"\n')
    uv.chmod(0o755)
    path = os.pathsep.join([str(uv.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "UNCANNY_URL": server.url, "UNCANNY_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize(("kind", "text"), blocks())
def test_block(kind: str, text: str, server: Any, shell: dict[str, str], tmp_path: Path) -> None:
    text = text.replace("http://127.0.0.1:8765", server.url).replace("path/to/folder", str(tmp_path / "images"))
    for written in ("results.parquet", "--snapshot frozen", "verify frozen"):
        *command, name = written.split()
        text = text.replace(written, " ".join([*command, str(tmp_path / name)]))
    if "recipe.epochs" in text:
        quick = read((REPOSITORY / "examples" / "quick.yaml").read_text())
        assert server.client.sweep(quick).wait()["state"] == "succeeded"
    if "data add" in text:
        (tmp_path / "images").mkdir()
        for seed, split in enumerate(("train", "test")):
            x = np.random.RandomState(seed).randint(0, 256, (20, 8, 8, 3)).astype(np.uint8)
            np.savez(tmp_path / "images" / f"{split}.npz", x=x, y=np.arange(20, dtype=np.int64) % 4)
    # A refusal by the server is a failure here, as it would be to the reader.
    text = text.replace("curl -sS", "curl --fail-with-body -sS")
    command = [sys.executable, "-c", text] if kind == "python" else ["bash", "-euo", "pipefail", "-c", text]
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    done = subprocess.run(command, cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "to_polars" in text:  # of every seed half of the images are robust, and all at s = 50
        rows = [re.findall(r"[\d.]+", line) for line in done.stdout.splitlines() if line.startswith("│")][-7:]
        shares = {0.25: 0.5, 0.5: 0.5, 1: 0.5, 2.5: 0.5, 5: 0.5, 10: 0.5, 50: 1}
        found = [(float(row[0]), *map(float, row[-3:])) for row in rows]
        assert [(s, mean) for s, mean, _, _ in found] == list(shares.items())
        assert all(low < mean <= high and high - low > 0.003 for _, mean, low, high in found)  # from the images


def test_every_language_of_a_block_is_run_or_named() -> None:
    assert len(blocks()) >= 6
    assert all(any(command in TEXT for _, text in BLOCKS if command in text) for command in ELSEWHERE)


def draw(shell: dict[str, str], script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "examples" / script), *arguments]
    return subprocess.run(command, env=shell, capture_output=True, text=True, timeout=120, check=False)


def test_the_figures_are_drawn_from_results(server: Any, shell: dict[str, str], tmp_path: Path) -> None:
    sweep = server.sweep("figure", scale=[1, 5, 50], attack=["pgd_l2", "pgd_linf"])
    picture = tmp_path / "scaling.png"
    done = draw(shell, "figure_scaling.py", str(picture), f"sweep={sweep['id']}")
    assert (done.returncode, done.stdout) == (0, f"{picture}: 6 results\n"), done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for script in ("figure_scaling.py", "figure_valley.py"):
        assert draw(shell, script).returncode == 2


@pytest.mark.parametrize(("field", "values"), [("recipe.epochs", [3, 4]), ("order", ["permutation", "file"])])
def test_a_figure_mixes_no_results_of_different_specs(
    server: Any, shell: dict[str, str], tmp_path: Path, field: str, values: list[Any]
) -> None:
    sweep = server.sweep(f"mixed {field}", scale=[1, 5], **{field: values})
    picture = tmp_path / "mixed.png"
    done = draw(shell, "figure_scaling.py", str(picture), f"sweep={sweep['id']}")
    assert done.returncode == 1
    assert f"{field} (" in done.stderr
    assert "Traceback" not in done.stderr
    assert not picture.exists()
    chosen = draw(shell, "figure_scaling.py", str(picture), f"sweep={sweep['id']}", f"{field}={values[0]}")
    assert chosen.returncode == 0, chosen.stderr

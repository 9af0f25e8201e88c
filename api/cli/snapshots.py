"""Snapshots: the results of a query frozen in a folder, to be published, cited, and checked without a service.

`results.parquet` has every field of every row. `specs.ndjson` has the spec of each job, which `uncanny submit` takes.
`SHA256SUMS` has a line per file, as `sha256sum --check` reads it; its own checksum stands for the whole snapshot.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from api.client import Client, Json
from service.errors import UncannyError

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")
JOBS_PER_REQUEST = 100
TITLE = "Results of an Uncanny robustness benchmark"


class NoSnapshot(UncannyError):
    """The folder cannot become a snapshot, or is none."""


@dataclass(frozen=True)
class Verified:
    """`wrong` has a sentence for each difference from the frozen files."""

    wrong: list[str]
    files: int
    sha256: str | None


def freeze(
    client: Client,
    folder: Path,
    filter: str | None = None,
    *,
    include_retracted: bool = False,
    **filters: Any,  # Any: as `Client.export` takes them
) -> Json:
    """Freeze the results that match in a new folder, which is there whole or not at all.

    Returns `results`, their number, and `sha256`. Raises `NoSnapshot` if the folder exists or nothing matches, and
    `ApiError`.
    """
    if folder.exists():
        raise NoSnapshot(f"{folder} is there already: a snapshot is made in a new folder")
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        partial.mkdir()
        query = {"filter": filter, "include_retracted": include_retracted, **filters}
        client.export(partial / "results.parquet", fields="*", sort="created_at", **query)
        ids = _job_ids(partial / "results.parquet")
        if not ids:
            raise NoSnapshot("no result matches: there is nothing to freeze")
        with (partial / "specs.ndjson").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(spec) + "\n" for spec in _specs(client, ids))
        _describe(partial, query, len(ids))
        sha256 = _write_sums(partial)
        partial.rename(folder)
    except OSError as error:
        raise NoSnapshot(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"results": len(ids), "sha256": sha256}


def verify(folder: Path) -> Verified:
    """Compare a snapshot with its checksums. Raises `NoSnapshot` if they cannot be read."""
    try:
        text = (folder / SUMS).read_bytes()
    except OSError as error:
        raise NoSnapshot(f"{folder} is no snapshot: {SUMS} cannot be read ({error.strerror})") from None
    wrong, sums = [], {}
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        if match := LINE.fullmatch(line):
            sums[match[2]] = match[1]
        else:
            wrong.append(f"{SUMS}: line {number} is not a checksum and a name")
    there = {path.name: path for path in folder.iterdir()}
    wrong += [f"{name} is missing" for name in sorted(sums.keys() - there.keys())]
    wrong += [f"{name} was added" for name in sorted(there.keys() - sums.keys() - {SUMS})]
    for name in sorted(sums.keys() & there.keys()):
        if not there[name].is_file() or there[name].is_symlink():
            wrong.append(f"{name} is not a plain file")
        elif (actual := _sha256(there[name])) != sums[name]:
            wrong.append(f"{name} is changed: its SHA-256 is {actual}, not {sums[name]}")
    return Verified(wrong, len(sums), hashlib.sha256(text).hexdigest())


def _job_ids(path: Path) -> list[str]:
    import pyarrow.parquet as pq  # takes 40 MB, which other commands do not need

    ids: list[str] = pq.read_table(path, columns=["job_id"])["job_id"].to_pylist()
    return ids


def _specs(client: Client, job_ids: Sequence[str]) -> Iterator[Json]:
    """The specs of these jobs, in the same order."""
    for start in range(0, len(job_ids), JOBS_PER_REQUEST):
        some = job_ids[start : start + JOBS_PER_REQUEST]
        jobs = {job["id"]: job for job in client.jobs(filter=f"id in ({', '.join(some)})", limit=JOBS_PER_REQUEST)}
        for job_id in some:
            job = jobs[job_id]
            yield {"job_id": job_id, "spec_digest": job["spec_digest"], "spec": job["spec"]}


def _describe(folder: Path, query: Json, results: int) -> None:
    now = datetime.now(UTC)
    data = _sha256(folder / "results.parquet")
    citation = {
        "cff-version": "1.2.0",
        "message": "If you use these results, please cite them as below.",
        "title": TITLE,
        "type": "dataset",
        "authors": [{"name": "The users of an Uncanny benchmark service"}],
        "date-released": now.date().isoformat(),
        "identifiers": [{"type": "other", "value": f"sha256:{data}", "description": "results.parquet"}],
    }
    (folder / "CITATION.cff").write_text(
        json.dumps(citation, indent=2) + "\n", encoding="utf-8"
    )  # CFF is YAML, and so is JSON
    chosen = {name: value for name, value in query.items() if value}
    (folder / "README.md").write_text(
        f"# {TITLE}\n\n"
        f"{results} results, frozen at {now.isoformat(timespec='seconds')}.\n\n"
        f"Asked for: `{json.dumps(chosen)}`\n\n"
        "- `results.parquet`: a row per result, with every number, the verdict and the provenance (JSON)\n"
        "- `specs.ndjson`: what each job asked for; the `spec` of a line can be submitted again\n"
        f"- `{SUMS}`: check it with `uncanny verify DIR` or, inside, `sha256sum --check {SUMS}`\n",
        encoding="utf-8",
    )


def _write_sums(folder: Path) -> str:
    """Returns the checksum of the list itself."""
    text = "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()))
    (folder / SUMS).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

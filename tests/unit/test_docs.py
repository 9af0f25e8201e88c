"""What the pages name is there: files, folders, modules, and the headings that links point at."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("api", "service", "workers")
PAGES = [
    path
    for path in (*REPOSITORY.glob("*.md"), *(p for f in ("docs", *PACKAGES) for p in (REPOSITORY / f).rglob("*.md")))
    if path.name != "CHANGELOG.md"  # of which old entries name what was there then
]
NAMES = "|".join((*PACKAGES, "tests", "docs", "examples", ".ci"))
# `service/store/` and `tests/unit/test_docs.py`, but not the path of a request or of another project.
PATH = re.compile(rf"(?<![\w./:-])((?:{NAMES})/[\w./-]*\w)")
MODULE = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)})(?:\.[a-z_0-9]+)+)(?![\w/])")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def module_exists(dotted: str) -> bool:
    """A module or package, or a name that one of them binds."""
    parent, _, last = dotted.rpartition(".")
    path, file = REPOSITORY / dotted.replace(".", "/"), REPOSITORY / f"{parent.replace('.', '/')}.py"
    package = REPOSITORY / parent.replace(".", "/") / "__init__.py"
    binds = any(re.search(rf"\b{last}\b", it.read_text(encoding="utf-8")) for it in (file, package) if it.is_file())
    return path.is_dir() or path.with_suffix(".py").is_file() or binds


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page: Path) -> None:
    missing = {path for path in PATH.findall(page.read_text(encoding="utf-8")) if not (REPOSITORY / path).exists()}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_modules_exist(page: Path) -> None:
    missing = {dotted for dotted in MODULE.findall(page.read_text(encoding="utf-8")) if not module_exists(dotted)}
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, *REPOSITORY.glob("CHANGELOG.md")], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_what_the_code_refers_to_exists() -> None:
    """`README.md, "Bounds"` in the science, `science/README.md, "Bounds"` elsewhere, and pages by their paths."""
    science = re.findall(r"^## (.+)$", (REPOSITORY / "workers/science/README.md").read_text(encoding="utf-8"), re.M)
    for folder in (*PACKAGES, "tests"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            code = path.read_text(encoding="utf-8")
            headings = re.findall(r'(?:^|[ (/])README\.md, "([A-Z][^"]+)"(?: and "([A-Z][^"]+)")?', code, re.M)
            assert {heading for both in headings for heading in both if heading} <= set(science), path
            pages = set(re.findall(r"\b(?:docs|service|workers)/[\w./-]+\.md\b", code))
            assert not [page for page in pages if not (REPOSITORY / page).is_file()], path


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = (target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")))
        linked = {(page.parent / path).resolve() for path in links if path.endswith(".md") and "://" not in path}
        waiting += [path for path in linked - reached if path not in waiting]
    assert {name(page) for page in PAGES} <= {name(page) for page in reached}

"""Specs in files mean what they say: YAML 1.2 and JSON, nothing guessed, nothing that JSON does not have."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.cli.commands.options import BadUsage
from api.cli.commands.submitting import read_spec
from api.cli.written import read

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),  # YAML 1.1 made this 8
        ("1e-3", 0.001),  # and this a text
        ("1E3", 1000.0),
        ("8/255", "8/255"),
        ("no", "no"),
        ("2026-11-29", "2026-11-29"),
        ("2026-99-99", "2026-99-99"),
        ("12:30:00", "12:30:00"),
        ("0o10", 8),
        ("0x1b", 27),
        ("1_0", "1_0"),  # YAML 1.1 made this 10
        ("1_0.5", "1_0.5"),
        ("0b11", "0b11"),
        ("\u0661", "\u0661"),
        ("0e-400", 0.0),
        ("~", None),
        ("=", "="),  # a tag of YAML 1.1 only
        ("<<", "<<"),
        ("{=: 1, '<<': 2}", {"=": 1, "<<": 2}),
        ("[<<, =, '<<']", ["<<", "=", "<<"]),
        ("9" * 4000, int("9" * 4000)),
        ("", None),
        ("[&x 1, *x]", [1, 1]),
    ],
)
def test_a_value_in_yaml(text: str, value: Any) -> None:
    document = read(f"a: {text}")
    assert isinstance(document, dict)
    assert document == {"a": value}
    assert type(document["a"]) is type(value)


@given(VALUES)
def test_whatever_is_written_as_json_is_read_as_it_is(value: Any) -> None:
    """With any layout, and with characters beyond the basic plane as pairs of escapes."""
    for text in (json.dumps(value), json.dumps(value, indent="\t"), json.dumps(value, ensure_ascii=False)):
        assert read(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: " + "9" * 5000, "line 2: a number has 5,000 digits, and no field takes so many"),
        ('{"a":\n' + "9" * 5000 + "}", "line 2: a number has 5,000 digits, and no field takes so many"),
        ("a: 1\nb: 2\na: 3", 'line 3: found duplicate key "a"'),
        ('{"a": 1,\n "a": 2}', 'line 2: found duplicate key "a"'),
        ("a: 1\n---\na: 2", "another document"),
        ("a: !!python/object:os.system x", "line 1"),
        ("a: !own x", "line 1"),
        ("a: !!binary aGVsbG8=", "line 1: it has a tag, 'tag:yaml.org,2002:binary'"),
        ("b: 1\na: !!set {x}", "line 2: it has a tag"),
        ("a: !!str 3", "it has a tag"),
        ("a: ! 3", "it has a tag, '!'"),
        ("!!map {a: 1}", "it has a tag"),
        ("!!str a: 1", "it has a tag"),
        ("%TAG ! tag:yaml.org,2002:\n---\na: !int 3", "line 3: it has a tag"),
        ("%YAML 2.0\n---\na: 1", "line 1: found incompatible YAML document"),
        ("grid: {scale: [1, .nan]}", "/grid/scale/1 is nan"),
        ('{"scale": 1e999}', "/scale is inf"),
        ('{"scale":\n 1e-400}', "line 2: '1e-400' is too small"),
        ("a: 1\nscale: -1e-400", "line 2: '-1e-400' is too small"),
        ('{"scale": NaN}', "/scale is nan"),
        ("labels: {2026: x}", "the key 2026 of /labels is no text"),
        ("yes: 1\ntrue: 2", "the key True"),
        ('{"name": "\\ud800"}', "half of a surrogate pair"),
        ("a: [1,", "line 1"),
        ("a: &x [*x]", "line 1: the alias 'x' is within itself"),
        ("a: &x {b: [*x]}", "line 1: the alias 'x' is within itself"),
        ("a: *x", "undefined alias"),
        ("[" * 100_000, "recursion"),
        ("a: \0", "special characters"),
    ],
)
def test_what_has_no_one_meaning_is_refused_with_where_it_stands(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.3"])
def test_it_is_yaml_1_2_whatever_the_document_says(version: str) -> None:
    written = "a: no\nb: 010\nc: 1e-3\nd: 12:30:00\ne: 1_0\nf: yes\ng: 0b11\nh: 0o10\ni: on\nj: 2026-11-29"
    value = {"a": "no", "b": 10, "c": 0.001, "d": "12:30:00", "e": "1_0", "f": "yes", "g": "0b11", "h": 8, "i": "on"}
    assert read(f"%YAML {version}\n---\n{written}") == read(written) == {**value, "j": "2026-11-29"}


def nine_of_nine(first: str, line: str) -> str:
    """Each line has nine of the line before, in nine lines: 9 ** 9 values of half a kilobyte."""
    lines = (line.format(i=i, nine=",".join([f"*a{i - 1}"] * 9)) for i in range(1, 10))
    return "\n".join([f"a0: &a0 {first}", *lines])


@pytest.mark.parametrize(
    "text",
    [
        nine_of_nine("[x,x,x,x,x,x,x,x,x]", "a{i}: &a{i} [{nine}]"),
        nine_of_nine("{x: 1}", "a{i}: &a{i} {{<<: [{nine}]}}"),
        nine_of_nine("x", "a{i}: &a{i} {{x: [{nine}]}}"),
        "a: &a [" + "x," * 1000 + "]\nb: [" + "*a," * 1000 + "]",
    ],
    ids=["lists", "merged", "mappings", "in one"],
)
def test_aliases_that_unfold_to_too_much_are_refused_before_they_do(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"line \d+: the aliases up to here unfold to more than 100,000 values"):
        read(text)
    assert time.process_time() - started < 2


def test_aliases_that_save_some_writing() -> None:
    text = "base: &base {scale: 1, seed: 2}\nmore: {<<: *base, seed: 3}\nlist: [*base, *base]"
    base = {"scale": 1, "seed": 2}
    assert read(text) == {"base": base, "more": {"scale": 1, "seed": 3}, "list": [base, base]}


READ = "import sys; from pathlib import Path; from api.cli.commands.submitting import read_spec; "
READ += "print([ascii(read_spec(Path(name))['name']) for name in sys.argv[1:]])"


def test_a_file_and_stdin_are_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    """With the mark that editors of Windows begin with, too."""
    content = "name: caf\u00e9 \u26a1".encode()
    (tmp_path / "plain.yaml").write_bytes(content)
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + content)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", READ, str(tmp_path / "plain.yaml"), str(tmp_path / "marked.yaml"), "-"]
    done = subprocess.run(command, input=content, env=environment, capture_output=True, check=True)
    assert done.stdout.decode().strip() == str([ascii("caf\u00e9 \u26a1")] * 3)


REPORT = """
import sys
from contextlib import nullcontext
from pathlib import Path
from api.cli.commands import exporting
from api.cli.report import Report
exporting.client_of = lambda *_: nullcontext()
exporting.report_of = lambda *_, **__: Report({"sweep": "caf\\u00e9 \\u26a1"}, [], {}, [], 0)
exporting.report(output=Path(sys.argv[1]))
"""


def test_a_report_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    file = tmp_path / "report.md"
    subprocess.run([sys.executable, "-c", REPORT, str(file)], env=environment, capture_output=True, check=True)
    assert "caf\u00e9 \u26a1" in file.read_text(encoding="utf-8")


ROOT = Path(__file__).parents[2]
TEXT_MODE = re.compile("[rwax+t]{1,3}")


def is_of_the_locale(call: ast.Call) -> bool:
    """Whether it opens, reads or writes a text without saying in which encoding."""
    given = {word.arg: word.value for word in call.keywords}
    if "encoding" in given:
        return False
    if any(isinstance(given.get(name), ast.Constant) for name in ("text", "universal_newlines")):
        return True
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen"):
        return False
    at = 0 if is_method and name == "open" else 1
    if len(call.args) <= at and "mode" not in given:
        return not call.args or not is_method
    mode = given.get("mode") or call.args[at]
    return isinstance(mode, ast.Constant) and TEXT_MODE.fullmatch(str(mode.value)) is not None


def test_no_text_is_read_or_written_in_the_locale_s_encoding() -> None:
    wrong = []
    for package in ("api", "service", "workers"):
        for path in (ROOT / package).rglob("*.py"):
            calls = (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call))
            wrong += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if is_of_the_locale(call)]
    assert wrong == []


def test_what_is_no_utf_8_is_said(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(BadUsage, match=r"cannot read .*latin.yaml: 'utf-8' codec"):
        read_spec(tmp_path / "latin.yaml")

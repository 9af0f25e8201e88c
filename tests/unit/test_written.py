"""Specs in files mean what they say: YAML 1.2 and JSON, nothing guessed, nothing that JSON does not have."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.written import read

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
        ("", None),
        ("[&x 1, *x]", [1, 1]),
    ],
)
def test_a_value_in_yaml(text: str, value: Any) -> None:
    assert read(f"a: {text}") == {"a": value}
    assert type(read(f"a: {text}")["a"]) is type(value)


@given(VALUES)
def test_whatever_is_written_as_json_is_read_as_it_is(value: Any) -> None:
    """With any layout, and with characters beyond the basic plane as pairs of escapes."""
    for text in (json.dumps(value), json.dumps(value, indent="\t"), json.dumps(value, ensure_ascii=False)):
        assert read(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", 'line 3: found duplicate key "a"'),
        ('{"a": 1,\n "a": 2}', 'line 2: found duplicate key "a"'),
        ("a: 1\n---\na: 2", "another document"),
        ("a: !!python/object:os.system x", "line 1"),
        ("a: !own x", "line 1"),
        ("a: !!binary aGVsbG8=", "/a is a bytes"),
        ("a: !!set {x}", "/a is a "),
        ("grid: {scale: [1, .nan]}", "/grid/scale/1 is nan"),
        ('{"scale": 1e999}', "/scale is inf"),
        ('{"scale":\n 1e-400}', "line 2: '1e-400' is too small"),
        ("a: 1\nscale: -1e-400", "line 2: '-1e-400' is too small"),
        ('{"scale": NaN}', "/scale is nan"),
        ("labels: {2026: x}", "the key 2026 of /labels is no text"),
        ("yes: 1\ntrue: 2", "the key True"),
        ('{"name": "\\ud800"}', "half of a surrogate pair"),
        ("a: [1,", "line 1"),
        ("a: &x [*x]", "nested too deep"),
        ("[" * 100_000, "recursion"),
        ("a: " + "9" * 5000, "limit"),
        ("a: \0", "special characters"),
    ],
)
def test_what_has_no_one_meaning_is_refused_with_where_it_stands(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)

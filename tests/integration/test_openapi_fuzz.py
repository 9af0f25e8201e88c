"""Every operation of the OpenAPI document, asked a few times for what it allows and forbids; at length is beside it."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fuzzing import BY_CHANCE, FUZZ, WITHOUT_TOKENS, Target, ask, existing
from hypothesis import settings

SCHEMA = schemathesis.openapi.from_dict(WITHOUT_TOKENS, config=BY_CHANCE)


@pytest.fixture(scope="module")
def open_server(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """On SQLite, without tokens."""
    with start_server(tmp_path_factory.mktemp("open")) as server:
        yield Target(server.url, {}, existing(server.sweep("fuzzed"), server.client))


@SCHEMA.parametrize()
@settings(FUZZ, max_examples=4)
def test_a_few_of_each(case: Any, open_server: Target) -> None:
    ask(case, open_server)

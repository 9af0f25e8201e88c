"""Whole numbers on the command line: one rule for every option."""

import re

import pytest
import typer
from typer.testing import CliRunner

from api.cli.commands.options import whole_number
from api.cli.main import app

OPTIONS = (
    ("results", "--limit"), ("jobs", "-n"), ("sweeps", "--limit"), ("serve", "--port"), ("gc", "--quota"),
    ("user", "set", "ada", "--max-queued-jobs"), ("priority", "01a22e44"),
)  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_what_is_no_whole_number_is_refused_in_a_sentence(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*command, "1_0"])
    assert done.exit_code == 2
    assert "'1_0' is not a whole number, such as 10" in _said(done.output)


@pytest.mark.parametrize("text", ["+5", "5.0", "007", "\u0661\u0660", "1e2", "ten", "", " 5", "8/2", "--5"])
def test_a_whole_number_is_digits(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is not a whole number, such as 10"):
        whole_number(-100, 100)(text)
    assert [whole_number(-100, 100)(one) for one in ("-5", "0", "10", "100")] == [-5, 0, 10, 100]


@pytest.mark.parametrize(
    ("command", "value", "allowed"),
    [
        (("results", "--limit"), "0", "1 or more"), (("jobs", "--limit"), "-5", "1 or more"),
        (("serve", "--port"), "65536", "0 to 65,535"), (("gc", "--quota"), "-1", "0 or more"),
        (("user", "set", "ada", "--max-queued-jobs"), "-1", "0 or more"),
        (("priority", "01a22e44", "--"), "-101", "-100 to 100"), (("priority", "01a22e44", "--"), "101", "-100 to 100"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_with_the_range(command: tuple[str, ...], value: str, allowed: str) -> None:
    done = CliRunner().invoke(app, [*command, value])
    assert done.exit_code == 2
    assert f"{value} is not in the range: {allowed}" in _said(done.output).replace("65,536", "65536")


def _said(output: str) -> str:
    """What was printed, without the frame and the line breaks of a terminal."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", output).split())

"""Output to terminals and pipes: control characters, letters that an encoding lacks, readers that go away."""

import codecs
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
ASCII = str.maketrans({"–": "-", "—": "-", "…": "...", "→": "->", "×": "x", "≤": "<=", "≥": ">=", "²": "2"})
SPELLED = "uncanny.spelled"


def plain(text: str) -> str:
    """The text with its control characters escaped, which would move the cursor or change colours and direction."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextmanager
def spoken_to(out: TextIO, err: TextIO) -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` be these streams, made safe for closed pipes and for poor encodings.

    If the reader closes the pipe early, as `head` does, the command ends at once with exit code 0.
    """
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELLED)
    with redirect_stdout(_Pipe(out)), redirect_stderr(_Pipe(err)):
        try:
            yield
        finally:
            for stream in (out, err):
                _Pipe(stream).flush()


class _Pipe:
    """A stream whose reader may go away."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            raise self._end() from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            raise self._end() from None

    def _end(self) -> SystemExit:
        """Discard all output from now on, also the interpreter's when it exits."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        return SystemExit(0)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Characters that the encoding lacks, in ASCII: our own signs by similar ones, others as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(ASCII)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(SPELLED, _spell)

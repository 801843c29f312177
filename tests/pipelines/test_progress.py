"""Progress for a log file and for a terminal, on stderr alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import termios
from collections.abc import Iterator

import pytest

from pipelines.progress import Progress, on_terminal, say


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[list[str]]:
    """stderr is a terminal; afterwards the list holds what it showed."""
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    shown: list[str] = []
    with os.fdopen(writer, "w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        yield shown
    data = b""
    with contextlib.suppress(OSError):  # the kernel's way to say that the other end is closed
        while part := os.read(reader, 65536):
            data += part
    os.close(reader)
    shown.append(data.decode())


def test_a_log_file_gets_plain_lines_with_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("train: step", 4, done=2, every_s=0.0)
    progress.advance(1, "loss 1.5")
    progress.advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"train: step 3/4, [\d.]+/s, \d+ s left, loss 1.5\ntrain: step 4/4, [\d.]+/s, 0 s left\n", err)


def test_a_terminal_gets_a_bar_and_lines_above_it(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal(100) as shown:
        assert on_terminal()
        progress = Progress("train: step", 4, done=2)
        progress.advance(1, "loss 1.5")
        say("a line")
        progress.advance(1, "loss 1.2")
    (seen,) = shown
    assert "train: step (loss 1.5):  50%" in seen or "train: step (loss 1.5):  75%" in seen
    assert re.search(r"\ra line\r\n", seen), "on a line of its own"
    assert re.search(r"train: step \(loss 1.2\): 100%\|█+\| 4/4 \[\d\d:\d\d<00:00", seen)
    assert capsys.readouterr().out == ""


def test_a_terminal_without_a_size_gets_lines() -> None:
    with terminal(0) as shown:
        assert not on_terminal()
        Progress("prepare", 1).advance(1)
    assert shown[0].startswith("prepare 1/1, ")

"""Standard output and error that cannot show a text, are full, or lead to nobody."""

import errno
import io
import os
import signal
import sys

import pytest
from conftest import ROOT

import benchmarks
import evaluate
import report
from training.log import Console
from training.terminal import Output, prepare_output

TEXT = "réd 名 \udcff ok"


class Failing(io.StringIO):
    """A stream whose writes, or only flushes, fail."""

    def __init__(self, error, when=("write", "flush")):
        super().__init__()
        self.error = error
        self.when = when

    def write(self, text):
        if "write" in self.when:
            raise self.error
        return super().write(text)

    def flush(self):
        if "flush" in self.when:
            raise self.error


def os_error(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "latin-1", "ascii", "cp1252", "cp437", "shift_jis", None]
)
def test_what_cannot_be_encoded_is_spelt_out(encoding):
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding) if encoding else io.StringIO()
    output = Output(stream)
    print(TEXT, file=output, flush=True)
    shown = data.getvalue().decode(encoding) if encoding else stream.getvalue()
    assert shown.startswith("r") and r"\udcff ok" in shown
    assert ("名" in shown) == (encoding in ("utf-8", "shift_jis", None))
    assert ("é" in shown) == (encoding not in ("ascii", "shift_jis"))


@pytest.mark.parametrize("when", [("write",), ("flush",), ("write", "flush")])
@pytest.mark.parametrize(
    "error, is_noted",
    [
        (os_error("EPIPE"), False),
        (os_error("EIO"), False),
        (os_error("EBADF"), False),
        (ValueError("I/O operation on closed file"), False),
        (os_error("ENOSPC"), True),
        (os_error("EDQUOT"), True),
    ],
)
def test_a_write_that_fails_stops_nothing(monkeypatch, error, is_noted, when):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Failing(error, when))
    prepare_output()
    print(TEXT, flush=True)
    print(TEXT, file=sys.stderr)
    console = Console(True)
    console.say(TEXT)
    assert list(console.progress(0, 3, "steps")) == [1, 2, 3]
    assert (sys.stdout.failure is not None) == is_noted


def test_streams_that_are_not_there(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_output()
    print(TEXT, flush=True)
    first = sys.stdout
    prepare_output()
    assert sys.stdout is first and not sys.stderr.isatty()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("main", [evaluate.main, benchmarks.main, report.main])
def test_help_for_nobody(monkeypatch, main):
    monkeypatch.setattr(sys, "stdout", Failing(os_error("EPIPE")))
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0


def test_every_command_prepares_its_output():
    """loop.py twice: its first lines print the help."""
    for name in ("loop.py", "evaluate.py", "benchmarks.py", "report.py", "training/command.py"):
        assert "\n    prepare_output()\n" in (ROOT / name).read_text(), name

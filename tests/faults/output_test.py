"""Output that nobody reads ends no run, and names do not command a terminal."""

import contextlib
import io
import os
import signal
import sys

import pytest

from ldrld_jax import cli
from ldrld_jax.record import console
from ldrld_jax.report import __main__ as report
from ldrld_jax.runtime.signals import Interrupted
from tests.conftest import ROOT


def test_what_came_from_outside_is_escaped_and_what_the_encoding_lacks_is_shown():
    assert console.printable("cat\x1b[2J\r\x07\nü") == "cat\\x1b[2J\\r\\x07\nü"
    assert console.printable("naïve \u2028 \udce9", "ascii") == "na\\xefve \\u2028 \\udce9"


class Gone(io.StringIO):
    """Standard output that nobody reads any more."""

    def __init__(self, error: OSError | None = None):
        super().__init__()
        self._error = error or BrokenPipeError(32, "Broken pipe")

    def write(self, text):
        raise self._error


def test_a_reader_that_has_gone_ends_no_help_and_no_report(tmp_path, monkeypatch):
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (tmp_path / name).write_bytes((ROOT / "experiments/digits/method=ce,seed=0" / name).read_bytes())
    for ended in (lambda: cli.main(["help", "data"]), lambda: report.main([str(tmp_path)])):
        monkeypatch.setattr(sys, "stdout", Gone())
        assert ended() == 0
        sys.stdout.close()
    assert (tmp_path / "report.html").exists()


def test_a_report_says_what_an_encoding_lacks_by_its_code(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert report.main([str(ROOT / "experiments/digits"), "--out", str(tmp_path)]) == 0
    stream.flush()
    assert b"\\xb1" in stream.buffer.getvalue()  # the sign between mean and deviation


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")], ids=str)
def test_a_reader_that_has_gone_ends_no_run(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    console.say("nobody hears this")
    console.say("nor this")
    with contextlib.suppress(OSError):
        sys.stdout.close()
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console.say("nor this")
    bar = console.ProgressBar(0, 3, "student")
    bar.update(1, {"loss": 0.5})
    bar.close()


def test_a_terminal_that_closes_hides_the_bar(monkeypatch):
    bar = console.ProgressBar(0, 3, "student")
    bar._bar.disable = False
    monkeypatch.setattr(bar._bar, "set_postfix", lambda *a, **k: (_ for _ in ()).throw(OSError(5, "gone")))
    bar.update(1, {"loss": 0.5})
    assert bar._bar.disable


def test_sighup_saves_as_sigterm_does_unless_it_is_ignored():
    from ldrld_jax.runtime.signals import catch_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the suite itself may run under nohup
    try:
        with pytest.raises(Interrupted, match="SIGHUP: there was"), catch_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
            signals.check()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with catch_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)

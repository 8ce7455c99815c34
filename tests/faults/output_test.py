"""Output that nobody reads ends no run, and names do not command a terminal."""

import contextlib
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import types

import pytest

from ldrld_jax import cli
from ldrld_jax.aot import report as aot
from ldrld_jax.bench import step
from ldrld_jax.data import speed
from ldrld_jax.deploy import export, predict
from ldrld_jax.errors import UserError
from ldrld_jax.record import console
from ldrld_jax.report import __main__ as report
from ldrld_jax.runtime.signals import Interrupted
from ldrld_jax.sweep import __main__ as sweep
from ldrld_jax.train import trainer
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


DIGITS = ["--config", "configs/digits.py"]
GRID = [*DIGITS, "--grid", "seed=1,2"]
ANSWERS = {
    "no command": [],
    "help of a key": ["help", "data"],
    "help of a command": ["help", "predict"],
    "the flag for help": ["train", "--help"],
    "the sweep's flag for help": ["sweep", "--help"],
    "the report's flag for help": ["report", "--help"],
    "completion": ["completion", "zsh"],
    "report": ["report", "experiments/digits/method=ce,seed=0", "--out", "{}/report"],
    "dry run": ["sweep", *GRID, "--workdir", "{}/sweep", "--dry_run"],
    "script": ["sweep", *GRID, "--workdir", "{}/sweep", "--launcher", "slurm"],
    "check": ["check", *DIGITS],
    "eval": ["eval", *DIGITS],
    "predict": ["predict", *DIGITS, "{}/a.png"],
    "compile": ["compile", *DIGITS, "--target", "cpu:8"],
    "bench": ["bench", *DIGITS],
    "bench_data": ["bench_data", *DIGITS],
}


@pytest.fixture
def at_once(monkeypatch):
    """Makes commands whose work is done at once; `check` says a line before its answer."""
    monkeypatch.setattr(trainer.Trainer, "check", lambda self: console.say("data  fine") or [])
    monkeypatch.setattr(trainer.Trainer, "evaluate", lambda self: {"top1": 50.0})
    monkeypatch.setattr(export, "student_of", lambda *given: [None])
    monkeypatch.setattr(predict, "find", lambda paths: paths)
    monkeypatch.setattr(predict, "predict", lambda student, paths, top_k: [(path, []) for path in paths])
    monkeypatch.setattr(aot, "costs_of", lambda config, target: [])
    monkeypatch.setattr(step, "measure", lambda config, profile: "a step takes 3 ms")
    monkeypatch.setattr(speed, "report", lambda data, batch_size, views: "1,000 images/s")


def ended(argv) -> int:
    try:
        return cli.main(argv)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    ("stdout", "status", "line"),
    [
        (lambda: Gone(OSError(errno.ENOSPC, "No space left")), 2, "No space left on device: standard output"),
        (lambda: Gone(OSError(errno.EIO, "gone")), 2, "Input/output error: standard output"),
        (lambda: None, 2, "Bad file descriptor: standard output"),
        (Gone, 0, ""),
        (lambda: Gone(ConnectionResetError(104, "Connection reset by peer")), 0, ""),
    ],
    ids=["full", "terminal", "closed", "pipe", "socket"],
)
def test_a_command_whose_answer_is_lost_fails_in_one_line_unless_its_reader_has_left(
    name, stdout, status, line, at_once, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdout", stdout())
    assert ended([word.format(tmp_path) for word in ANSWERS[name]]) == status
    if sys.stdout is not None:
        sys.stdout.close()
    error = capsys.readouterr().err
    assert error.endswith(f"{line}\n") and error.count("\n") == 1 if line else "Error" not in error


@pytest.mark.parametrize("argv", [["completion", "bash"], ["train", "--help"]], ids=" ".join)
def test_nor_does_the_end_of_python_add_a_line(argv):
    with pathlib.Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ldrld_jax.cli", *argv]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "ldrld_jax: No space left on device: standard output\n")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_full_disk_or_a_reader_that_has_gone_ends_no_sweep(monkeypatch, terminal):
    job = types.SimpleNamespace(name="seed=1", state="running", line=lambda: "running  seed=1")
    stdout = Gone(OSError(errno.ENOSPC, "No space left"))
    monkeypatch.setattr(stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    sweep._Screen()([job])
    sys.stdout.close()


def test_what_a_shell_reads_is_as_it_is(capsys):
    console.answer("a\tb", verbatim=True)
    console.answer("a\tb")
    assert capsys.readouterr().out == "a\tb\na\\tb\n"


def test_what_a_shell_reads_is_refused_where_the_encoding_lacks_it(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    console.answer("caf\xe9")  # shown as escaped
    with pytest.raises(UserError, match=r"^standard output is ascii, which has no 'é'\. Set PYTHONIOENCODING="):
        console.answer("caf\xe9", verbatim=True)


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left on device")],
    ids=str,
)
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

"""The terminal: a bar that says what it waits for, in 40 columns, without colours, and nothing elsewhere."""

import contextlib
import fcntl
import io
import os
import re
import struct
import sys
import termios
import threading
import time
import types

import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.record import console
from ldrld_jax.train import trainer


@contextlib.contextmanager
def terminal(monkeypatch, columns):
    """Puts a terminal in the place of standard error; yields a function that returns what is written to it."""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(writing, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)

        def written() -> str:
            text = ""
            print(end="\0", file=stderr, flush=True)
            while "\0" not in text:  # after which a thread may write
                text += os.read(reading, 1 << 16).decode()
            return text.replace("\0", "")

        yield written
    os.close(reading)


def last_line(text: str) -> str:
    return [part for part in re.split(r"[\r\n]+", text) if part.strip()][-1].rstrip()


def passed(bar: console.ProgressBar, seconds: float) -> None:
    """Makes what the bar does last longer, and lets its thread look."""
    since, doing = bar._doing
    bar._doing = (since - seconds, doing)
    bar._tick()


def started(steps: int | None = 45) -> console.ProgressBar:
    bar = console.ProgressBar(0, steps, "student resnet8")
    bar.at("compiling the train step")
    return bar


@pytest.mark.parametrize(
    ("columns", "compiling", "evaluating", "progress"),
    [
        (
            100,
            "student resnet8, compiling the train step, 12 s:   0%|",
            "student resnet8, compiling the evaluation after step 45, 3 s:   0%|",
            "student resnet8:  44%|",
        ),
        (
            40,  # of which tqdm leaves the last one free
            "0/45 compiling the train step, 12 s",
            "0/45 compiling the evaluation afte, 3 s",
            "student resnet8 20/45, 00:",
        ),
    ],
)
def test_the_bar_says_what_it_waits_for_and_how_long(columns, compiling, evaluating, progress, monkeypatch):
    with terminal(monkeypatch, columns) as written, contextlib.closing(started()) as bar:
        passed(bar, 0.5)
        assert "compiling" not in written()
        passed(bar, 11.9)
        assert last_line(written()).startswith(compiling)
        bar.at("compiling the train step")  # the same goes on
        passed(bar, 1)
        assert "compiling the train step, 13 s" in written()
        bar.at("compiling the evaluation after step 45")
        passed(bar, 3)
        assert last_line(written()).startswith(evaluating)
        bar._bar.mininterval = 0
        bar.update(20, {"loss": 1.25, "top1": 31.5})
        line = last_line(written())
        assert "compiling" not in line
        assert line.startswith(progress)


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_line_is_wider_than_the_terminal_and_none_has_a_colour(columns, no_color, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    with terminal(monkeypatch, columns) as written:
        with contextlib.closing(console.ProgressBar(0, 12345, "teacher imagenet_mobilenetv1")) as bar:
            bar._bar.mininterval = 0
            for step in (1, 999):
                bar.at(f"evaluating after step {step}")
                passed(bar, 3600)
                bar.update(step, {"loss": 6.907755, "top1": 0.1, "examples/s": 12345.678})
        text = written()
    assert max(map(len, re.split(r"[\r\n]+", text))) <= columns
    assert "\x1b[" not in text
    assert text.count(", 3600 s") == 2


def test_a_thread_counts_the_seconds_until_the_bar_is_closed(monkeypatch):
    monkeypatch.setattr(console, "_TICK_SECONDS", 0.005)
    threads = threading.active_count()
    with terminal(monkeypatch, 80) as written:
        bar = started()
        bar._doing = (time.monotonic() - 41, "compiling the train step")
        assert threading.active_count() == threads + 1
        text, until = "", time.monotonic() + 30
        while "compiling the train step, 41 s" not in text:
            assert time.monotonic() < until, text
            text += written()
            time.sleep(0.005)
        bar.close()
    assert threading.active_count() == threads


def test_what_has_no_steps_is_shown_alone_and_then_removed(monkeypatch):
    ticks = []
    monkeypatch.setattr(console.ProgressBar, "_watch", lambda bar: ticks.append(bar))
    with terminal(monkeypatch, 40) as written:
        with console.waiting("making the student") as at:
            (bar,) = ticks
            passed(bar, 2)
            assert last_line(written()) == "making the student, 2 s"
            at("teacher: compiling the evaluation")
            passed(bar, 9)
            assert last_line(written()) == "teacher: compiling the evaluation, 9 s"
        assert written().strip() == ""


def test_nothing_is_written_and_no_thread_started_where_there_is_no_terminal(capsys):
    threads = threading.active_count()
    bar = started()
    passed(bar, 60)
    bar.update(3, {"loss": 1.0})
    with console.waiting("making the student"):
        assert threading.active_count() == threads
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_line_for_a_stream_that_is_closed_is_lost_and_nothing_else(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    console.say("the first")
    console.say("the second")
    assert sys.stdout is not closed
    sys.stdout.close()


def test_a_stream_with_no_more_than_write_and_flush_is_written_to(monkeypatch):
    written = []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=written.append, flush=lambda: None))
    console.say("caf\u00e9")
    assert "".join(written) == "caf\u00e9\n"


def test_a_run_says_what_it_compiles_waits_for_and_writes(tiny, tmp_path, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(console.ProgressBar, "at", lambda bar, doing: said.append(f"{bar._name[:7]}: {doing}"))
    teacher = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=1", "epochs=1", f"logits.dir={tmp_path}/logits"]
    workdir = tmp_path / "run"
    summary = trainer.train(tiny(*teacher, "data.augment_seed=0"), workdir)
    of_teacher = [
        *("teacher: waiting for the input of step 1", "teacher: compiling the train step"),
        *("teacher: waiting for the input of step 2", "teacher: running step 2"),
        *("teacher: waiting for the input of step 3", "teacher: running step 3"),
        *("teacher: compiling the evaluation after step 3", "teacher: evaluating after step 3"),
        "teacher: saving after step 3",
    ]
    assert said[:2] == [": making the student", ": making the teacher"]
    assert [line for line in said if line.startswith("teacher")] == of_teacher
    measured = said[said.index(": evaluating the teacher") :]
    assert measured[1:3] == [": teacher: compiling the evaluation", ": teacher: evaluating"]
    mine = [line.removeprefix("student: ") for line in said if line.startswith("student")]
    assert mine[:4] == [
        *("waiting for the input of step 1", "compiling the teacher", "compiling the train step"),
        "waiting for the input of step 2",
    ]
    assert mine[4:6] == ["running the teacher", "running step 2"]
    assert mine[-2:] == ["evaluating after step 3", "saving after step 3"]
    said.clear()
    delta = f"{summary['best_top1'] - summary['teacher_top1']:+.2f}"
    assert f"1, best   {summary['best_top1']:8.2f} {summary['best_top5']:8.2f} {delta:>11}" in capsys.readouterr().out
    trainer.evaluate(config_lib.load_run(str(workdir)), workdir)
    assert said == [": compiling the evaluation"] * 2 + [": evaluating"]


SUMMARY = {
    "student": "resnet8",
    "teacher": None,
    "method": "ce",
    "seed": 3,
    "steps": 1350,
    "teacher_top1": None,
    "best_epoch": 240.0,
    "best_top1": 100.0,
    "best_top5": 100.0,
    "last_epoch": 240.0,
    "last_top1": 99.5,
    "last_top5": 100.0,
}


def test_the_closing_table_has_no_differences_without_a_teacher():
    assert console.summary_table(SUMMARY, "runs/a") == (
        "epoch      top-1 %  top-5 %\n"
        "240, best   100.00   100.00\n"
        "240, last    99.50   100.00\n"
        "\n"
        "resnet8 by ce, seed 3, 1350 steps: runs/a"
    )


def test_the_closing_table_fits_40_columns():
    table = console.summary_table(SUMMARY | {"teacher": "resnet20", "teacher_top1": 0.0}, "runs/a")
    assert [len(line) for line in table.splitlines()[:4]] == [39, 18, 39, 39]
    assert "240, best   100.00   100.00     +100.00" in table

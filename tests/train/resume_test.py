"""A run that a signal, a full disk, damage or a rival cuts short ends, by the same command, as if nothing had been."""

import contextlib
import errno
import json
import os
import shutil
import signal
import types

import chex
import pytest

from ldrld_jax import config, files, main
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.errors import UserError
from ldrld_jax.record import writer
from ldrld_jax.runtime.signals import Interrupted, Signals
from ldrld_jax.train import evaluator, loop, trainer
from tests.checkpoint.saved import contents, flip, largest
from tests.conftest import comparable_lines
from tests.train.trainer_test import saved

FLAGS = ("checkpoint.every_steps=2", "log.every_steps=4", "data.cache_mb=0")  # evaluated batch by batch


@pytest.fixture
def straight(tiny, tmp_path):
    trainer.train(tiny(*FLAGS), tmp_path / "straight")
    return tmp_path / "straight"


def assert_same(workdir, expected) -> None:
    assert comparable_lines(workdir) == comparable_lines(expected)
    chex.assert_trees_all_equal(saved(workdir, 6), saved(expected, 6))
    best = [Checkpoints(path / "checkpoints").best_step for path in (workdir, expected)]
    assert best[0] == best[1]


def at_call(monkeypatch, owner, name, number, do) -> None:
    """Does `do` before the call of that number (from 1 on) of a function."""
    original, calls = getattr(owner, name), iter(range(1, 10**6))

    def wrapped(*args, **kwargs):
        if next(calls) == number:
            do()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def die(*args):
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# 50 images in batches of 24: three batches, and a call before them.
@pytest.mark.parametrize(("call", "step"), [(2, 3), (7, 6)], ids=["first", "last"])
def test_an_evaluation_that_a_signal_cuts_short_is_made_by_the_run_that_resumes(
    tiny, tmp_path, monkeypatch, programs, straight, call, step
):
    assert programs() == {"stepped": (1, 1), "evaluate_batch": (1, 1)}  # a remainder each, and no second program
    with monkeypatch.context() as patch:
        at_call(patch, loop._Pause, "_each_batch", call, terminate)
        with pytest.raises(Interrupted, match=f"SIGTERM: the state after step {step} is saved"):
            trainer.train(tiny(*FLAGS), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    evaluated = [line["step"] for line in comparable_lines(tmp_path / "run") if line["split"] == "eval"]
    assert evaluated == [3, 6][: step // 3 - 1]
    with monkeypatch.context() as patch:  # and dies again when it has just been made
        patch.setattr(loop.Recorder, "to_json", die)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tiny(*FLAGS), tmp_path / "run")
    programs()
    trainer.train(tiny(*FLAGS), tmp_path / "run")
    assert programs() == {"evaluate_batch": (1, 1)} | ({"stepped": (1, 1)} if step == 3 else {})
    assert_same(tmp_path / "run", straight)


def test_a_signal_while_a_split_in_memory_is_evaluated_saves_first(tiny, tmp_path, monkeypatch):
    flags = [flag for flag in FLAGS if "cache_mb" not in flag]
    trainer.train(tiny(*flags), tmp_path / "straight")
    never = types.SimpleNamespace(values=types.SimpleNamespace(is_ready=terminate))  # which is false
    make = evaluator.Evaluator.__init__

    def slow(self, *arguments):
        make(self, *arguments)
        self.split = lambda *inputs: never

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "__init__", slow)
        with pytest.raises(Interrupted, match="SIGTERM: the state after step 3 is saved"):
            trainer.train(tiny(*flags), tmp_path / "run")
    trainer.train(tiny(*flags), tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (loop._Pause, "_save", 4),  # after steps 2, 3, 4 and 6
        (loop, "_summary", 1),
        (trainer, "summary_table", 1),
    ],
    ids=["saving", "closing", "showing"],
)
def test_a_signal_after_the_last_evaluation_ends_the_caller_with_the_run_complete(
    tiny, tmp_path, monkeypatch, straight, owner, name, call
):
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, terminate)
        with pytest.raises(Interrupted, match=r"^SIGTERM: the work in hand was completed\.$"):
            trainer.train(tiny(*FLAGS), tmp_path / "run", leave_within=60.0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_epoch"] == 2
    assert_same(tmp_path / "run", straight)
    with monkeypatch.context() as patch:  # nor is it lost while a complete run is looked up
        at_call(patch, trainer, "counted", 1, terminate)
        with pytest.raises(Interrupted, match="the work in hand was completed"):
            trainer.train(tiny(*FLAGS), tmp_path / "run")
    assert trainer.train(tiny(*FLAGS), tmp_path / "run") == summary


def test_a_signal_when_the_teacher_is_complete_begins_no_student(tiny, tmp_path, monkeypatch):
    config = tiny("method=kd", "teacher.model=tiny_net", "teacher.epochs=1", *FLAGS)
    with monkeypatch.context() as patch:
        at_call(patch, loop, "_summary", 1, terminate)
        with pytest.raises(Interrupted, match="the work in hand was completed"):
            trainer.train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["teacher"]
    assert (tmp_path / "run" / "teacher" / "summary.json").exists()


def test_a_signal_has_no_deadline_once_the_last_step_is_saved(tiny, tmp_path, monkeypatch):
    seen = []
    signals = Signals()
    monkeypatch.setattr(trainer, "catch_signals", lambda _: contextlib.nullcontext(signals))
    at_call(monkeypatch, loop, "_summary", 1, lambda: seen.append(signals.in_time))  # of the teacher
    at_call(monkeypatch, loop, "make_step", 2, lambda: seen.append(signals.in_time))  # of the student, whose signals
    trainer.train(tiny("method=kd", "teacher.model=tiny_net", "teacher.epochs=1", *FLAGS), tmp_path)  # are the same
    assert seen == [True, False]


def test_a_signal_before_the_first_step_leaves_nothing(tiny, teacher_dir, tmp_path, monkeypatch):
    config = tiny("method=kd", f"teacher.checkpoint={teacher_dir}", *FLAGS)
    with monkeypatch.context() as patch:
        at_call(patch, trainer, "obtain_teacher", 1, terminate)
        with pytest.raises(Interrupted, match="SIGTERM: there was nothing to save yet"):
            trainer.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_while_the_teacher_trains_saves_the_teacher(tiny, tmp_path, monkeypatch):
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=2", *FLAGS]
    with monkeypatch.context() as patch:
        at_call(patch, loop._Pause, "_each_batch", 2, terminate)
        with pytest.raises(Interrupted, match="after step 3 is saved"):
            trainer.train(tiny(*flags), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["teacher"]
    trainer.train(tiny(*flags), tmp_path / "run")
    trainer.train(tiny(*flags), tmp_path / "straight")
    assert_same(tmp_path / "run" / "teacher", tmp_path / "straight" / "teacher")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    tiny, tmp_path, straight, monkeypatch, caplog, capsys
):
    class AtFive(Signals):
        def stop_at(self, step):
            self.received = signal.SIGTERM if step == 5 else None
            return step == 5

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "catch_signals", lambda _: contextlib.nullcontext(AtFive()))
        with pytest.raises(Interrupted):
            trainer.train(tiny(*FLAGS), run)
    flip(largest(run / "checkpoints" / "5"), 60)
    trainer.train(tiny(*FLAGS), run)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "5 is damaged (it cannot be read" in warning
    assert "resuming the student at step 4 of 6" in capsys.readouterr().out
    assert_same(run, straight)
    assert "5.corrupt" in [p.name for p in (run / "checkpoints").iterdir()]


def test_a_disk_that_is_full_of_metrics_ends_the_run_in_one_line(tiny, tmp_path, straight, monkeypatch, capsys):
    write = writer.append_text

    def full_at_four(path, text):
        if '"step": 4' in text:
            write(path, text[:20])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    made = tiny(*FLAGS)
    with monkeypatch.context() as patch:
        patch.setattr(config, "load", lambda *args: made)
        patch.setattr(writer, "append_text", full_at_four)
        assert main.main(["--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"ldrld_jax: No space left on device: {tmp_path / 'run' / 'metrics.jsonl'}"
    trainer.train(made, tmp_path / "run")
    assert_same(tmp_path / "run", straight)


def test_two_runs_in_one_workdir_are_one_too_many(tiny, tmp_path, straight):
    before = contents(straight)
    (straight / "summary.json").rename(tmp_path / "aside")  # as if it still had to be trained
    with files.locked(straight), pytest.raises(files.UserError, match="another process is running in"):
        trainer.train(tiny(*FLAGS), straight)
    (tmp_path / "aside").rename(straight / "summary.json")
    assert contents(straight) == before


def test_one_checkpoint_every_so_many_epochs_is_kept_for_good(tiny, tmp_path):
    flags = ["checkpoint.keep_every_epochs=2", "checkpoint.keep_last=1", "eval_every_epochs=5", "epochs=5"]
    trainer.train(tiny(*flags), tmp_path)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [6, 12, 15]


def test_the_summary_of_a_run_without_its_checkpoints_is_not_replaced(tiny, tmp_path):
    """A run of more epochs would begin anew and write over the records of the one before."""
    constant = "optim.schedule=constant", "optim.warmup=none"
    trainer.train(tiny(*constant), tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match=r"has the summary of a run and none of its checkpoints"):
        trainer.train(tiny(*constant, "epochs=3"), tmp_path / "run")
    assert contents(tmp_path / "run") == before
    (tmp_path / "run/summary.json").unlink()
    assert trainer.train(tiny(*constant, "epochs=3"), tmp_path / "run")["steps"] == 9

"""A run that dies at any moment goes on by the same command, and ends as if it had not died.

LDRLD_JAX_KILLS=50 python -m pytest -n 0 -s tests/kill_test.py   # three kills unless this says otherwise
"""

import itertools
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.data.sources import open_source
from ldrld_jax.record.reader import read_metrics
from tests.conftest import ROOT, comparable_lines, tiny_overrides
from tests.train.trainer_test import saved

EPOCHS = 8
STEPS = EPOCHS * 3
KILLS = int(os.environ.get("LDRLD_JAX_KILLS", "3"))


@pytest.fixture(scope="module")
def flags(data_dir, tmp_path_factory):
    overrides = [*tiny_overrides(data_dir), f"epochs={EPOCHS}", "checkpoint.every_steps=2", "data.cache_mb=0"]
    overrides += ["method=ldrld", "teacher.model=tiny_net", "teacher.epochs=1"]
    overrides += ["checkpoint.min_seconds=0"]  # none is held, so that a checkpoint at most 4 steps old is on disk
    overrides += [f"teacher.workdir={tmp_path_factory.mktemp('teacher')}"]  # the first run trains it
    return ["--config", "tests/tiny_config.py", *(f"--config.{override}" for override in overrides)]


COMMAND_LINE = "-m", "ldrld_jax.main", "--workdir"
SCRIPT = """
import sys
import numpy as np
import ldrld_jax
from flax import nnx
from tests.train.library_test import Drop

with np.load(sys.argv[2]) as data:
    images, labels, weights = data["images"], data["labels"], data["weights"]
ldrld_jax.Trainer(
    student=Drop(nnx.Rngs(0)),
    teacher=ldrld_jax.HostTeacher(lambda images: images.reshape(len(images), -1) @ weights),
    train=(images, labels),
    evaluation=(images, labels),
    batch_size=32,
    epochs=8,
    workdir=sys.argv[1],
    config={"checkpoint.every_steps": 2, "log.every_steps": 1, "mesh.data": 1, "log.tensorboard": False},
).fit()
"""


class Process:
    """A run in a process of its own, its output in a file.

    Args:
      flags: after the workdir.
      workdir: of the run.
      program: what Python runs, up to the workdir.
    """

    def __init__(self, flags, workdir: pathlib.Path, program=COMMAND_LINE):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        command = [sys.executable, *program, str(workdir), *flags]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self._seen = lines(workdir)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def until(self, condition) -> None:
        """Waits for `condition(self)` or the end."""
        while not self.ended() and not condition(self):
            time.sleep(0.001)

    def writes(self) -> bool:
        """Past imports and compilation: a line has been written, or those after the checkpoint cut off."""
        return lines(self.workdir) != self._seen

    def evaluates(self) -> bool:
        """The last line is that of a step after which an evaluation comes."""
        last = [line for line in lines(self.workdir)[-1:] if self.writes()]
        return any(line["split"] == "train" and line["step"] % 3 == 0 for line in last)

    def saves(self) -> bool:
        return any(self.workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))

    def kill(self, signum=signal.SIGKILL) -> int:
        self._process.send_signal(signum)
        return self._process.wait(timeout=60)

    def wait(self) -> int:
        return self._process.wait(timeout=300)

    def resumed_from(self) -> int:
        found = re.search(r"resuming the student at step (\d+)", self.log.read_text())
        return int(found[1]) if found else 0


def lines(workdir) -> list[dict]:
    return [line for line in read_metrics(workdir) if line["split"] in ("train", "eval")]


def last_step(workdir) -> int:
    return max((line["step"] for line in lines(workdir)), default=0)


def newest_step(workdir) -> int:
    return Checkpoints(workdir / "checkpoints").latest_step or 0


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The workdir of a run that nobody killed, how long it took to its first metrics, and from there on."""
    begun = time.monotonic()
    process = Process(flags, tmp_path_factory.mktemp("uninterrupted") / "run")
    process.until(Process.writes)
    written = time.monotonic()
    assert process.wait() == 0, process.log.read_text()
    return process.workdir, written - begun, time.monotonic() - written


def assert_same_run(workdir, expected) -> None:
    assert comparable_lines(workdir) == comparable_lines(expected)
    chex.assert_trees_all_equal(saved(workdir, STEPS), saved(expected, STEPS))
    kept = [{p.name for p in (path / "checkpoints").iterdir()} for path in (workdir, expected)]
    assert kept[0] == kept[1]


def test_kill_9_at_any_moment_changes_nothing(flags, uninterrupted, tmp_path):
    """Prints a table, which pytest shows with -s: a run that has ended is compared, and another is begun."""
    expected, startup, seconds = uninterrupted
    draw, runs = random.Random(0), iter(range(10**6))
    moments = {
        "start-up": lambda process: time.sleep(draw.uniform(0, startup / 2)),
        "checkpoint": lambda process: process.until(Process.saves),
        "evaluation": lambda process: process.until(Process.evaluates),
        "step": lambda process: None,
    }
    print(f"\n{'kill':>4}  {'moment':<10}  {'died at':>7}  {'resumed':>7}  {'again':>5}")
    workdir, table, moment = tmp_path / str(next(runs)), [], itertools.cycle(moments)
    name = next(moment)
    while len(table) < KILLS:
        process = Process(flags, workdir)
        if name != "start-up":
            process.until(Process.writes)
            time.sleep(draw.uniform(0, seconds / 2))
        moments[name](process)
        if process.ended():
            assert process.wait() == 0, process.log.read_text()
        process.kill()
        if (workdir / "summary.json").exists():  # it was not to be caught any more
            assert_same_run(workdir, expected)
            workdir = tmp_path / str(next(runs))
            continue
        died, newest = last_step(workdir), newest_step(workdir)
        table.append((name, died, newest))
        print(f"{len(table):>4}  {name:<10}  {died:>7}  {newest:>7}  {max(died - newest, 0):>5}")
        name = next(moment)
    last = Process(flags, workdir)
    assert last.wait() == 0, last.log.read_text()
    assert last.resumed_from() == table[-1][2]
    assert_same_run(workdir, expected)
    assert all(died - newest <= 4 for _, died, newest in table)  # one is due every second step, one may be under way


def test_a_signal_saves_and_leaves_and_the_same_command_resumes(flags, uninterrupted, tmp_path):
    expected, *_ = uninterrupted
    stopped = 0
    for signum in (signal.SIGTERM, signal.SIGINT):
        process = Process([*flags, "--config.checkpoint.min_seconds=1000"], tmp_path / "run")  # those held are written
        process.until(Process.writes)
        assert process.kill(signum) == 128 + signum
        assert process.resumed_from() == stopped  # no step is lost, none repeated
        stopped = last_step(process.workdir)
    resumed = Process(flags, process.workdir)
    assert resumed.wait() == 0, resumed.log.read_text()
    assert resumed.resumed_from() == stopped
    assert_same_run(process.workdir, expected)


def test_kill_9_of_a_script_with_a_trainer_changes_nothing(data_dir, rng, tmp_path, monkeypatch):
    """Trains a student that has Dropout, by a teacher that runs on the host."""
    images, labels = open_source("digits", "train[:90]", data_dir).read(np.arange(90))
    np.savez(tmp_path / "data.npz", images=images, labels=labels, weights=rng.normal(size=(64, 10)).astype(np.float32))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "whole"), str(tmp_path / "data.npz")])
    exec(SCRIPT, {})
    start = lambda: Process([str(tmp_path / "data.npz")], tmp_path / "killed", ("-c", SCRIPT))  # noqa: E731
    process = start()
    process.until(lambda process: last_step(process.workdir) > 8)  # on disk is step 2; later ones are held for 10 s
    assert process.kill() == -signal.SIGKILL
    newest = newest_step(process.workdir)
    last = start()
    assert last.wait() == 0, last.log.read_text()
    assert 2 <= last.resumed_from() == newest < STEPS
    assert_same_run(last.workdir, tmp_path / "whole")

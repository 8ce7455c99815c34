"""A run that dies at any moment goes on by the same command, and ends as if it had not died.

LDRLD_JAX_KILLS=50 python -m pytest tests/kill_test.py   # three kills unless this says otherwise
"""

import os
import random
import signal
import subprocess
import sys
import time

import chex
import pytest

from tests.conftest import ROOT, comparable_lines, run_main, tiny_overrides
from tests.trainer_test import saved

# One worker: the run that nobody kills is made once.
pytestmark = pytest.mark.xdist_group("kill")

EPOCHS = 8
KILLS = int(os.environ.get("LDRLD_JAX_KILLS", "3"))


@pytest.fixture(scope="module")
def flags(data_dir, teacher_dir):
    overrides = [*tiny_overrides(data_dir), f"epochs={EPOCHS}", "checkpoint.every_steps=2", "log.every_steps=5"]
    overrides += ["method=ldrld", f"teacher.checkpoint={teacher_dir}"]
    return [f"--config.{override}" for override in overrides]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The workdir of a run that nobody killed, and how long it took from its first metrics on."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = start(flags, workdir)
    wait_for_metrics(process, workdir)
    begun = time.monotonic()
    assert process.wait(timeout=300) == 0
    return workdir, time.monotonic() - begun


def start(flags, workdir) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldrld_jax.main", "--workdir", str(workdir), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_metrics(process, workdir) -> None:
    """Until the process has written to `metrics.jsonl` (or ended): past its imports and compilation."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_mtime_ns if path.exists() else None
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns != before):
        time.sleep(0.005)


def assert_same_run(workdir, expected) -> None:
    steps = EPOCHS * 3
    assert comparable_lines(workdir) == comparable_lines(expected)
    chex.assert_trees_all_equal(saved(workdir, steps), saved(expected, steps))
    kept = [{p.name for p in (path / "checkpoints").iterdir()} for path in (workdir, expected)]
    assert kept[0] == kept[1]


def test_kill_9_at_random_moments_changes_nothing(flags, uninterrupted, tmp_path):
    expected, seconds = uninterrupted
    draw = random.Random(0)
    for _ in range(KILLS):
        process = start(flags, tmp_path)
        wait_for_metrics(process, tmp_path)
        time.sleep(draw.uniform(0, seconds / 2))
        process.kill()
        process.wait()
    done = run_main("--workdir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_resumes(flags, uninterrupted, tmp_path, signum):
    expected, _ = uninterrupted
    process = start(flags, tmp_path)
    wait_for_metrics(process, tmp_path)
    process.send_signal(signum)
    assert process.wait(timeout=60) == 128 + signum
    resumed = run_main("--workdir", tmp_path, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming the student at step" in resumed.stdout
    assert_same_run(tmp_path, expected)

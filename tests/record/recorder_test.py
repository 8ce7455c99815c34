"""The record of a run goes on where the run that it resumes had stopped."""

import time

import jax.numpy as jnp
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.metrics import Mean, pack
from ldrld_jax.record.recorder import Recorder


@pytest.fixture
def now(monkeypatch):
    """A clock's time, to be set."""
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def recorder(tmp_path):
    config = config_lib.resolve(config_lib.load("configs/digits.py", ["log.tensorboard=False"]))
    return lambda host, start: Recorder(tmp_path, config, "student", host, start=start, steps=8, steps_per_epoch=4)


def test_the_time_of_a_resumed_run_includes_that_before(recorder, now):
    first = recorder(None, 0)
    now[0] += 7.5
    kept = first.to_json()
    first.close()
    now[0] += 1000.0
    second = recorder(kept, 4)
    now[0] += 2.5
    assert (kept["seconds"], second.seconds) == (7.5, 10.0)
    second.close()


def test_a_resumed_run_has_the_speed_of_before_until_it_has_its_own(recorder, now):
    means = pack({name: Mean(jnp.array(1.0), jnp.array(1.0)) for name in ("loss", "top1")})
    first = recorder(None, 0)
    assert first.examples_per_second == 0
    for step in (1, 2):
        first.add(step, means)
        now[0] += 0.5
    kept = first.to_json()
    first.close()
    now[0] += 1000.0
    second = recorder(kept, 2)
    speeds = []
    for step in (3, 4):
        speeds.append(second.examples_per_second)
        second.add(step, means)
        now[0] += 0.25
    second.close()
    assert speeds == [128.0, 128.0] and second.examples_per_second == 256.0  # batches of 64


def test_a_pause_after_each_dispatch_is_no_time_of_steps(recorder, now):
    """Pauses after each dispatch, as a run does whose epochs are one dispatch each; its speed was 0."""
    means = pack({name: Mean(jnp.array(1.0), jnp.array(1.0)) for name in ("loss", "top1")})
    run = recorder(None, 0)
    for step in (1, 2):
        now[0] += 0.5
        run.add(step, means)
        now[0] += 100.0
        run.evaluated(step, {"top1": 50.0, "top5": 50.0, "ce": 1.0})
        run.go_on()
    run.close()
    assert run.examples_per_second == 64 / 0.5

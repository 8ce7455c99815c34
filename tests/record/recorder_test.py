"""The record of a run goes on where the run that it resumes had stopped."""

import pathlib
import time

from ldrld_jax import config as config_lib
from ldrld_jax.record.recorder import Recorder


def test_the_time_of_a_resumed_run_includes_that_before(tmp_path, monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = config_lib.resolve(config_lib.load("configs/digits.py", ["log.tensorboard=False"]))

    def recorder(host, start):
        return Recorder(pathlib.Path(tmp_path), config, "student", host, start=start, steps=8, steps_per_epoch=4)

    first = recorder(None, 0)
    now[0] += 7.5
    kept = first.to_json()
    first.close()
    now[0] += 1000.0
    second = recorder(kept, 4)
    now[0] += 2.5
    assert (kept["seconds"], second.seconds) == (7.5, 10.0)
    second.close()
    del kept["seconds"]  # as checkpoints of older versions are
    third = recorder(kept, 4)
    assert third.seconds == 0.0
    third.close()

"""The measurement of the input alone, and the word about a run that waits for it."""

import itertools

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import make_train_batches
from ldrld_jax.data.speed import measure, watched


@pytest.mark.parametrize("loader", ["stream", "resident"])
def test_every_stage_is_measured(loader, data_dir):
    data = config_lib.load("configs/digits.py", [f"data.data_dir={data_dir}", f"data.loader={loader}"]).data
    rates = measure(data, make_train_batches(data, batch_size=16, seed=0), 0.05)
    assert list(rates) == ["read", "decode", "augment", "pipeline"]
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_of_any_channels_are_measured(channels, tmp_path):
    np.savez(tmp_path / "d.npz", x_train=np.zeros((8, 8, 8, channels), np.uint8), y_train=np.arange(8) % 2)
    data = config_lib.load("configs/digits.py", [f"data.name=arrays:{tmp_path / 'd.npz'}"]).data
    stages = ["read", "augment", "pipeline"] if channels in (2, 4) else ["read", "decode", "augment", "pipeline"]
    assert list(measure(data, make_train_batches(data, batch_size=8, seed=0), 0.0)) == stages


def test_the_command_line_prints_a_table(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ldrld_jax.data.speed.rate", lambda work, seconds: 10.0 * bool(len(work())))
    argv = ["--mode", "bench_data", f"--config.data.data_dir={data_dir}", "--workdir", str(tmp_path / "run")]
    assert main_lib.main(argv) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == "digits, train: images per second"
    assert rows[-1].split() == ["pipeline", "640", "batches", "of", "64,", "loader", "stream,", "4", "threads"]
    assert not (tmp_path / "run").exists()


def test_the_table_is_of_the_views_that_the_method_compares(data_dir, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("ldrld_jax.data.speed.rate", lambda work, seconds: seen.append(work()) or 1.0)
    common = ["--mode=bench_data", f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"]
    assert main_lib.main([*common, "--config.method=kd+sld"]) == 0
    assert seen[-1]["image"].shape == (64, 2, 8, 8, 1)
    assert "batches of 64, 2 views each, loader stream" in capsys.readouterr().out
    assert main_lib.main([*common, "--config.method=sld", "--config.data.loader=resident"]) == 2
    assert "data.loader=resident makes one view of an image, not 2" in capsys.readouterr().err


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def slow(self, values, seconds):
        for value in values:
            self.now += seconds
            yield value


@pytest.mark.parametrize(("input_seconds", "told"), [(0.05, False), (0.2, True)])
def test_a_run_that_waits_for_its_input_says_so_once(input_seconds, told, caplog):
    """Steps of one second; the first batch takes long, as it does when threads start."""
    clock = Clock()
    batches = itertools.chain(clock.slow(range(1), 60.0), clock.slow(range(1, 1000), input_seconds))
    for expected, batch in enumerate(watched(batches, clock=clock)):
        assert batch == expected
        clock.now += 1.0
    assert expected == 999
    assert caplog.text.count("waits for its input 17 % of the time") == int(told)

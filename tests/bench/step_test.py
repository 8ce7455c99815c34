"""The bench: its numbers agree with each other, its FLOPs with what can be counted by hand, and it writes nothing."""

import jax
import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.bench import step as bench
from ldrld_jax.bench.result import PARTS, Bench
from ldrld_jax.train.plan import Run


def test_a_bench_of_a_distillation(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["method=kd", "teacher.model=tiny_net", "teacher.epochs=9", "mesh.data=1"]
    flags += ["data.loader=resident", "steps_per_dispatch=2"]
    measured = bench.measure(tiny(*flags), seconds=0.05, profile=str(tmp_path / "trace"))
    assert set(measured.part_seconds) == set(PARTS)
    assert all(seconds > 0 for seconds in measured.part_seconds.values())
    assert all(0 < share <= 100 for share in measured.shares.values())
    assert measured.examples_per_second * measured.run_seconds == pytest.approx(40)
    # 40 images, 4x4x16 places of 9 products in teacher, student and the weights' gradient; heads and the rest beside.
    assert 3 * 40 * 256 * 9 * 2 < measured.flops < 3 * 3 * 40 * 256 * 9 * 2
    assert measured.peak_share is None
    images = 40 * 8 * 8
    assert images < measured.program_bytes < 100 * images
    lines = str(measured).splitlines()
    assert lines[0] == "tiny_net, kd from tiny_net (random weights: its recipe is not run)"
    assert lines[1].startswith("batch 40, float32, loader resident, 2 steps a dispatch; 1 x cpu, jax ")
    assert f"{measured.examples_per_second:.0f}  examples/s" in lines[4]
    assert "lies in" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"trace"}
    assert list(tmp_path.glob("trace/plugins/profile/*/*.trace.json.gz"))


def test_a_run_of_few_steps_is_timed_for_as_long_as_any_other(tiny):
    measured = bench.measure(tiny("mesh.data=1", "epochs=1"), seconds=0.05)  # of three steps
    assert measured.run_seconds > 0


def test_every_process_dispatches_as_many_steps_as_the_first(tiny, monkeypatch):
    run = Run.plan(config_lib.resolve(tiny("mesh.data=1", "data.train_split=train[:80]")), epath.Path(""))
    measurement = bench._Measurement(run, 5.0)
    assert [measurement._calls(seconds) for seconds in (0.1, 0.3, 3.0)] == [10, 3, 1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(bench.multihost_utils, "broadcast_one_to_all", lambda count: count + 1)
    assert [measurement._calls(seconds) for seconds in (0.1, 0.3, 3.0)] == [11, 4, 2]


def test_microbatches_and_recomputation_do_not_change_the_flops(tiny):
    def flops(*overrides):
        run = Run.plan(
            config_lib.resolve(tiny("mesh.data=1", "data.train_split=train[:80]", *overrides)), epath.Path("")
        )
        return bench._Measurement(run, 0.1)._flops(next(run.batches.iterate()))

    assert flops("accumulate=4", "remat=True") == pytest.approx(flops(), rel=1e-3)


def test_shares_and_the_share_of_the_peak():
    result = Bench("", 1.0, 0.5, 64, {"step": 0.25, "input": 0.75}, 1e12, 8e12, None, None)
    assert result.examples_per_second == 128
    assert result.shares == {"step": 50, "input": 100}
    assert result.peak_share == 25
    assert "25.0 % of the peak" in str(result)

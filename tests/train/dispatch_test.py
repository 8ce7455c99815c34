"""Several steps in one dispatch: the same run, cut where a run may stop."""

import contextlib
import functools
import signal
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.metrics import Mean, pack
from ldrld_jax.record.recorder import NonFiniteError, Recorder
from ldrld_jax.runtime.signals import Interrupted, Signals
from ldrld_jax.train import trainer
from ldrld_jax.train.dispatch import count_steps
from tests.conftest import comparable_lines
from tests.train.trainer_test import saved


@pytest.fixture
def resident(tiny):
    """Two epochs of ten full batches and a remainder of ten images."""
    return functools.partial(tiny, "data.loader=resident", "data.flip=True", "data.train_split=train[:410]")


def run_of(workdir):
    """The lines and the last arrays of a finished run."""
    return [(line["step"], line["values"]) for line in comparable_lines(workdir)], saved(workdir, 22)


def test_several_steps_in_one_dispatch_are_the_single_steps(resident, tmp_path):
    for count in (1, 5):
        trainer.train(resident("precision=float64", f"steps_per_dispatch={count}"), tmp_path / str(count))
    chex.assert_trees_all_close(run_of(tmp_path / "5"), run_of(tmp_path / "1"), rtol=1e-12, atol=1e-12)


def test_they_resume_bitwise_from_any_step(resident, tmp_path, monkeypatch, programs):
    """Stops eight devices after step 7: their dispatches end at steps 4, 5, 6, which is a checkpoint's, and 7."""
    flags = ["mesh.data=8", "steps_per_dispatch=4", "checkpoint.every_steps=6"]
    trainer.train(resident(*flags), tmp_path / "straight")
    assert programs() == {"stepped": (1, 1), "steps": (1, 1), "evaluate_split": (1, 1)}

    class AfterSeven(Signals):
        def stop_at(self, step):
            self.received = signal.SIGTERM if step == 7 else None
            return step == 7

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "catch_signals", lambda _: contextlib.nullcontext(AfterSeven()))
        with pytest.raises(Interrupted, match="after step 7 is saved"):
            trainer.train(resident(*flags), tmp_path / "resumed")
    programs()
    trainer.train(resident(*flags), tmp_path / "resumed")
    assert programs() == {"stepped": (1, 1), "evaluate_split": (1, 1)}  # the rest has no four steps together
    assert comparable_lines(tmp_path / "resumed") == comparable_lines(tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "resumed", 22), saved(tmp_path / "straight", 22))
    trainer.train(resident("mesh.data=8"), tmp_path / "single")
    chex.assert_trees_all_close(run_of(tmp_path / "resumed"), run_of(tmp_path / "single"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("every_steps", "ends"),
    [(None, [4, 8, 9, 10, 11, 15, 19, 20, 21, 22]), (6, [*range(4, 23)])],
)
def test_a_dispatch_stops_at_epochs_remainders_and_saves(every_steps, ends):
    """Eleven batches an epoch, the last of them partial, four steps a dispatch."""
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(steps_per_dispatch=4),
        batches=types.SimpleNamespace(steps_per_epoch=11, batch_size=40, source=range(410)),
        saves_at=lambda step: every_steps is not None and step % every_steps == 0,
    )
    steps = [0]
    while steps[-1] < 22:
        steps.append(steps[-1] + count_steps(run, steps[-1]))
    assert steps[1:] == ends


def test_a_non_finite_step_of_a_dispatch_is_found_by_its_number(tiny, tmp_path):
    config = tiny()
    recorder = Recorder(tmp_path, config, "student", start=4, steps=100, steps_per_epoch=10)
    losses = Mean(jnp.array([40.0, 80.0, np.nan, np.nan]), jnp.full(4, 40.0))
    with contextlib.closing(recorder), pytest.raises(NonFiniteError, match="loss is not finite at step 7 "):
        recorder.add(8, jax.vmap(pack)({"loss": losses, "top1": Mean(jnp.zeros(4), jnp.full(4, 40.0))}))
    assert [(line["step"], line["values"]["loss"]) for line in comparable_lines(tmp_path)] == [(5, 1.0), (6, 2.0)]

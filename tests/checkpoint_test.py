"""Checkpoints: the best and the last are kept, restored as they were, and refused where they do not fit."""

import contextlib

import chex
import jax.numpy as jnp
import pytest

from ldrld_jax.checkpoint import Checkpoints, load_model
from ldrld_jax.errors import UserError


def trees(step: int):
    value = float(step)
    model = {"params": {"w": jnp.full((3, 2), value)}, "batch_stats": {"mean": jnp.full(2, -value)}}
    return {"model": model, "training": {"step": jnp.int32(step), "opt_state": ({"trace": jnp.zeros(3)}, ())}}


def save(path, *checkpoints):
    with contextlib.closing(Checkpoints(path)) as saver:
        for step, top1 in checkpoints:
            saver.save(step, trees(step), {"note": step / 3}, top1)
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def test_the_best_and_the_last_are_kept(tmp_path):
    assert save(tmp_path, (1, 50.0), (2, 70.0), (3, 60.0), (4, None)) == [2, 4]
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (2, 4)


def test_what_a_killed_run_left_too_many_is_removed_on_resume_only(tmp_path):
    for name, step, top1 in (("a", 1, 50.0), ("b", 2, 70.0), ("c", 3, 60.0)):
        save(tmp_path / name, (step, top1))
    for name, step in (("b", "2"), ("c", "3")):
        (tmp_path / name / step).rename(tmp_path / "a" / step)
    for clean, left in ((False, ["1", "2", "3"]), (True, ["2", "3"])):
        Checkpoints(tmp_path / "a", clean=clean).close()
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == left


def test_of_equal_accuracies_the_later_is_the_best(tmp_path):
    assert save(tmp_path, (1, 70.0), (2, 70.0), (3, 60.0)) == [2, 3]


def test_arrays_and_host_state_come_back_bitwise(tmp_path):
    save(tmp_path, (7, 12.5))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(7, trees(0)), trees(7))
        assert checkpoints.host(7) == {"note": 7 / 3}


def test_the_model_is_read_without_the_optimizer(tmp_path):
    save(tmp_path, (1, 70.0), (2, 60.0))
    chex.assert_trees_all_equal(load_model(tmp_path, trees(0)["model"]), trees(1)["model"])
    chex.assert_trees_all_equal(load_model(tmp_path, trees(0)["model"], best=False), trees(2)["model"])


def test_a_step_that_is_saved_already_is_left_alone(tmp_path):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, trees(1), {"note": "first"})
        checkpoints.save(1, trees(2), {"note": "second"})
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.host(1) == {"note": "first"}


@pytest.mark.parametrize(
    "like",
    [
        {"params": {"w": jnp.zeros((2, 2))}, "batch_stats": {"mean": jnp.zeros(2)}},
        {"params": {"v": jnp.zeros((3, 2))}, "batch_stats": {"mean": jnp.zeros(2)}},
        {"params": {"w": jnp.zeros((3, 2)), "v": jnp.zeros(2)}, "batch_stats": {"mean": jnp.zeros(2)}},
    ],
    ids=["shape", "name", "missing"],
)
def test_what_does_not_fit_is_refused(tmp_path, like):
    save(tmp_path, (1, 70.0))
    with pytest.raises(UserError, match=r"does not fit the model: (params|batch_stats)/"):
        load_model(tmp_path, like)


def test_an_empty_folder_and_none_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            load_model(path, trees(0)["model"])


def test_a_full_disk_is_an_os_error_that_says_so(tmp_path, monkeypatch):
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:

        def full(*args, **kwargs):
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

        monkeypatch.setattr(checkpoints._checkpointer.__class__, "save_checkpointables_async", full)
        with pytest.raises(OSError, match="no space left; the last whole checkpoint is intact"):
            checkpoints.save(1, trees(1), {})

"""Runs with a logit store: the one that reads equals the one that writes, whatever happened in between."""

import dataclasses
import functools
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.logit_store import feed as logit_feed
from ldrld_jax.logit_store import store as logit_store
from ldrld_jax.logit_store.feed import missing_epochs
from ldrld_jax.logit_store.store import LogitStore
from ldrld_jax.train import teacher as teachers
from ldrld_jax.train import trainer
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import NetworkTeacher, open_store, restored
from tests.conftest import comparable_lines
from tests.train.trainer_test import saved, values


@pytest.fixture
def stored(tiny, tmp_path):
    """`stored(*overrides)`: a config that distils by kd, its teacher in one place and its logits in one store."""

    def make(*overrides: str, keep: bool = True):
        flags = ["method=kd", "data.pad=1", "data.flip=True", "teacher.model=tiny_net", "teacher.epochs=1"]
        flags += [f"teacher.workdir={tmp_path / 'teacher'}", "teacher.batch_size=40"]
        return tiny(*flags, *([f"logits.dir={tmp_path / 'logits'}"] if keep else []), *overrides)

    return make


@pytest.fixture
def taught(monkeypatch):
    """A counter of the batches that went to the teacher; an evaluation of it counts as a hundred."""
    counts, make, evaluator = [0], teachers.teacher_program, teachers.Evaluator

    def counted(*args):
        teach = make(*args)

        def call(variables, images):
            counts[0] += 1
            return teach(variables, images)

        return call

    def evaluated(*args):
        counts[0] += 100
        return evaluator(*args)

    monkeypatch.setattr(teachers, "teacher_program", counted)
    monkeypatch.setattr(teachers, "Evaluator", evaluated)
    return counts


SPARSE = ["logits.top_k=4", "logits.spread_rest=True"]


def arrays(directory, epochs, top_k=None):
    key = {"dtype": "float16", "classes": 10, "data": {"records": 90}, "top_k": top_k}
    return [LogitStore(str(directory), key).read(epoch) for epoch in epochs]


def test_a_run_that_reads_equals_the_one_that_wrote_and_the_online_one_up_to_the_stored_dtype(
    stored, tmp_path, taught, capsys
):
    wrote = trainer.train(stored(), tmp_path / "wrote")
    assert taught == [106]
    assert "will take 3.6 kB: 2 epochs x 90 images x 10 classes x 2 bytes" in capsys.readouterr().out
    read = trainer.train(stored(), tmp_path / "read")
    assert taught == [106]
    assert "has all 3.6 kB" in capsys.readouterr().out
    assert read["teacher_top1"] == wrote["teacher_top1"]
    assert comparable_lines(tmp_path / "read") == comparable_lines(tmp_path / "wrote")
    chex.assert_trees_all_equal(saved(tmp_path / "read", 6), saved(tmp_path / "wrote", 6))

    online = {"float16": 2e-3, "float32": 1e-6}
    trainer.train(stored("logits.dtype=float32", f"logits.dir={tmp_path / 'exact'}"), tmp_path / "float32")
    trainer.train(stored(keep=False), tmp_path / "online")
    losses = {name: values(tmp_path / name, "train", "loss") for name in ("read", "float32", "online")}
    np.testing.assert_allclose(losses["read"], losses["online"], rtol=online["float16"])
    np.testing.assert_allclose(losses["float32"], losses["online"], rtol=online["float32"])


def test_another_order_method_loader_and_batch_size_read_the_logits_of_the_very_images(stored, tmp_path, taught):
    """A row is what the teacher says of the image as this run shows it, rounded."""
    trainer.train(stored("epochs=1"), tmp_path / "wrote")
    assert taught == [103]
    flags = ["seed=3", "data.augment_seed=0", "method=dist", "epochs=1", "batch_size=32"]
    for loader in ("stream", "resident"):
        trainer.train(stored(*flags, f"data.loader={loader}"), tmp_path / loader)
    assert taught == [103]
    assert comparable_lines(tmp_path / "stream") == comparable_lines(tmp_path / "resident")

    run = Run.plan(config_lib.resolve(stored(*flags)), tmp_path)
    teacher = restored(run, [str(tmp_path / "teacher")])
    network, weights = teacher.network, teacher.variables
    feed = logit_feed.LogitFeed(open_store(run, teacher), run.batches, run.mesh, run.config.epochs)
    for step in range(3):
        batch = run.batches[step]
        given = feed(step, {}, print)["teacher_logits"]
        assert given.dtype == jnp.float16
        rows = slice(0, 32 if step < 2 else 26)
        expected, _ = network(weights, batch["image"], train=False)
        np.testing.assert_allclose(given[rows], expected[rows], rtol=1e-3, atol=1e-6)


def test_a_sparse_store_is_read_as_it_was_written_and_with_all_but_one_logit_equals_a_full_one(
    stored, tmp_path, taught, capsys
):
    nine = ["epochs=1", "logits.top_k=9", "logits.spread_rest=True"]
    for name in ("wrote", "read"):
        trainer.train(stored(*nine), tmp_path / name)
    assert taught == [103]
    assert "will take 3.6 kB: 1 epoch x 90 images x 40 bytes (the 9 largest of 10 classes)" in capsys.readouterr().out
    assert comparable_lines(tmp_path / "read") == comparable_lines(tmp_path / "wrote")
    chex.assert_trees_all_equal(saved(tmp_path / "read", 3), saved(tmp_path / "wrote", 3))

    with pytest.raises(UserError, match=r"holds other logits: top_k \(9 there, None here\)\. Set another logits\.dir"):
        trainer.train(stored("epochs=1"), tmp_path / "full")
    trainer.train(stored("epochs=1", f"logits.dir={tmp_path / 'ten'}"), tmp_path / "full")
    losses = [values(tmp_path / name, "train", "loss") for name in ("read", "full")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    full, sparse = arrays(tmp_path / "ten", [0])[0], arrays(tmp_path / "logits", [0], top_k=9)[0]
    np.testing.assert_array_equal(sparse.values, np.take_along_axis(full, sparse.classes.astype(int), -1))
    np.testing.assert_array_equal(sparse.values, -np.sort(-full)[:, :9])


@pytest.mark.parametrize("more", [["data.remainder=keep"], ["data.remainder=drop"], SPARSE], ids=str)
def test_a_run_that_dies_within_an_epoch_completes_it_and_ends_the_same(stored, tmp_path, monkeypatch, more):
    """The store too: bit for bit, the images before the resume and those of a dropped remainder with it."""
    flags, top_k = [*more, "checkpoint.every_steps=1"], 4 if more is SPARSE else None
    whole = f"logits.dir={tmp_path / 'whole'}"
    steps = trainer.train(stored(*flags, whole), tmp_path / "straight")["steps"]
    call = logit_feed.LogitFeed.__call__

    def dies(feed, step, *rest):
        if step == steps // 2 + 1:  # the second step of the second epoch
            raise KeyboardInterrupt
        return call(feed, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(logit_feed.LogitFeed, "__call__", dies)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(stored(*flags), tmp_path / "resumed")
    assert [(tmp_path / "logits" / f"0000{epoch}" / "whole").exists() for epoch in (0, 1)] == [True, False]
    trainer.train(stored(*flags), tmp_path / "resumed")
    chex.assert_trees_all_equal(*(arrays(tmp_path / name, (0, 1), top_k) for name in ("logits", "whole")))
    chex.assert_trees_all_equal(saved(tmp_path / "resumed", steps), saved(tmp_path / "straight", steps))
    assert comparable_lines(tmp_path / "resumed") == comparable_lines(tmp_path / "straight")


@pytest.mark.parametrize("more", [[], SPARSE], ids=["all", "largest"])
def test_several_steps_in_one_dispatch_write_and_read_what_single_steps_do(stored, tmp_path, taught, more):
    stored, flags = functools.partial(stored, *more), ["data.loader=resident", "steps_per_dispatch=2", "epochs=1"]
    for name in ("wrote", "read"):
        trainer.train(stored(*flags), tmp_path / name)
    assert taught == [103]
    assert comparable_lines(tmp_path / "read") == comparable_lines(tmp_path / "wrote")
    trainer.train(stored("epochs=1", f"logits.dir={tmp_path / 'single'}"), tmp_path / "one")
    chex.assert_trees_all_equal(*(arrays(tmp_path / name, [0], 4 if more else None) for name in ("logits", "single")))
    losses = [values(tmp_path / name, "train", "loss") for name in ("read", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_longer_run_reads_what_is_there_and_writes_the_rest(stored, tmp_path, taught, capsys):
    trainer.train(stored("epochs=1"), tmp_path / "short")
    written = (tmp_path / "logits" / "00000" / "c" / "0" / "0").stat().st_mtime_ns
    trainer.train(stored("epochs=2"), tmp_path / "long")
    assert taught == [106]  # its top-1 is known
    assert "2 epochs x 90 images x 10 classes x 2 bytes, of which it has 1" in capsys.readouterr().out
    assert (tmp_path / "logits" / "00000" / "c" / "0" / "0").stat().st_mtime_ns == written


def test_fixed_views_come_round_and_are_made_once(stored, tmp_path, taught):
    trainer.train(stored("logits.views=2", "epochs=3", "eval_every_epochs=3"), tmp_path / "run")
    assert taught == [106]
    assert sorted(p.name for p in (tmp_path / "logits").iterdir()) == ["00000", "00001", "key.json"]


def test_epochs_without_a_key_are_refused_before_a_teacher_is_trained(stored, tmp_path):
    (tmp_path / "logits/00000").mkdir(parents=True)
    (tmp_path / "logits/00000/whole").touch()
    with pytest.raises(UserError, match=r"logits has stored epochs and no key\.json"):
        trainer.train(stored(), tmp_path / "run")
    assert not (tmp_path / "teacher").exists()


def test_several_hosts_read_but_do_not_write(stored, tmp_path):
    run = Run.plan(config_lib.resolve(stored()), tmp_path)
    run = dataclasses.replace(run, batches=dataclasses.replace(run.batches, hosts=2))
    store = open_store(run, NetworkTeacher(*run.make_student()))
    with pytest.raises(UserError, match="lacks 2 of 2 epochs, and only one host can write them"):
        missing_epochs(store, run.batches, run.config.epochs)
    for epoch in (0, 1):
        store.write(epoch, np.zeros((90, 10), np.float16))
    assert missing_epochs(store, run.batches, run.config.epochs) == []


def test_what_a_store_cannot_take_is_refused_before_a_teacher_is_trained(stored, tmp_path, monkeypatch):
    run = Run.plan(config_lib.resolve(stored()), tmp_path / "run")
    (tmp_path / "logits/00001").mkdir(parents=True)
    (tmp_path / "logits/00001/whole").touch()
    (tmp_path / "logits/key.json").touch()
    several = dataclasses.replace(run, batches=dataclasses.replace(run.batches, hosts=2))
    with pytest.raises(UserError, match="lacks 1 of 2 epochs, and only one host can write them"):
        teachers.obtain_teacher(several, None, None, pytest.fail)
    monkeypatch.setattr(logit_store, "free_bytes", lambda path: 1799)
    with pytest.raises(UserError, match=r"logits needs 1\.8 kB more, and 1\.8 kB are free there"):
        teachers.obtain_teacher(run, None, None, pytest.fail)


def test_a_logit_that_the_dtype_cannot_hold_names_one_that_can(stored, tmp_path, monkeypatch):
    make = teachers.teacher_program
    infinite = lambda *args: lambda *inputs: make(*args)(*inputs) / jnp.float16(0)  # noqa: E731
    monkeypatch.setattr(teachers, "teacher_program", infinite)
    with pytest.raises(UserError, match=r"not finite as float16\. Set logits\.dtype=bfloat16"):
        trainer.train(stored("epochs=1"), tmp_path / "run")
    assert not pathlib.Path(tmp_path / "logits" / "00000").exists()


def test_a_store_is_part_of_a_runs_identity_and_its_place_is_not(stored, tmp_path):
    done = trainer.train(stored("epochs=1"), tmp_path / "run")
    (tmp_path / "logits").rename(tmp_path / "moved")
    assert trainer.train(stored("epochs=1", f"logits.dir={tmp_path / 'moved'}"), tmp_path / "run") == done
    with pytest.raises(UserError, match=r"another config: logits\.dtype \('float16' there, None here\)"):
        trainer.train(stored("epochs=1", keep=False), tmp_path / "run")

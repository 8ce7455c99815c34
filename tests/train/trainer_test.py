"""Whole runs, in process and small: what they leave behind, and that the same comes out however they are run."""

import datetime
import functools
import json
import math
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.errors import UserError
from ldrld_jax.record.recorder import NonFiniteError
from ldrld_jax.train import loop, trainer
from ldrld_jax.train.plan import Run
from tests.conftest import comparable_lines


def saved(workdir, step: int):
    """All arrays of a checkpoint, on the host."""
    path = pathlib.Path(workdir) / "checkpoints"
    metadata = ocp.checkpointables_metadata(path / str(step)).metadata
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)
    return Checkpoints(path).restore(step, like)


def values(workdir, split: str, name: str) -> list[float]:
    return [line["values"][name] for line in comparable_lines(workdir) if line["split"] == split]


def test_a_distillation_leaves_a_complete_record(tiny, teacher_dir, tmp_path, capsys, programs):
    config = tiny("method=ldrld", f"teacher.checkpoint={teacher_dir}", "log.tensorboard=True")
    summary = trainer.train(config, tmp_path, profile=str(tmp_path / "trace"))
    assert programs() == {"stepped": (1, 1), "evaluate_split": (2, 2)}  # the latter once for each network
    assert "the trace of steps 4 to 6 lies in" in capsys.readouterr().out
    assert list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["method"], summary["seed"], summary["steps"]) == ("ldrld", 0, 6)
    assert summary["examples_per_second"] > 0
    assert summary["train_seconds"] > 0
    assert datetime.datetime.fromisoformat(summary["ended"]).utcoffset() == datetime.timedelta(0)
    lines = comparable_lines(tmp_path)
    assert lines[0] == {"step": 0, "epoch": 0.0, "split": "teacher_eval", "values": {"top1": summary["teacher_top1"]}}
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [(line["step"], line["epoch"]) for line in lines if line["split"] == "eval"] == [(3, 1.0), (6, 2.0)]
    terms = {"loss", "ce", "ce_term", "ldrld", "ldrld/pairs", "ldrld/integrity", "ldrld/remainder", "top1", "top5"}
    assert terms | {"agreement", "top_d_overlap", "label_in_top_d", "learning_rate"} == set(lines[1]["values"])
    evals = values(tmp_path, "eval", "top1")
    assert summary["best_top1"] == max(evals)
    assert summary["last_top1"] == evals[-1]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["loss"] == {"ldrld": {**config["loss"]["ldrld"], "depth": 7, "alpha": 10.5}}
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_the_loss_is_the_weighted_sum_of_its_logged_terms(tiny, teacher_dir, tmp_path):
    overrides = ["method=ldrld+kd", "ce_weight=.5", "kd_weight=2.", "loss_weight.kd=.25", "kd_warmup_epochs=2"]
    trainer.train(tiny(*overrides, f"teacher.checkpoint={teacher_dir}"), tmp_path)
    for line in comparable_lines(tmp_path):
        if line["split"] == "train":
            v, warmup = line["values"], {1: 0.5, 2: 1.0}[math.ceil(line["epoch"])]
            np.testing.assert_allclose(v["loss"], 0.5 * v["ce"] + 2 * warmup * (v["ldrld"] + 0.25 * v["kd"]), rtol=1e-5)
            parts = v["ldrld/pairs"] + v["ldrld/integrity"] + v["ldrld/remainder"]
            np.testing.assert_allclose(v["ldrld"], parts, rtol=1e-5)


def test_the_teacher_is_bitwise_unchanged_by_a_distillation(tiny, teacher_dir, tmp_path, monkeypatch):
    teachers = []
    obtain = trainer.obtain_teacher

    def spy(run, student, signals, train):
        teacher = obtain(run, student, signals, train)
        if teacher is not None:
            teachers.append((teacher.variables, jax.tree.map(np.array, teacher.variables)))
        return teacher

    monkeypatch.setattr(trainer, "obtain_teacher", spy)
    trainer.train(tiny("method=ldrld", f"teacher.checkpoint={teacher_dir}"), tmp_path)
    ((after, before),) = teachers
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, after), before)


@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_the_step_is_traced_once_also_for_a_smaller_last_batch(tiny, tmp_path, monkeypatch, remainder):
    make = loop.make_train_step
    chex.clear_trace_counter()
    monkeypatch.setattr(loop, "make_train_step", lambda *a, **k: chex.assert_max_traces(make(*a, **k), n=1))
    trainer.train(tiny(f"data.remainder={remainder}", "epochs=3"), tmp_path)
    assert len(values(tmp_path, "train", "loss")) == (9 if remainder == "keep" else 6)


@pytest.mark.parametrize(
    ("precision", "student", "steps", "tolerance"), [("float64", "resnet8", 20, 1e-9), ("float32", "tiny_net", 3, 1e-5)]
)
def test_one_and_eight_devices_give_the_same_losses(tiny, teacher_dir, tmp_path, precision, student, steps, tolerance):
    """Eight devices pad the batches of 38 + 38 + 14 to 40 rows, and those of the evaluation."""
    losses, evals = {}, {}
    for devices in (1, 8):
        overrides = [f"mesh.data={devices}", f"precision={precision}", "batch_size=38", "method=ldrld"]
        overrides += [f"student.model={student}", f"epochs={-(-steps // 3)}", f"teacher.checkpoint={teacher_dir}"]
        trainer.train(tiny(*overrides, "eval_batch_size=26"), tmp_path / str(devices))
        losses[devices] = values(tmp_path / str(devices), "train", "loss")[:steps]
        evals[devices] = values(tmp_path / str(devices), "eval", "ce")
    assert len(losses[1]) == steps
    np.testing.assert_allclose(losses[8], losses[1], rtol=tolerance)
    np.testing.assert_allclose(evals[8], evals[1], rtol=1e-5)  # sums of evaluations are float32


def test_two_runs_of_one_seed_are_bitwise_equal_and_another_seed_is_not(tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer.train(tiny(f"seed={seed}"), tmp_path / name)
    chex.assert_trees_all_equal(saved(tmp_path / "a", 6), saved(tmp_path / "b", 6))
    assert comparable_lines(tmp_path / "a") == comparable_lines(tmp_path / "b")
    assert values(tmp_path / "a", "train", "loss") != values(tmp_path / "c", "train", "loss")


def test_every_image_counts_once_whatever_the_evaluation_batch(tiny, teacher_dir):
    """50 images in batches of 7, padded to 8 for the devices, or of 50."""
    config = tiny
    top1 = [trainer.evaluate(config(f"eval_batch_size={n}"), teacher_dir)["top1"] for n in (7, 50)]
    assert top1[0] == top1[1]
    assert (top1[0] / 2) == int(top1[0] / 2)  # a multiple of 1/50


def test_a_split_on_the_devices_is_evaluated_as_one_that_streams(tiny, teacher_dir):
    """Evaluates in one dispatch, or in eight where nothing may be kept in memory."""
    config = functools.partial(tiny, "eval_batch_size=7")
    assert trainer.evaluate(config(), teacher_dir) == trainer.evaluate(config("data.cache_mb=0"), teacher_dir)


def test_a_recipe_trains_the_teacher_once_and_is_shared(tiny, tmp_path):
    shared = tmp_path / "shared"
    overrides = ["method=ldrld", "teacher.model=tiny_net", "teacher.epochs=1", f"teacher.workdir={shared}", "epochs=1"]
    first = trainer.train(tiny(*overrides), tmp_path / "one")
    written = (shared / "summary.json").stat().st_mtime_ns
    second = trainer.train(tiny(*overrides, "method=kd"), tmp_path / "two")
    assert (
        first["teacher_top1"]
        == second["teacher_top1"]
        == json.loads((shared / "summary.json").read_text())["best_top1"]
    )
    assert (shared / "summary.json").stat().st_mtime_ns == written
    assert {line["split"] for line in comparable_lines(shared)} == {"teacher_train", "teacher_eval"}


def test_a_teacher_below_the_minimum_is_refused_before_anything_is_written(tiny, teacher_dir, tmp_path):
    config = tiny("method=ldrld", f"teacher.checkpoint={teacher_dir}", "teacher.min_top1=99.9")
    with pytest.raises(UserError, match=r"has top-1 .* demands 99\.90 %\. Check its checkpoint, or lower"):
        trainer.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_keeps_the_normalisation_it_was_trained_with(tiny, tmp_path):
    trainer.train(tiny("data.mean=(.1,)", "data.std=(.7,)", "epochs=1"), tmp_path / "teacher")
    expected = trainer.evaluate(tiny("data.mean=(.1,)", "data.std=(.7,)"), tmp_path / "teacher")["top1"]
    overrides = ["method=kd", f"teacher.checkpoint={tmp_path / 'teacher'}", "teacher.model=tiny_net", "epochs=1"]
    assert trainer.train(tiny(*overrides), tmp_path / "student")["teacher_top1"] == expected


def test_an_evaluation_feeds_a_student_as_it_was_trained_and_says_so(tiny, teacher_dir, capsys):
    expected = trainer.evaluate(tiny(), teacher_dir)
    assert "has no effect" not in capsys.readouterr().out
    assert trainer.evaluate(tiny("data.mean=(.9,)", "data.image_size=4"), teacher_dir) == expected
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert said == [
        f"warning: data.mean=[0.9] has no effect: the run in {teacher_dir} was trained with [0.305].",
        f"warning: data.image_size=4 has no effect: the run in {teacher_dir} was trained with None.",
    ]


def test_a_student_starts_from_the_weights_it_is_given(tiny, teacher_dir, tmp_path):
    summary = trainer.train(
        tiny(
            *(f"student.checkpoint={teacher_dir}", "epochs=1"),
            *("optim.learning_rate=0.", "optim.warmup=none"),
        ),
        tmp_path,
    )
    assert summary["steps"] == 3
    best = max(int(p.name) for p in pathlib.Path(teacher_dir, "checkpoints").iterdir())
    chex.assert_trees_all_equal(saved(tmp_path, 3)["model"]["params"], saved(teacher_dir, best)["model"]["params"])


def test_a_finished_run_says_so_and_changes_nothing(tiny, tmp_path, capsys):
    first = trainer.train(tiny(), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert trainer.train(tiny(), tmp_path) == first
    assert "is complete: 2 epochs, 6 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_of_another_config_is_refused_by_key_and_left_alone(tiny, tmp_path):
    trainer.train(tiny("epochs=1"), tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"another config: optim\.weight_decay \(0\.0005 there, 0\.1 here\), seed \(0"):
        trainer.train(tiny("epochs=1", "seed=3", "optim.weight_decay=.1"), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_mesh_workers_and_logging_are_no_part_of_a_runs_identity(tiny, tmp_path):
    first = trainer.train(tiny("epochs=1"), tmp_path)
    assert trainer.train(tiny("epochs=1", "mesh.data=1", "data.threads=1", "log.every_steps=2"), tmp_path) == first


def test_epochs_may_grow_before_the_first_decay_only(tiny, tmp_path):
    schedule = ["optim.schedule=step", "optim.decay_epochs=(3, 5)"]
    trainer.train(tiny(*schedule, "epochs=2"), tmp_path / "grown")
    trainer.train(tiny(*schedule, "epochs=4"), tmp_path / "grown")
    trainer.train(tiny(*schedule, "epochs=4"), tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "grown", 12), saved(tmp_path / "straight", 12))
    with pytest.raises(UserError, match=r"first decay \(epoch 3\), and .* is at epoch 4"):
        trainer.train(tiny(*schedule, "epochs=6"), tmp_path / "grown")


def test_epochs_never_grow_on_a_cosine(tiny, tmp_path):
    trainer.train(tiny("epochs=1"), tmp_path)
    with pytest.raises(UserError, match=r"^epochs cannot grow with optim\.schedule=cosine, .* has 1\. Choose another"):
        trainer.train(tiny("epochs=2"), tmp_path)


def test_a_non_finite_term_stops_the_run_with_its_step_and_name(tiny, teacher_dir, tmp_path):
    config = tiny("method=ldrld", f"teacher.checkpoint={teacher_dir}", "optim.learning_rate=1e30", "optim.warmup=none")
    with pytest.raises(NonFiniteError, match=r"^ce, .*ldrld.* not finite at step [23] "):
        trainer.train(config, tmp_path)


def test_mixup_takes_batches_that_are_whole_whatever_becomes_of_a_remainder(tiny, tmp_path):
    whole = config_lib.resolve(tiny("data.mixup=.4", "data.remainder=keep", "batch_size=30", "mesh.data=1"))
    assert not Run.plan(whole, tmp_path).batches.padded
    rest = config_lib.resolve(tiny("data.mixup=.4", "data.remainder=keep", "batch_size=40", "mesh.data=1"))
    with pytest.raises(UserError, match="which may hold no padding"):
        Run.plan(rest, tmp_path)


def test_mixup_is_drawn_by_seed_and_step(tiny, tmp_path):
    flags = ["data.mixup=.4", "data.remainder=drop", "optim.schedule=constant"]
    trainer.train(tiny(*flags, "epochs=2"), tmp_path / "straight")
    for epochs in (1, 2):
        trainer.train(tiny(*flags, f"epochs={epochs}"), tmp_path / "resumed")
    trainer.train(tiny(*flags[1:], "epochs=2"), tmp_path / "plain")
    losses = {name: values(tmp_path / name, "train", "ce") for name in ("straight", "resumed", "plain")}
    assert losses["straight"] == losses["resumed"]
    assert losses["straight"] != losses["plain"]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_parameters_and_statistics_are_float32(tiny, tmp_path, precision):
    trainer.train(tiny(f"precision={precision}", "epochs=1"), tmp_path)
    arrays = saved(tmp_path, 3)
    assert {a.dtype for a in jax.tree.leaves(arrays["model"])} == {jnp.dtype("float32")}
    assert all(np.isfinite(values(tmp_path, "train", "loss")))


def test_skipped_steps_are_counted_and_a_hundred_in_a_row_stop_the_run(tiny, tmp_path):
    # No evaluation in between: it would end the run, whose weights are finite and give no finite logits.
    flags = ["non_finite=skip", "optim.schedule=constant", "eval_every_epochs=60"]
    assert trainer.train(tiny(*flags, "epochs=1"), tmp_path / "a")["skipped_steps"] == 0
    with pytest.raises(NonFiniteError, match=r"for 100 steps in a row, the last of them 10\d"):
        trainer.train(tiny(*flags, "epochs=60", "optim.learning_rate=1e30"), tmp_path / "b")
    skipped = values(tmp_path / "b", "train", "skipped")
    assert (skipped[0], skipped[-1], len(skipped) > 90) == (0.0, 1.0, True)


def test_on_several_hosts_a_broken_evaluation_image_ends_the_run_unsaved(tiny, tmp_path, monkeypatch):
    """The other hosts are in the evaluation, and would never come to save with this one."""

    def broken(self, *arguments):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        raise UserError("test/7.png is broken")

    monkeypatch.setattr(loop.Evaluator, "__call__", broken)
    with pytest.raises(UserError, match=r"test/7\.png is broken"):
        trainer.train(tiny("epochs=1"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()

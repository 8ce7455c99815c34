"""Every method through the trainer: by its name alone, combined, with what it learns, and one's own."""

import contextlib
import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.errors import UserError
from ldrld_jax.losses import METHODS
from ldrld_jax.train import trainer
from ldrld_jax.train.objective import make_objective
from tests.conftest import comparable_lines, killed_copy, tiny_overrides
from tests.pages import PAGES, blocks
from tests.train.trainer_test import saved, values

# Those that learn, depend on the epoch, read the teacher's weights or see two views; and one that does none of it.
RESUMED = {"kd", "ctkd", "sld", "wkd", "crld"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_run_by_its_name_alone_and_resumed(tiny, teacher_dir, tmp_path, method):
    """A step of learning lowers what it minimises, on the same batch without augmentation; resumes where it matters."""
    overrides = [f"method={method}", f"teacher.checkpoint={teacher_dir}", "data.pad=0", "kd_warmup_epochs=0"]
    overrides += ["mesh.data=1", "data.train_split=train[:40]", "optim.warmup=none", "optim.schedule=constant"]
    config = tiny(*overrides, "optim.learning_rate=.01", "epochs=4")
    summary = trainer.train(config, tmp_path / "straight")
    losses = values(tmp_path / "straight", "train", "loss")
    assert summary["method"] == method
    assert len(losses) == 4
    assert np.isfinite(values(tmp_path / "straight", "train", method)).all()
    assert losses[-1] < losses[0]
    if method not in RESUMED:
        return
    trainer.train(config, killed_copy(tmp_path / "straight", tmp_path / "resumed", step=3))
    assert comparable_lines(tmp_path / "resumed") == comparable_lines(tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "resumed", 4), saved(tmp_path / "straight", 4))


def test_slds_own_target_is_switched_on_by_the_epoch(tiny, teacher_dir, tmp_path):
    flags = ["method=sld", f"teacher.checkpoint={teacher_dir}", "loss.sld.student_swap_epoch=2", "epochs=4"]
    trainer.train(tiny(*flags, "data.train_split=train[:40]"), tmp_path)
    own = values(tmp_path, "train", "sld/student")
    assert own[:2] == [0, 0] and min(own[2:]) > 0


def test_numbers_of_the_loss_change_by_epoch(tiny, rng):
    """Compares each epoch's objective with the one that has that epoch's numbers for good."""
    teacher, student = (jnp.asarray(rng.normal(size=(6, 10)), jnp.float32) for _ in range(2))

    def loss(epoch, *flags):
        config = config_lib.resolve(tiny("method=ldrld+kd", "teacher.model=resnet8", "teacher.checkpoint=t", *flags))
        objective, labels = make_objective(config), jnp.arange(6, dtype=jnp.int32)
        return objective(teacher, student, labels, epoch=jnp.int32(epoch))

    schedules = {"temperature": "steps:4@1:2@3", "alpha": "linear:1@1:3@3", "kd_weight": "linear:0@1:4@3"}
    for epoch, temperature in ((1, 4), (2, 4), (3, 2)):
        ours, terms = loss(epoch, *(f"loss_schedule.{key}={text}" for key, text in schedules.items()))
        fixed = [f"loss.ldrld.temperature={temperature}", f"loss.kd.temperature={temperature}"]
        theirs, same = loss(epoch, *fixed, f"loss.ldrld.alpha={epoch}", f"kd_weight={2 * epoch - 2}")
        logged = {key: float(terms.pop(f"schedule/{key}")) for key in schedules}
        assert logged == {"temperature": temperature, "alpha": epoch, "kd_weight": 2 * epoch - 2}
        chex.assert_trees_all_close((ours, terms), (theirs, same), rtol=2e-5)


def test_a_run_logs_the_numbers_that_change(tiny, teacher_dir, tmp_path):
    flags = ["method=kd", f"teacher.checkpoint={teacher_dir}", "data.train_split=train[:40]", "epochs=2"]
    trainer.train(tiny(*flags, "mesh.data=1", "loss_schedule.temperature=cosine:4@1:2@2"), tmp_path)
    assert values(tmp_path, "train", "schedule/temperature") == [4, 2]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["loss_schedule.alpha=linear:1@1:2@2"], r"loss_schedule\.alpha is set, and method=kd has no alpha that may"),
        (["method=abkd", "loss_schedule.alpha=linear:1@1:.5@2"], "method=abkd has no alpha that may change by epoch"),
        (
            ["loss_schedule.temperature=linear:4@1:0@2"],
            r"loss_schedule\.temperature: temperature must be finite and ab",
        ),
        (["loss_schedule.temperature=4"], r"loss_schedule\.temperature: must be a schedule by epoch"),
        (["loss_schedule.kd_weight=linear:1@1:-1@2"], r"loss_schedule\.kd_weight: must not be negative, got -1"),
        (["method=ce", "loss_schedule.kd_weight=linear:1@1:2@2"], "method=ce has no kd_weight"),
    ],
)
def test_a_schedule_of_nothing_or_out_of_range_is_one_line_and_no_workdir(tiny, tmp_path, flags, expected):
    with pytest.raises(UserError, match=expected) as error:
        trainer.train(tiny("method=kd", "teacher.model=resnet8", "teacher.checkpoint=t", *flags), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_wkds_cost_is_that_of_the_teachers_last_layer(tiny, teacher_dir, tmp_path, monkeypatch):
    """Makes the cost of every step from the rows as they lie in the teacher's checkpoint."""
    flags = ["method=wkd", f"teacher.checkpoint={teacher_dir}", "epochs=1", "data.train_split=train[:40]"]
    seen = []
    method = METHODS["wkd"]

    def from_teacher(rows):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows)), rows)
        return method.from_teacher(rows)

    monkeypatch.setitem(METHODS, "wkd", dataclasses.replace(method, from_teacher=from_teacher))
    trainer.train(tiny(*flags), tmp_path)
    jax.effects_barrier()
    rows = saved(teacher_dir, 6)["model"]["params"]["fc"]["kernel"].T
    assert seen and all(np.array_equal(found, rows) for found in seen)


def test_wkd_wants_one_teacher_with_one_last_layer(tiny, teacher_dir, tmp_path):
    flags = ["method=wkd", "teacher.model=tiny_net,tiny_net", f"teacher.checkpoint={teacher_dir},{teacher_dir}"]
    with pytest.raises(UserError, match=r"takes the last layer of one teacher, and teacher\.model names 2"):
        trainer.train(tiny(*flags), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_views_of_each_image_are_compared(tiny, teacher_dir, tmp_path):
    """Leaves out augmentation: both views are the image itself, and the loss is that of one view."""
    losses = {}
    for views in (1, 2):
        flags = ["method=mlkd", f"teacher.checkpoint={teacher_dir}", f"loss.mlkd.views={views}", "data.pad=0"]
        trainer.train(tiny(*flags, "epochs=1", "data.train_split=train[:40]"), tmp_path / str(views))
        losses[views] = values(tmp_path / str(views), "train", "mlkd")
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)


def test_ctkds_temperature_is_learnt_saved_and_resumed(tiny, teacher_dir, tmp_path):
    flags = ["method=ctkd", f"teacher.checkpoint={teacher_dir}", "optim.schedule=constant"]
    trainer.train(tiny(*flags, "epochs=4"), tmp_path / "straight")
    for epochs in (2, 4):
        trainer.train(tiny(*flags, f"epochs={epochs}"), tmp_path / "resumed")
    thetas = [
        saved(tmp_path / name, 12)["training"]["method_params"]["ctkd"]["theta"] for name in ("straight", "resumed")
    ]
    assert thetas[0] == thetas[1]
    assert thetas[0] != METHODS["ctkd"].init(METHODS["ctkd"].config())["theta"]


def test_a_learnt_parameter_moves_by_its_own_scale(tiny, teacher_dir, tmp_path, monkeypatch):
    """ctkd's temperature ascends the loss; with a scale of 0 only the weight decay moves it."""
    monkeypatch.setitem(
        METHODS, "ctkd", METHODS["ctkd"].__class__(**{**vars(METHODS["ctkd"]), "gradient_scale": lambda epoch: 0.0})
    )
    flags = ["method=ctkd", f"teacher.checkpoint={teacher_dir}", "epochs=1", "optim.weight_decay=0."]
    trainer.train(tiny(*flags), tmp_path)
    assert saved(tmp_path, 3)["training"]["method_params"]["ctkd"]["theta"] == 1.0


def test_standardisation_is_the_same_as_a_field_of_kd_and_as_a_transform_of_any(tiny, rng):
    teacher, student = (jnp.asarray(3 * rng.normal(size=(6, 10)), jnp.float32) for _ in range(2))

    def loss(name):
        config = config_lib.resolve(tiny("method=kd", "teacher.model=resnet8", "teacher.checkpoint=t", name))
        return make_objective(config)(teacher, student, jnp.arange(6, dtype=jnp.int32), epoch=jnp.int32(1))[1]["kd"]

    plain, field, transform = map(loss, ("standardize=False", "loss.kd.standardize=True", "standardize=True"))
    np.testing.assert_allclose(field, transform, rtol=1e-6)
    assert abs(field / plain - 1) > 0.01


def test_an_ensemble_of_one_teacher_twice_is_that_teacher(tiny, teacher_dir, tmp_path):
    one = trainer.train(tiny("method=kd", f"teacher.checkpoint={teacher_dir}", "epochs=1"), tmp_path / "one")
    twice = ["teacher.model=tiny_net,tiny_net", f"teacher.checkpoint={teacher_dir},{teacher_dir}"]
    for ensemble in ("logits", "probabilities"):
        flags = ["method=kd", *twice, f"teacher.ensemble={ensemble}", "epochs=1"]
        two = trainer.train(tiny(*flags), tmp_path / ensemble)
        assert one["teacher_top1"] == two["teacher_top1"]
        losses = [values(tmp_path / name, "train", "kd") for name in ("one", ensemble)]
        np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_an_ensemble_needs_a_checkpoint_for_each(tiny, teacher_dir, tmp_path):
    with pytest.raises(UserError, match=r"for each of teacher\.model \(2: tiny_net,tiny_net\), got 1"):
        flags = ["method=kd", "teacher.model=tiny_net,tiny_net", f"teacher.checkpoint={teacher_dir}"]
        trainer.train(tiny(*flags), tmp_path)


def test_self_distillation_is_from_the_moving_average(tiny, tmp_path):
    """Follows the average, which is the student at first and then moves by 1 - decay of the way."""
    flags = ["method=kd", "teacher.model=ema", "ema_decay=.75", "epochs=1", "data.train_split=train[:40]"]
    summary = trainer.train(tiny(*flags), tmp_path)
    assert summary["teacher_top1"] is None
    arrays = saved(tmp_path, 1)
    config = config_lib.resolve(tiny(*flags))
    _, start = trainer.Run.plan(config, tmp_path).make_student()
    after = arrays["training"]["student"]["params"]
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.params, after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), arrays["model"]["params"], expected)


def test_the_average_is_what_is_evaluated_saved_and_resumed(tiny, tmp_path):
    flags = ["ema_decay=.9", "optim.schedule=constant"]
    trainer.train(tiny(*flags, "epochs=4"), tmp_path / "straight")
    for epochs in (2, 4):
        trainer.train(tiny(*flags, f"epochs={epochs}"), tmp_path / "resumed")
    assert comparable_lines(tmp_path / "straight") == comparable_lines(tmp_path / "resumed")
    best = json.loads((tmp_path / "straight" / "summary.json").read_text())["best_top1"]
    assert trainer.evaluate(tiny(*flags), tmp_path / "straight")["top1"] == best


def test_self_distillation_without_an_average_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="set ema_decay"):
        trainer.train(tiny("method=kd", "teacher.model=ema"), tmp_path)


@contextlib.contextmanager
def methods_restored():
    before = dict(METHODS)
    try:
        yield
    finally:
        METHODS.clear()
        METHODS.update(before)


def test_the_readmes_own_method_is_used_from_a_config(tiny, teacher_dir, data_dir, tmp_path):
    path = tmp_path / "match.py"
    (code,) = (block.code for block in blocks(PAGES["README.md"], "python") if 'METHODS["match"]' in block.code)
    path.write_text(code)
    flags = [f"--config.{o}" for o in tiny_overrides(data_dir) if not o.startswith("method=")]
    flags += [f"--config.teacher.checkpoint={teacher_dir}", "--config.loss.match.scale=.25", "--config.data.mean=.3"]
    flags += ["--config.student.model=tiny_net"]  # known through `tiny`
    with methods_restored():
        assert main_lib.main(["--config", str(path), "--workdir", str(tmp_path / "run"), *flags]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["loss"]) == ("match", {"match": {"scale": 0.25}})
    assert all(value > 0 for value in values(tmp_path / "run", "train", "match"))


@pytest.mark.parametrize("schedule", ["alpha=linear:1@1:10@3", "beta=linear:1@1:5@3"])
def test_a_schedule_leaves_fields_that_choose_a_program_as_they_are(schedule):
    other = {"a": "abkd", "b": "topk_tail"}[schedule[0]]
    flags = [f"method=ldrld+{other}", "ce_weight=0"]

    def terms(*more):
        config = config_lib.resolve(config_lib.load("configs/digits.py", [*flags, *more]))
        objective = make_objective(config)
        logits = jax.random.normal(jax.random.key(0), (2, 4, 10))
        compute = jax.jit(lambda epoch: objective(*logits, jnp.arange(4), epoch=epoch)[1])
        return compute(jnp.int32(3))

    plain, scheduled = terms(), terms(f"loss_schedule.{schedule}")
    assert float(scheduled[other]) == float(plain[other])
    assert float(scheduled["ldrld"]) != float(plain["ldrld"])

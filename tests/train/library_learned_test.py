"""Learning in runs of objects: optimizers of any kind, and parameters of the user's own methods."""

import dataclasses
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ldrld_jax
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.losses import Method, MethodConfig, mean_parts
from ldrld_jax.train import trainer
from tests.train.trainer_test import comparable_lines, saved


def rates(result) -> list[float]:
    return [line["values"]["learning_rate"] for line in result.metrics if line["split"] == "train"]


def test_the_learning_rate_of_a_line_is_the_one_that_its_step_used(make):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda count: 0.1 / (count + 1))
    result = make(optimizer=optimizer, config={"log.every_steps": 1}).fit()
    np.testing.assert_allclose(rates(result), 0.1 / np.arange(1, 7), rtol=1e-6)


def schedule_free() -> optax.GradientTransformation:
    return optax.contrib.schedule_free_adamw(0.05, b1=0.9)


def test_a_schedule_free_optimizers_average_is_evaluated_saved_and_resumed(make, digits, tmp_path, monkeypatch):
    result = make(optimizer=schedule_free(), workdir=tmp_path / "straight").fit()
    trees = saved(tmp_path / "straight", 6)
    averaged, stepped = trees["model"]["params"], trees["training"]["student"]["params"]
    free = trees["training"]["opt_state"]
    for name, point in stepped.items():  # the average x of y = (1 - b1) z + b1 x
        np.testing.assert_allclose(0.1 * np.asarray(free["z"][0][name]) + 0.9 * averaged[name], point, rtol=1e-5)
        assert np.abs(averaged[name] - point).max() > 1e-3
    images, labels = digits["evaluation"]
    right = np.argmax(result.trainer.predict(images), axis=-1) == labels
    assert result.summary["last_top1"] == 100 * right.mean()
    chex.assert_trees_all_equal(result.student.args[0], dict(averaged))

    def stop(signals, step):
        signals.received = signal.SIGTERM if step == 4 else None
        return step == 4

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Signals, "stop_at", stop)
        with pytest.raises(ldrld_jax.Interrupted):
            make(optimizer=schedule_free()).fit()
    make(optimizer=schedule_free()).fit()
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "run", 6), trees)


@pytest.mark.parametrize(
    ("optimizer", "config", "message"),
    [
        (schedule_free(), {"ema_decay": 0.9}, "is schedule-free and averages the weights itself. Unset ema_decay"),
        (
            optax.multi_transform({"free": schedule_free(), "fixed": optax.set_to_zero()}, ({"w": "free"}, "fixed")),
            {},
            "is schedule-free for a part of the student only",
        ),
        (
            optax.multi_transform({"one": optax.sgd(0.1)}, lambda params: dict.fromkeys(params.keys(), "one")),
            {},
            "cannot update the student: 'tuple' object has no attribute 'keys'. A step calls, traced, init",
        ),
    ],
    ids=["average", "part", "labels"],
)
def test_an_optimizer_that_cannot_be_used_is_one_line(make, optimizer, config, message):
    with pytest.raises(UserError, match=message) as error:
        make(optimizer=optimizer, config=config).fit()
    assert "\n" not in str(error.value)


def test_several_steps_of_optax_are_a_larger_batch(make, tmp_path):
    """Compares steps of 80 in two parts with steps of 80, without a remainder."""
    data = {"data.remainder": "drop"}
    parts = make(optimizer=optax.MultiSteps(optax.sgd(0.1), 2), config=data, workdir=tmp_path / "parts").fit()
    assert parts.summary["steps"] == 4
    whole = make(optimizer=optax.sgd(0.1), config=data, workdir=tmp_path / "whole", batch_size=80).fit()
    assert whole.summary["steps"] == 2
    found = [saved(tmp_path / name, steps)["model"]["params"] for name, steps in (("parts", 4), ("whole", 2))]
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Scale(MethodConfig):
    start: float = 2.0


def squares(teacher, student, labels, cfg, *, where=None, params):
    del labels, cfg, where
    return jnp.mean((teacher - params["scale"] * student) ** 2, axis=-1)


def test_a_users_method_learns_its_parameters(make, tmp_path):
    method = Method(Scale, mean_parts(squares), init=lambda cfg: {"scale": jnp.asarray(cfg.start)})
    make(method=method, optimizer=optax.sgd(0.01)).fit()
    ((learned),) = jax.tree.leaves(saved(tmp_path / "run", 6)["training"]["method_params"])
    assert learned != 2.0
    assert np.isfinite(learned)


def test_a_class_that_a_student_rules_out_has_no_part_in_the_cross_entropy(make, digits):
    """Trains with a logit of -inf for the class 9, which no label is."""
    kept = [(images[labels < 9], labels[labels < 9]) for images, labels in digits.values()]
    ruled_out = jnp.where(jnp.arange(10) < 9, 0.0, -jnp.inf)[None]

    def student(variables, images, train):
        del train
        return images.reshape(len(images), -1) @ variables["w"] + ruled_out

    result = make(
        student=(student, {"w": np.zeros((64, 10), np.float32)}),
        teacher=None,
        method="ce",
        train=kept[0],
        evaluation=kept[1],
        num_classes=10,
    ).fit()
    assert 1.0 < result.metrics[0]["values"]["ce_term"] < np.log(9) + 1e-6


def test_a_gradient_whose_square_overflows_stops_a_run_of_adam(make):
    """Adam's update by it is 0, and so is each later one."""
    steep = lambda teacher, student, labels: 1e22 * jnp.sum(student - jax.lax.stop_gradient(student), axis=-1)  # noqa: E731
    config = {"optim.name": "adamw", "ce_weight": 0.0}
    with pytest.raises(NonFiniteError, match="the weights are not finite at step 1"):
        make(method=steep, epochs=1, config=config).fit()


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_an_infinite_gradient_is_seen_where_the_update_is_its_sign(make, non_finite):
    """Lion's update by an infinite gradient is finite, and so is the loss, whose root is taken at 0."""

    def steep(teacher_logits, student_logits, labels):
        del teacher_logits, labels
        return jnp.sum(jnp.sqrt(student_logits - jax.lax.stop_gradient(student_logits)), axis=-1)

    white = np.full((80, 8, 8, 1), 255, np.uint8), np.arange(80) % 10
    config = {"optim.name": "lion", "non_finite": non_finite, "ce_weight": 0.0, "data.mean": (0.0,)}
    trainer = make(method=steep, train=white, evaluation=white, epochs=1, config=config)
    if non_finite == "stop":
        with pytest.raises(NonFiniteError, match="the weights are not finite at step 1"):
            trainer.fit()
    else:
        assert trainer.fit().summary["skipped_steps"] == 2
        np.testing.assert_array_equal(trainer.predict(white[0]), 0)  # as it began

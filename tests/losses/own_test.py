"""A user's own loss: masked rows, devices, dtypes and what it refuses, as those of every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import as_method


def squares(teacher_logits, student_logits, labels):
    return jnp.sum((teacher_logits - student_logits) ** 2, axis=-1) * (labels >= 0)


def test_masked_rows_of_a_users_own_loss_are_as_good_as_absent(rng):
    method, (teacher, student) = as_method(squares), rng.normal(size=(2, 4, 5)).astype(np.float32)
    labels, kept = np.array([0, 1, 2, 3]), np.array([True, False, True, True])
    loss = jax.value_and_grad(
        lambda student, rows: method.loss(teacher[rows], student[rows], labels[rows], method.config())
    )
    wanted, slope = loss(student, kept)
    student[1], labels[1] = np.nan, 99
    value, gradient = jax.value_and_grad(
        lambda student: method.loss(teacher, student, labels, method.config(), where=kept)
    )(student)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], slope[kept], rtol=1e-6)
    assert not np.any(gradient[1])


def test_masked_rows_of_a_users_scalar_loss_are_not_made_zero(rng):
    """Such a loss may compare examples, and divide each by its norm before it leaves some out."""

    def cosines(teacher_logits, student_logits, labels, where=None):
        t, s = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (teacher_logits, student_logits))
        return jnp.sum(jnp.where(where[:, None] & where, (t @ t.T - s @ s.T) ** 2, 0.0))

    method, (teacher, student) = as_method(cosines), rng.normal(size=(2, 4, 5)).astype(np.float32)
    kept = np.array([True, False, True, True])
    value, gradient = jax.value_and_grad(
        lambda student: method.loss(teacher, student, jnp.zeros(4, int), method.config(), where=kept)
    )(student)
    assert value > 0
    assert np.isfinite(gradient).all() and gradient[kept].any() and not gradient[1].any()


def test_a_users_own_loss_is_an_argument_of_jit_and_has_a_mean_over_devices(rng):
    method, (teacher, student) = as_method(squares), rng.normal(size=(2, 8, 5)).astype(np.float32)
    labels = np.arange(8) % 5
    wanted = jax.jit(method.loss)(teacher, student, labels, method.config())
    mean = functools.partial(method.loss, cfg=method.config(), axis_name="rows")
    split = jax.vmap(mean, axis_name="rows")(*(x.reshape(2, 4, *x.shape[1:]) for x in (teacher, student, labels)))
    np.testing.assert_allclose(split, [wanted] * 2, rtol=1e-6)
    scalar = as_method(lambda teacher, student, labels: jnp.sum(student))
    with pytest.raises(ValueError, match="returns a scalar, of which the mean over rows is unknown"):
        jax.vmap(functools.partial(scalar.loss, cfg=scalar.config(), axis_name="rows"), axis_name="rows")(
            *(x.reshape(2, 4, *x.shape[1:]) for x in (teacher, student, labels))
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_the_results_of_a_users_own_loss_are_averaged_in_float32(dtype):
    """Their mean is no number of bfloat16, and weights of a half would be 0 as integers."""
    method = as_method(lambda teacher, student, labels: jnp.asarray([256, 257, 258, 259]).astype(dtype))
    rows = jnp.zeros((4, 3)), jnp.zeros((4, 3)), jnp.arange(4)
    values = np.asarray(jnp.asarray([256, 257, 258, 259]).astype(dtype), np.float64)
    for rest in ({}, {"weights": jnp.array([0.5, 0.25, 0.5, 0.5])}):
        loss = method.loss(*rows, method.config(), **rest)
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, np.average(values, weights=rest.get("weights")), rtol=1e-6)
    scalar = as_method(lambda teacher, student, labels: jnp.asarray(3).astype(dtype))
    loss = scalar.loss(*rows, scalar.config())
    assert loss == 3 and loss.dtype == jnp.float32


def test_the_logits_of_a_users_own_loss_are_checked_as_any_methods():
    method, labels = as_method(squares), np.zeros(2, int)
    z = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"one shape .* got \(1, 3\) and \(2, 3\)"):
        method.loss(z[:1], z, labels, method.config())
    with pytest.raises(ValueError, match="teacher_logits must be floating, got int32"):
        method.loss(z.astype(np.int32), z, labels, method.config())
    with pytest.raises(ValueError, match="student_logits must be floating, got int32"):
        method.loss(z, z.astype(np.int32), labels, method.config())


def test_a_users_own_loss_takes_lists_and_numpys_float64():
    method = as_method(squares)
    loss = method.loss(np.ones((2, 3)), np.zeros((2, 3)), [0, 1], method.config())
    assert loss == 3 and loss.dtype == jnp.float32
    assert method.loss([[1.0, 1.0]], [[0.0, 0.0]], [0], method.config(), where=[True]) == 2

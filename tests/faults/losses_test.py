"""Labels that are no class, and logits that are not finite, never pass for numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import METHODS
from ldrld_jax.metrics import agreement, classification
from ldrld_jax.train.objective import cross_entropy
from tests.losses.methods_test import LABELLED, NAMES, batch, default
from tests.losses.rows import loss_of_rows


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [-1, -100, 5])
def test_a_label_out_of_range_is_refused_or_nan_under_jit_unless_it_is_masked(name, label, rng):
    teacher, student, labels = batch(rng, 3, dtype=np.float32)
    labels[1] = label
    loss = lambda student, **rows: loss_of_rows(METHODS[name])(teacher, student, labels, default(name), **rows)  # noqa: E731
    with pytest.raises(ValueError, match=r"labels must be between 0 and 4, got -?\d+\. Mask rows"):
        loss(student)
    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    assert np.isnan(value) and np.isnan(gradient[1]).all()
    kept = np.array([True, False, True])
    masked = loss(student, where=kept)
    labels[1] = 0
    np.testing.assert_array_equal(masked, loss(student, where=kept))


@pytest.mark.parametrize("label", [-1, -3, 4, 1000])
def test_no_metric_takes_a_label_out_of_range_for_another_class(label):
    logits, labels = jnp.array([[0.0, 1.0, 5.0], [4.0, 0.0, 0.0]]), jnp.array([label, 0])
    values = {name: mean.value for name, mean in classification(logits, labels).items()}
    assert np.isnan(values["ce"]) and values["top1"] == values["top5"] == 50.0
    kept = jnp.array([False, True])
    ce = classification(logits, labels, kept)["ce"].value
    np.testing.assert_allclose(ce, np.log(1 + 2 * np.exp(-4)), rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(logits, labels, where=kept), ce, rtol=1e-6)
    assert np.isnan(cross_entropy(logits, labels))
    classes, ranks = jnp.array([[2.0], [0.0]]), jnp.zeros((2, 1))
    assert agreement(labels, classes, ranks)["label_in_top_d"].value == 50.0
    assert agreement(labels, classes, ranks, kept)["label_in_top_d"].value == 100.0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ldrld"])
def test_a_logit_that_is_not_finite_makes_the_value_and_its_rows_gradient_nan(name, rng):
    loss = jax.jit(jax.value_and_grad(loss_of_rows(METHODS[name]), argnums=1), static_argnums=3)
    for teacher_value, student_value in ((-np.inf, 0.0), (0.0, -np.inf), (-np.inf, -np.inf), (np.inf, 0.0)):
        teacher, student, labels = batch(rng, 4, dtype=np.float32)
        teacher[1, 4], student[1, 4] = teacher_value, student_value
        value, gradient = loss(teacher, student, labels, default(name))
        assert np.isnan(value) and np.isnan(gradient[1]).all()


@pytest.mark.parametrize("name", LABELLED)
def test_a_label_out_of_range_is_nan_for_any_teacher(name, rng):
    """rld counts the classes below the label's, of which there would be none."""
    teacher, student, labels = batch(rng, 3, dtype=np.float32)
    labels[1] = 5
    loss = jax.jit(lambda teacher: loss_of_rows(METHODS[name])(teacher, student, labels, default(name)))
    for shift in (-20, 0, 20):
        assert np.isnan(loss(teacher + shift))

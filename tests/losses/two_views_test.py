"""crld and sld on two views that differ; baselines_test and golden_2026_test compare them with other numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import METHODS, CRLDConfig, SLDConfig, crld_parts, sld_parts
from tests.losses.baselines_test import loss_and_gradient


@pytest.fixture
def views(rng, x64):
    return jnp.asarray(2 * rng.normal(size=(2, 2, 5, 4))), np.array([0, 1, 2, 3, 0])


@pytest.mark.parametrize(("name", "cfg"), [("crld", CRLDConfig(weak_threshold=0.3)), ("sld", SLDConfig())])
def test_an_example_is_its_two_views(name, cfg, views):
    """Counts an example if both views are kept, with the mean of their weights; no loss sees what is dropped."""
    (teacher, student), labels = views
    where = np.array([[True, True, False, True, True], [True, False, True, True, True]])
    weights = np.array([[1.0, 9.0, 9.0, 2.0, 0.0], [3.0, 9.0, 9.0, 1.0, 2.0]])
    ones = [
        loss_and_gradient(METHODS[name], cfg, teacher[:, i : i + 1], student[:, i : i + 1], labels[None, [i, i]].T)[0]
        for i in (0, 3, 4)
    ]
    broken = [jnp.where(where[..., None], z, jnp.nan) for z in (teacher, student)]
    loss, gradient = loss_and_gradient(
        METHODS[name], cfg, *broken, np.stack([labels] * 2), where=where, weights=weights
    )
    np.testing.assert_allclose(loss, np.dot([2.0, 1.5, 1.0], ones) / 4.5, rtol=1e-12)
    assert (
        np.all(np.isfinite(gradient)) and not np.any(gradient[:, 1:3]) and np.all(np.any(gradient[:, [0, 3]], axis=-1))
    )


def test_crld_counts_only_what_the_teacher_is_sure_of(views):
    (teacher, student), _ = views
    sure = np.max(np.exp(teacher) / np.sum(np.exp(teacher), axis=-1, keepdims=True), axis=-1)
    parts = lambda weak, strong: crld_parts(  # noqa: E731
        teacher, student, CRLDConfig(weak_threshold=weak, strong_threshold=strong)
    )
    always, never = parts(0, 0), parts(1, 1)
    assert never["within"] == never["cross"] == 0 and min(always.values()) > 0.1
    order = np.sort(sure, axis=-1)
    alone = parts(*order[:, -1] * (1 - 1e-12))  # the example of which the weak, and the strong view is surest
    for part, i in (("within", np.argmax(sure[0])), ("cross", np.argmax(sure[1]))):
        only = crld_parts(teacher[:, [i]], student[:, [i]], CRLDConfig(weak_threshold=0, strong_threshold=0))[part]
        np.testing.assert_allclose(alone[part], only / 5, rtol=1e-12)


def test_sld_takes_labels_for_both_views_or_for_each(views):
    (teacher, student), labels = views
    both, each = (sld_parts(teacher, student, y, SLDConfig()) for y in (labels, np.stack([labels, labels])))
    assert both == each
    other = sld_parts(teacher, student, np.stack([labels, labels[::-1]]), SLDConfig())
    assert abs(other["teacher"] / both["teacher"] - 1) > 1e-3


def test_slds_own_target_is_off_where_the_label_leads_and_by_what_it_is_given(views):
    (teacher, student), labels = views
    led = student.at[:, np.arange(5), labels].set(20.0)
    assert sld_parts(teacher, led, labels, SLDConfig())["student"] == 0
    on = sld_parts(teacher, student, labels, SLDConfig(student_swap=0.5))["student"]
    for epoch, want in ((1, 0.0), (150, 0.0), (151, on)):
        params = METHODS["sld"].at_epoch(SLDConfig(), jnp.int32(epoch))
        found = sld_parts(teacher, student, labels, SLDConfig(student_swap=0.5), params=params)["student"]
        np.testing.assert_allclose(found, want, rtol=1e-12)
    assert METHODS["sld"].at_epoch(SLDConfig(student_swap_epoch=0), 1) == 1


def test_sld_is_finite_where_probabilities_underflow():
    student = np.zeros((2, 1, 3), np.float32)
    student[..., 1] = 1e4
    loss, gradient = loss_and_gradient(METHODS["sld"], SLDConfig(), 0 * student, student, np.zeros(1, int))
    assert np.isfinite(loss) and np.all(np.isfinite(gradient)) and loss > 1e4


@pytest.mark.parametrize("name", ["crld", "sld"])
def test_two_views_are_needed(name):
    z, labels, method = jnp.zeros((3, 4, 5)), jnp.zeros(4, int), METHODS[name]
    with pytest.raises(ValueError, match=rf"{name} needs teacher_logits with a first axis of 2, got shape \(3, 4, 5\)"):
        method.loss(z, z, labels, method.config())
    with pytest.raises(ValueError, match=f"{name} needs where with a first axis of 2"):
        method.loss(z[:2], z[:2], labels, method.config(), where=jnp.ones(4, bool))

"""abkd's limits, and its digits near them; baselines_test and golden_2026_test compare it with other numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import ABKDConfig, abkd_terms


def terms_and_slopes(teacher, student, alpha, beta):
    """The loss of each row at T = 1 and the gradient of their sum."""
    return _terms_and_slopes(teacher, student, ABKDConfig(temperature=1, alpha=alpha, beta=beta))


@jax.jit
def _terms_and_slopes(teacher, student, cfg):
    terms, pull = jax.vjp(lambda s: abkd_terms(teacher, s, cfg), student)
    return terms, pull(jnp.ones_like(terms))[0]


def log_softmax(z):
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


@pytest.fixture
def logits(rng, x64):
    return jnp.asarray(2 * rng.normal(size=(2, 4, 6)))


def test_the_corners_are_the_divergences_that_they_are_named_for(logits):
    x, y = (log_softmax(np.asarray(z)) for z in logits)
    p, q = np.exp(x), np.exp(y)
    for (alpha, beta), want in {
        (1, 0): p * (x - y),
        (0, 1): q * (y - x),
        (0.5, 0.5): 2 * (np.sqrt(p) - np.sqrt(q)) ** 2,
        (0, 0): (x - y) ** 2 / 2,
        (1, 1): (p - q) ** 2 / 2,
        (0.5, 0): 4 * (np.sqrt(p) * (np.log(np.sqrt(p)) - np.log(np.sqrt(q))) - np.sqrt(p) + np.sqrt(q)),
        (0, 0.5): 4 * (np.sqrt(q) * (np.log(np.sqrt(q)) - np.log(np.sqrt(p))) - np.sqrt(q) + np.sqrt(p)),
    }.items():
        found, _ = terms_and_slopes(*logits, alpha, beta)
        np.testing.assert_allclose(found, np.sum(want, axis=-1), rtol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.3), (0.6, 0.0), (0.0, 0.0), (0.0, 1.0)])
def test_every_limit_is_approached_at_a_constant_rate(logits, alpha, beta):
    """The difference of the divergence from its limit is proportional to the step, to first order, at any step."""
    at = terms_and_slopes(*logits, alpha, beta)
    rates = []
    for step in (1e-4, 1e-6, 1e-8):
        near = terms_and_slopes(*logits, alpha + step * (alpha == 0), beta + step * (beta == 0))
        rates.append([np.asarray(b - a) / step for a, b in zip(at, near, strict=True)])
    for rate in rates[1:]:
        for found, want in zip(rate, rates[0], strict=True):
            np.testing.assert_allclose(found, want, rtol=2e-2, atol=1e-3 * np.max(np.abs(want)))
    assert np.max(np.abs(rates[0][0])) > 1e-3


@pytest.mark.parametrize(("alpha", "beta"), [(1e-12, 0.7), (0.7, 1e-12), (1e-12, 1e-12), (1e-30, 1.0)])
def test_a_power_of_nearly_0_is_0_in_float32(rng, alpha, beta):
    logits = jnp.asarray(2 * rng.normal(size=(2, 4, 6)), jnp.float32)
    near = terms_and_slopes(*logits, alpha, beta)
    limit = terms_and_slopes(*logits, alpha if alpha > 0.1 else 0, beta if beta > 0.1 else 0)
    for a, b in zip(near, limit, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_near_student_keeps_its_digits(rng, x64):
    """The divergence is then half the chi-squared distance with weights p^(s - 2), whatever alpha and beta."""
    teacher = rng.normal(size=(3, 5))
    student = teacher + 1e-6 * rng.normal(size=(3, 5))
    x, y = log_softmax(teacher), log_softmax(student)
    for alpha, beta in ((0.8, 0.3), (1, 0), (0, 0), (2, 3)):
        found, _ = terms_and_slopes(jnp.asarray(teacher), jnp.asarray(student), alpha, beta)
        want = np.sum(np.exp((alpha + beta) * x) * (y - x) ** 2, axis=-1) / 2
        np.testing.assert_allclose(found, want, rtol=1e-4)


def test_probabilities_that_underflow_leave_value_and_gradient_finite():
    teacher, student = jnp.array([[0.0, 300.0, -2000.0]]), jnp.array([[3000.0, 0.0, -100.0]])
    for alpha, beta in ((0.8, 0.3), (1, 0), (0, 1), (0.5, 0.5), (0, 0), (3, 2)):
        value, slope = terms_and_slopes(teacher, student, alpha, beta)
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope)) and value[0] > 0


@pytest.mark.parametrize("fill", [-1e36, float(jnp.finfo(jnp.bfloat16).min), float(jnp.finfo(jnp.float32).min)])
@pytest.mark.parametrize(
    ("masked", "alpha", "beta"),
    [
        ("teacher", 0.8, 0.3),
        ("teacher", 1, 0),
        ("teacher", 3, 2),
        ("student", 0.8, 0.3),
        ("student", 0, 1),
        ("student", 3, 2),
    ],
)
def test_a_class_masked_by_a_dtypes_minimum_has_no_other_loss_than_a_smaller_mask_gives(masked, alpha, beta, fill):
    teacher, student = jnp.array([[2.0, 1.0, -1.0, 0.5]]), jnp.array([[3.0, 1.0, 0.0, -2.0]])

    def results(fill):
        sides = {"teacher": teacher, "student": student}
        sides[masked] = sides[masked].at[0, 3].set(fill)
        return terms_and_slopes(sides["teacher"], sides["student"], alpha, beta)

    for found, want in zip(results(fill), results(-1e4), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)
        assert np.max(np.abs(want)) > 1e-3


def test_derivatives_agree_in_both_modes_and_to_second_order(logits):
    cfg = ABKDConfig(temperature=1, alpha=0.8, beta=0.3)
    loss = lambda s: jnp.sum(abkd_terms(logits[0], s, cfg))  # noqa: E731
    direction = jnp.ones_like(logits[1]).at[:, 0].set(-2.0)
    gradient, tangent = jax.jvp(jax.grad(loss), (logits[1],), (direction,))
    step = 1e-5
    either = [jax.grad(loss)(logits[1] + sign * step * direction) for sign in (1, -1)]
    np.testing.assert_allclose(tangent, (either[0] - either[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(jax.jvp(loss, (logits[1],), (direction,))[1], jnp.sum(gradient * direction), rtol=1e-12)

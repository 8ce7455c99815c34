"""wkd's cost and transport."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import METHODS, WKDConfig, wkd_cost, wkd_terms


def test_the_cost_of_features_is_one_minus_the_linear_cka(rng, x64):
    features = rng.normal(size=(4, 6, 3))
    centred = features - features.mean(axis=1, keepdims=True)
    cross = lambda j, k: np.sum((centred[j].T @ centred[k]) ** 2)  # noqa: E731
    want = [[1 - cross(j, k) / np.sqrt(cross(j, j) * cross(k, k)) for k in range(4)] for j in range(4)]
    found = wkd_cost(jnp.asarray(features), sharpen=0)
    np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        wkd_cost(jnp.asarray(features), sharpen=2.0), 1 - np.exp(-2 * np.asarray(want)), atol=1e-14
    )
    turned = features @ np.linalg.qr(rng.normal(size=(3, 3)))[0] * 5 + 1  # CKA does not see a rotation, scale or shift
    np.testing.assert_allclose(wkd_cost(jnp.asarray(turned), sharpen=0), found, atol=1e-12)


def test_a_class_without_weights_is_at_distance_1(strict_dtypes):
    cost = wkd_cost(jnp.array([[0.0, 0.0], [1.0, 2.0]], jnp.bfloat16), sharpen=0)
    assert cost.dtype == jnp.float32
    assert cost.tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_the_marginals_are_met_and_the_cheapest_way_is_taken(x64):
    """Mass .4 moves one class on at cost .1 and not two classes at cost .5; many rounds and a small regularisation."""
    mass = [[0.1, 0.5, 0.3, 0.1], [0.5, 0.1, 0.3, 0.1]]
    teacher, student = (jnp.log(jnp.asarray([[1.0, *row]])) for row in mass)
    place = jnp.array([9.0, 0.0, 0.1, 0.5, 2.0])
    cost = jnp.abs(place[:, None] - place[None, :])
    cfg = WKDConfig(temperature=1, gamma=2, regularization=0.01, iterations=500)
    terms = wkd_terms(teacher, student, jnp.array([0]), cfg, params=cost)
    np.testing.assert_allclose(terms["transport"], 2 * 0.4 * 0.1, rtol=1e-5)
    np.testing.assert_allclose(terms["target"], 0.5 * np.log(2.0), rtol=1e-12)


def test_neither_the_label_nor_a_cost_below_0_takes_part(rng, x64):
    teacher, student = rng.normal(size=(2, 3, 5))
    cost, cfg, labels = rng.uniform(size=(5, 5)), WKDConfig(temperature=1), np.array([0, 1, 2])
    moved = lambda cost: wkd_terms(  # noqa: E731
        jnp.asarray(teacher), jnp.asarray(student), labels, cfg, params=jnp.asarray(cost)
    )["transport"]
    others = cost.copy()
    others[0] = others[:, 0] = 7.0
    np.testing.assert_allclose(moved(others)[0], moved(cost)[0], rtol=1e-12)
    assert np.all(np.abs(moved(others)[1:] / moved(cost)[1:] - 1) > 1e-3)
    np.testing.assert_allclose(
        moved(np.where(cost < 0.5, -1.0, cost)), moved(np.where(cost < 0.5, 0.0, cost)), rtol=1e-12
    )


def test_the_cost_gets_no_gradient(rng, x64):
    teacher, student, cost = (jnp.asarray(rng.normal(size=(5, 5))) for _ in range(3))
    loss = lambda cost: METHODS["wkd"].loss(teacher, student, jnp.arange(5), WKDConfig(), params=cost)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(cost)
    assert value > 0 and not np.any(gradient)


def test_what_cannot_be_is_named():
    z, labels, cfg = jnp.zeros((2, 5)), jnp.zeros(2, int), WKDConfig()
    with pytest.raises(ValueError, match=r"wkd needs params, the cost \[5, 5\] between classes"):
        METHODS["wkd"].loss(z, z, labels, cfg)
    with pytest.raises(ValueError, match=r"wkd needs params of shape \(5, 5\), a cost per pair, got \(4, 4\)"):
        METHODS["wkd"].loss(z, z, labels, cfg, params=jnp.zeros((4, 4)))
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        WKDConfig(iterations=0)
    with pytest.raises(ValueError, match=r"features \[classes, n >= 2, d\], got shape \(3,\)"):
        wkd_cost(jnp.zeros(3))
    with pytest.raises(ValueError, match="sharpen must be finite and not negative, got -1"):
        wkd_cost(z, sharpen=-1)
    with pytest.raises(ValueError, match=r"got shape \(5, 1, 4\)"):  # one example has no covariance
        wkd_cost(jnp.ones((5, 1, 4)))

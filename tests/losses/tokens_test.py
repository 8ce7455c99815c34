"""bild and topk_tail on tokens: ties, a whole vocabulary, buckets that are nearly empty, a batch on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldrld_jax.losses import METHODS, BiLDConfig, KDConfig, TopKTailConfig, bild_terms, kd_terms, topk_tail_terms


def test_bild_ignores_what_neither_side_ranks_high(rng, x64):
    teacher, student = rng.normal(size=(2, 4, 9))
    cfg = BiLDConfig(top_k=3)
    teacher, student = jnp.asarray(teacher), jnp.asarray(student)
    low = (teacher < jnp.sort(teacher)[:, [-3]]) & (student < jnp.sort(student)[:, [-3]])
    slope = jax.jit(jax.grad(lambda s: sum(jnp.sum(term) for term in bild_terms(teacher, s, cfg).values())))(student)
    assert np.any(low) and not np.any(slope[low]) and np.all(np.any(slope[~low]))


def test_bild_orders_equal_logits_by_class(x64):
    """The lower of two equal leaders comes first: the difference is taken the same way on both sides."""
    teacher, student = jnp.array([[2.0, 2.0, 0.0, -1.0]]), jnp.array([[0.0, 1.0, 0.5, -1.0]])
    found = jax.jit(bild_terms)(teacher, student, BiLDConfig(top_k=3, temperature=1.0))["teacher_led"][0]
    softmax = lambda z: np.exp(z) / np.sum(np.exp(z))  # noqa: E731
    p, q = softmax(np.array([0.0, 2.0, 2.0])), softmax(np.array([-1.0, -0.5, 0.5]))
    np.testing.assert_allclose(found, np.sum(p * np.log(p / q)), rtol=1e-12)


def test_bild_of_two_logits_is_0_and_of_more_than_there_are_an_error(rng):
    z = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    assert not np.any(jax.jit(bild_terms)(z, z[::-1], BiLDConfig(top_k=2))["student_led"])
    with pytest.raises(ValueError, match=r"top_k must be between 2 and the number of classes \(5\), got 8"):
        bild_terms(z, z, BiLDConfig())
    with pytest.raises(ValueError, match="top_k must be at least 2, got 1"):
        BiLDConfig(top_k=1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_from_all_classes_on_topk_tail_is_the_whole_divergence(rng, x64, beta):
    teacher, student = (jnp.asarray(z) for z in rng.normal(size=(2, 3, 4, 6)))
    sides = (teacher, student) if beta == 0 else (student, teacher)
    want = kd_terms(*sides, KDConfig(temperature=1))
    for k in (6, 99):
        found = topk_tail_terms(teacher, student, TopKTailConfig(top_k=k, beta=beta))
        np.testing.assert_allclose(found, want, rtol=1e-12)


def test_a_nearly_empty_bucket_keeps_its_digits(x64):
    """The rest holds e^-60, which 1 minus the sum of the others would round to 0."""
    teacher, student = jnp.array([[60.0, 0.0, 0.0]]), jnp.array([[60.0, 1.0, 1.0]])
    terms = lambda s: topk_tail_terms(teacher, s, TopKTailConfig(top_k=1, beta=0))[0]  # noqa: E731
    found, slope = jax.jit(jax.value_and_grad(terms))(student)
    rest = [2 * np.exp(-60.0), 2 * np.exp(-59.0)]
    np.testing.assert_allclose(found, rest[0] * (np.log(rest[0] / rest[1])) + rest[1] - rest[0], rtol=1e-6)
    np.testing.assert_allclose(slope[0, 1:], (rest[1] - rest[0]) / 2, rtol=1e-6)


def test_a_union_of_all_classes_has_no_bucket(x64):
    """Two of four classes on either side: nothing is left, and the tail makes no difference."""
    teacher, student = jnp.array([[4.0, 3.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 5.0, 4.0]])
    with_tail, without = (
        jax.jit(jax.value_and_grad(lambda s, cfg=cfg: topk_tail_terms(teacher, s, cfg)[0]))(student)
        for cfg in (TopKTailConfig(top_k=2, beta=0.5, tail=tail) for tail in (True, False))
    )
    np.testing.assert_allclose(with_tail[0], without[0], rtol=1e-12)
    np.testing.assert_allclose(with_tail[1], without[1], rtol=1e-12)
    assert with_tail[0] > 0.1


def test_wrong_fields_of_topk_tail_are_named():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        TopKTailConfig(top_k=0)
    with pytest.raises(ValueError, match=r"beta must be between 0 and 1, got 1\.5"):
        TopKTailConfig(beta=1.5)


@pytest.mark.parametrize(
    ("name", "fields"), [("bild", {}), ("topk_tail", dict(top_k=8, beta=0.5)), ("dkd", dict(top_k=8))]
)
def test_no_logits_travel_between_devices(rng, name, fields):
    """`lax.top_k` would gather a batch-sharded array."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    method = METHODS[name]
    logits = jax.ShapeDtypeStruct((16, 4, 50), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    labels = jax.ShapeDtypeStruct((16, 4), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    gradient = jax.value_and_grad(functools.partial(method.loss, cfg=method.config(**fields)), argnums=1)
    text = jax.jit(gradient).lower(logits, logits, labels).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text

"""Means that add up, top-k by its definition, and a step's metrics as one array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.metrics import (
    Mean,
    add,
    agreement,
    at_labels,
    by_step,
    classification,
    in_top,
    mean_of,
    pack,
    packed,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_a_mean_over_parts_is_the_mean_of_the_whole(rng):
    values = rng.normal(size=10).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1], bool)
    parts = [mean_of(jnp.asarray(values[i : i + 5]), jnp.asarray(mask[i : i + 5])) for i in (0, 5)]
    np.testing.assert_allclose((parts[0] + parts[1]).value, values[mask].mean(), rtol=1e-6)


def test_the_mean_of_nothing_is_nan_on_the_host():
    assert np.isnan(Mean(0.0, 0.0).value)


def test_adding_keeps_a_name_that_one_side_has():
    total = add({"a": Mean(1.0, 1.0)}, {"b": Mean(4.0, 2.0)})
    assert (total["a"].value, total["b"].value) == (1.0, 2.0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_in_top_is_a_stable_sort(rng, k):
    logits = rng.integers(0, 4, (200, 9)).astype(np.float32)  # many ties
    labels = rng.integers(0, 9, 200).astype(np.int32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    expected = (order[:, :k] == labels[:, None]).any(axis=-1)
    np.testing.assert_array_equal(in_top(jnp.asarray(logits), jnp.asarray(labels), k), expected)


def test_classification_by_hand_leaves_out_masked_rows():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.25, 0.25]]))
    means = classification(logits, jnp.array([0, 1, 0]), jnp.array([True, True, False]))
    np.testing.assert_allclose(means["ce"].value, -(np.log(0.7) + np.log(0.3)) / 2, rtol=1e-6)
    assert means["top1"].value == 50.0
    assert means["top5"].value == 100.0
    assert float(means["top1"].count) == 2


def test_agreement_by_hand():
    classes = jnp.array([[0.0, 2.0], [0.0, 1.0]])  # of the student
    ranks = jnp.array([[0, 2], [3, 2]])  # in the teacher: 0, 1, 2, 3 and 3, 2, 1, 0
    means = agreement(jnp.array([2, 3]), classes, ranks)
    assert means["agreement"].value == 50.0  # 0 = 0, 3 != 0
    assert means["top_d_overlap"].value == 25.0  # {0, 1} and {0, 2} share one of two, {3, 2} and {0, 1} none
    assert means["label_in_top_d"].value == 50.0
    thirds = agreement(jnp.zeros(9, int), jnp.tile(jnp.arange(3.0), (9, 1)), jnp.tile(jnp.arange(3), (9, 1)))
    assert thirds["top_d_overlap"].value == 100.0
    alone = agreement(jnp.array([2, -1]), classes, ranks, where=jnp.array([True, False]))
    assert {name: mean.value for name, mean in alone.items()} == dict(
        agreement=100.0, top_d_overlap=50.0, label_in_top_d=100.0
    )


def test_the_metrics_of_a_step_come_to_the_host_as_one_array(x64):
    means = {"a": Mean(jnp.float64(1 / 3), jnp.float32(2.0)), "b": Mean(jnp.float32(0.1), jnp.float32(7.0))}
    _, metrics = jax.jit(packed(lambda state: (state, means)))(jnp.ones(()))
    assert len(jax.tree.leaves(metrics)) == 1
    (step,) = by_step(metrics)
    assert step == {"a": Mean(1 / 3, 2.0), "b": Mean(float(np.float32(0.1)), 7.0)}
    several = jax.lax.map(lambda x: pack({"a": Mean(x, x + 1)}), jnp.arange(3.0))
    assert [step["a"] for step in by_step(several)] == [Mean(0.0, 1.0), Mean(1.0, 2.0), Mean(2.0, 3.0)]


@pytest.mark.parametrize("label", [2**32 + 1, -(2**32) + 1, np.iinfo(np.int64).min, 2])
def test_a_label_beyond_32_bits_is_out_of_range(label):
    logits, labels = jnp.array([[0.25, 0.75]]), np.array([label])
    assert np.isnan(at_labels(logits, labels)).all()
    assert not in_top(logits, labels, 1).any()

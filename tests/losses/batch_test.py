"""skd and luminet see the whole batch, however it is split, and are finite where the published code is not."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldrld_jax.losses import METHODS, SKDConfig, skd_parts
from tests.losses.baselines_test import loss_and_gradient
from tests.losses.methods_test import default
from tests.losses.rows import from_teacher

WHOLE_BATCH = {
    "skd": METHODS["skd"].config(batch_masks=True, kl_weight=0.3),
    "luminet": METHODS["luminet"].config(alpha=2),
    "dist": METHODS["dist"].config(),
    "mlkd": METHODS["mlkd"].config(),
}


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def batch(rng):
    """Sixteen rows of six classes, some left out, which hold NaN, and the others of several weights."""
    teacher, student = 2 * rng.normal(size=(2, 16, 6))
    where = rng.permutation(16) < 11
    teacher[~where] = student[~where] = np.nan
    return teacher, student, np.zeros(16, int), where, rng.uniform(0.5, 2.0, 16)


def value_and_gradient(method, cfg, **how):
    def loss(student, teacher, labels, where, weights):
        return method.loss(teacher, student, labels, cfg, where=where, weights=weights, **how)

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_under_jit_over_eight_devices_the_batch_is_the_global_one(name, rng, x64, mesh):
    teacher, student, labels, where, weights = batch(rng)
    function = jax.jit(value_and_gradient(METHODS[name], WHOLE_BATCH[name]))
    want, want_gradient = function(student, teacher, labels, where, weights)
    rows = NamedSharding(mesh, P("data"))
    found, gradient = function(*jax.device_put((student, teacher, labels, where, weights), rows))
    np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-14)
    assert not METHODS[name].decomposes and found > 1e-3


@pytest.mark.parametrize("name", sorted({*METHODS} - {"crld", "sld"}))
def test_under_shard_map_with_an_axis_name_too(name, rng, x64, mesh):
    teacher, student, labels, where, weights = batch(rng)
    method, cfg = METHODS[name], WHOLE_BATCH.get(name, default(name))
    split = P("data")
    mapped = jax.shard_map(
        lambda *rows: method.loss(*rows[:3], cfg, where=rows[3], weights=rows[4], axis_name="data", **given),
        mesh=mesh,
        in_specs=(split,) * 5,
        out_specs=P(),
    )
    given = from_teacher(method, 6)
    rows = (teacher, student, labels, where, weights)
    found, gradient = jax.jit(jax.value_and_grad(mapped, argnums=1))(*rows)
    want, want_gradient = loss_and_gradient(
        method, cfg, teacher, student, labels, where=where, weights=weights, **given
    )
    np.testing.assert_allclose(found, want, rtol=1e-12)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_without_an_axis_name_each_shard_is_a_batch(name, rng, x64, mesh):
    teacher, student, labels, _, _ = batch(rng)
    method, cfg = METHODS[name], WHOLE_BATCH[name]
    teacher, student = np.nan_to_num(teacher), np.nan_to_num(student)
    mapped = jax.shard_map(
        lambda *rows: method.loss(*rows, cfg)[None], mesh=mesh, in_specs=(P("data"),) * 3, out_specs=P("data")
    )
    local = jax.jit(mapped)(teacher, student, labels)
    want, _ = loss_and_gradient(method, cfg, teacher[6:8], student[6:8], labels[6:8])
    np.testing.assert_allclose(local[3], want, rtol=1e-12)


@pytest.mark.parametrize("rows", [4, 5, 7])
def test_the_factors_of_skds_masks_are_shares_up_to_the_median(rng, x64, rows):
    """Compares with NumPy's median over the rows that are kept, with a tie in it."""
    teacher, student = 2 * rng.normal(size=(2, rows + 2, 6))
    teacher[2, ::-1] = teacher[1]
    where = np.arange(rows + 2) < rows
    configs = SKDConfig(), SKDConfig(batch_masks=True)
    plain, masked = jax.jit(lambda *rows: [skd_parts(*rows, cfg, where=where) for cfg in configs])(teacher, student)
    p = np.exp(teacher[where]) / np.sum(np.exp(teacher[where]), axis=-1, keepdims=True)
    sure, classes = np.max(p, axis=-1), np.sum(p, axis=0)
    np.testing.assert_allclose(masked["kl"] / plain["kl"], np.mean(sure <= np.median(sure)), rtol=1e-12)
    share = np.mean(classes <= np.median(classes))
    np.testing.assert_allclose(masked["direction"] / plain["direction"], share, rtol=1e-12)


def test_skds_directions_do_not_depend_on_a_rows_scale(rng, x64):
    """The published code takes the root of 0 here: a student that is the teacher times a number per row."""
    teacher = rng.normal(size=(5, 6))
    method, cfg = METHODS["skd"], SKDConfig(kl_weight=0)
    for student in (teacher, teacher * np.array([[0.5], [1.0], [2.0], [4.0], [8.0]])):
        loss, gradient = loss_and_gradient(method, cfg, teacher, student, np.zeros(5, int))
        assert 0 <= loss < 1e-14 and np.all(np.isfinite(gradient))
    one, slope = loss_and_gradient(method, cfg, teacher[:1], -teacher[:1], np.zeros(1, int))
    assert one == 0 and not np.any(slope)


def test_skds_directions_of_logits_whose_squares_overflow_are_those_of_smaller_ones(rng):
    teacher, student = rng.normal(size=(2, 6, 5)).astype(np.float32)
    method, cfg, labels = METHODS["skd"], SKDConfig(kl_weight=0), np.zeros(6, int)
    want, slope = loss_and_gradient(method, cfg, teacher, student, labels)
    for factor in (np.float32(2.0**90), np.float32(2.0**70)):
        loss, gradient = loss_and_gradient(method, cfg, factor * teacher, factor * student, labels)
        np.testing.assert_allclose(loss, want, rtol=1e-5)
        np.testing.assert_allclose(gradient * factor, slope, rtol=1e-4, atol=1e-5 * np.max(np.abs(slope)))
    assert want > 0.01


def test_a_student_of_zeros_has_a_finite_gradient(rng):
    teacher = rng.normal(size=(4, 6)).astype(np.float32)
    loss, gradient = loss_and_gradient(METHODS["skd"], SKDConfig(), teacher, 0 * teacher, np.zeros(4, int))
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))


def test_luminet_standardises_each_class_over_the_batch(rng, x64):
    """A scale above 0 and a shift per class change nothing, up to the 1e-5 beside the variance; one row is 0."""
    teacher, student = 30 * rng.normal(size=(2, 6, 4))
    method, cfg, labels = METHODS["luminet"], METHODS["luminet"].config(alpha=3), np.zeros(6, int)
    loss, _ = loss_and_gradient(method, cfg, teacher, student, labels)
    moved, _ = loss_and_gradient(method, cfg, teacher, student * np.array([1, 2, 3, 4]) + np.arange(4), labels)
    np.testing.assert_allclose(moved, loss, rtol=1e-6)
    assert loss > 0.1
    one, slope = loss_and_gradient(method, cfg, teacher[:1], student[:1], labels[:1])
    assert one == 0 and not np.any(slope)

"""Losses at inputs that a mask of a vocabulary, a broken model or a wrong weight gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import (
    METHODS,
    BiLDConfig,
    CRLDConfig,
    LDRLDConfig,
    MethodConfig,
    as_method,
    ldrld_loss,
    ldrld_terms,
)
from ldrld_jax.losses.common import Positive, mean_over_rows
from ldrld_jax.losses.schedule import with_values
from ldrld_jax.losses.top import ranks_of, top_classes
from ldrld_jax.metrics import at_labels, classification
from tests.conftest import AS_USERS
from tests.losses import ldrld_reference
from tests.losses.rows import given, lead

LARGEST_FIRST, OTHER = [9.0, 5.0, 4.0, 1.0, 0.0], [3.0, -3.0, 1.0, 0.0]


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("temperature", [3.0, 4.0])
@pytest.mark.parametrize("fill", [-1e9, -1e30, -np.inf])
def test_a_class_that_the_teacher_rules_out_leaves_the_other_pairs_as_they_are(implementation, temperature, fill):
    cfg = LDRLDConfig(depth=3, temperature=temperature)
    with jax.enable_x64(True):
        rows = np.array([[-1e4, *OTHER]]), np.array([LARGEST_FIRST])
        expected, slopes = jax.value_and_grad(ldrld_reference.ldrld_loss, 1)(*map(jnp.asarray, rows), cfg)
    ours = functools.partial(ldrld_loss, cfg=cfg, implementation=implementation)
    rows = np.array([[fill, *OTHER]], np.float32), np.array([LARGEST_FIRST], np.float32)
    program = jax.jit(jax.value_and_grad(ours, 1)).lower(*rows).compile(compiler_options=AS_USERS)
    loss, gradient = program(*rows)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("temperature", [3.0, 4.0])
@pytest.mark.parametrize("fill", [-1e9, -1e30, -np.inf])
def test_a_class_that_the_student_rules_out_leaves_the_others_their_gradients(implementation, temperature, fill):
    cfg = LDRLDConfig(depth=3, temperature=temperature, rank_by="teacher")
    with jax.enable_x64(True):
        rows = np.array([LARGEST_FIRST]), np.array([[-1e4, *OTHER]])
        slopes = jax.grad(ldrld_reference.ldrld_loss, 1)(*map(jnp.asarray, rows), cfg)
    ours = functools.partial(ldrld_loss, cfg=cfg, implementation=implementation)
    rows = np.array([LARGEST_FIRST], np.float32), np.array([[fill, *OTHER]], np.float32)
    program = jax.jit(jax.grad(ours, 1)).lower(*rows).compile(compiler_options=AS_USERS)
    np.testing.assert_allclose(program(*rows)[0, 1:], slopes[0, 1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cfg", [LDRLDConfig(depth=3, use_remainder=False), LDRLDConfig(depth=3), LDRLDConfig()])
@pytest.mark.parametrize("classes", [slice(None), slice(5, 6)], ids=["all", "one"])
def test_a_students_row_of_nan_is_no_row_of_loss_0(cfg, classes):
    teacher, student = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    student[1, classes] = np.nan
    loss, gradient = jax.value_and_grad(ldrld_loss, 1)(teacher, student, cfg)
    assert np.isnan(loss)
    assert np.isnan(gradient[1]).any()
    kept = np.array([True, False, True, True])
    masked = functools.partial(ldrld_loss, cfg=cfg, where=kept)
    loss, gradient = jax.value_and_grad(masked, 1)(teacher, student)
    np.testing.assert_allclose(loss, ldrld_loss(teacher[kept], student[kept], cfg), rtol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("broken", [0, 1])
def test_bild_of_a_row_of_nan_is_nan(broken):
    logits = np.random.default_rng(0).normal(size=(2, 4, 12)).astype(np.float32)
    logits[broken, 2] = np.nan
    assert np.isnan(METHODS["bild"].loss(*logits, np.arange(4), BiLDConfig()))


def test_a_teacher_of_nan_agrees_with_nobody():
    top = top_classes(jnp.array([3.0, 1.0, 2.0]), 2)
    np.testing.assert_array_equal(ranks_of(jnp.full(3, jnp.nan), top), [3, 3])


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("weight", [np.nan, -1.0, np.inf])
def test_a_weight_that_is_none_is_refused_and_under_jit_not_taken_for_an_empty_mask(name, weight):
    method, rng = METHODS[name], np.random.default_rng(0)
    cfg = method.config()
    shape = lead(method, cfg, 4)
    rows = rng.normal(size=(2, *shape, 12)).astype(np.float32)
    labels, weights, params = np.broadcast_to(np.arange(4), shape), np.ones(shape, np.float32), given(method, cfg, 12)
    weights[(0,) * (len(shape) - 1) + (3,)] = weight  # of two views one: their mean may be a weight
    loss = lambda *rows, **rest: method.loss(*rows, labels, cfg, params=params, **rest)  # noqa: E731
    with pytest.raises(ValueError, match=r"^weights must be finite and not negative, got (nan|-1\.0|inf)\. Leave"):
        loss(*rows, weights=weights)
    where = np.broadcast_to(np.arange(4) < 3, shape)
    np.testing.assert_allclose(loss(*rows, weights=weights, where=where), loss(*rows, where=where), rtol=1e-6)
    if np.isnan(weight):
        assert np.isnan(jax.jit(loss)(*rows, weights=weights))


def test_weights_are_real_and_masks_have_the_shape_of_the_rows():
    with pytest.raises(ValueError, match="weights must be real numbers, got complex64"):
        mean_over_rows(jnp.ones(3), weights=jnp.ones(3, jnp.complex64))
    for where in (np.ones((3, 1), bool), np.ones(1, bool), np.ones(3, int)):
        with pytest.raises(ValueError, match="where must"):
            mean_over_rows(jnp.ones(3), where=where)
        with pytest.raises(ValueError, match="where must"):
            classification(jnp.ones((3, 4)), jnp.zeros(3, int), where)
    assert mean_over_rows(jnp.arange(3.0), where=[True, False, True]) == 1.0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_weights_may_be_constants_of_a_jitted_function_and_are_checked_there(name):
    method = METHODS[name]
    cfg, rng = method.config(), np.random.default_rng(0)
    shape = lead(method, cfg, 4)
    rows = rng.normal(size=(2, *shape, 12)).astype(np.float32)
    labels, params = np.broadcast_to(np.arange(4), shape), given(method, cfg, 12)

    def loss(weights):
        return jax.jit(lambda student: method.loss(rows[0], student, labels, cfg, params=params, weights=weights))

    np.testing.assert_allclose(
        loss(jnp.ones(shape))(rows[1]), method.loss(*rows, labels, cfg, params=params), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"^weights must be finite and not negative, got -1\.0\."):
        loss(-jnp.ones(shape))(rows[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_users_loss_is_computed_and_averaged_in_float32(dtype, strict_dtypes):
    method = as_method(lambda teacher, student, labels: jnp.sum((teacher - student) ** 2, axis=-1))
    teacher, student = jnp.full((70_000, 3), 0.01, dtype), jnp.zeros((70_000, 3), dtype)
    found = method.loss(teacher, student, jnp.zeros(70_000, int), method.config())
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 3 * float(teacher[0, 0]) ** 2, rtol=1e-5)


# A class's statistics over the batch lose what an offset of its rows hides.
OFFSET_BY_ROW = sorted(set(METHODS) - {"luminet"})


@functools.cache
def with_offsets(name):
    """Makes a loss of rows with a large offset, `loss(teacher, student, temperature=None)`, the rows, its gradient."""
    method, rng = METHODS[name], np.random.default_rng(0)
    cfg = method.config()
    if hasattr(cfg, "temperature"):
        cfg = dataclasses.replace(cfg, temperature=3.0)
    shape = lead(method, cfg, 4)
    rows = (rng.normal(size=(2, *shape, 12)) + 1e5 * rng.normal(size=(2, *shape, 1))).astype(np.float32)
    labels, params = np.broadcast_to(np.arange(4), shape), given(method, cfg, 12)

    def loss(teacher, student, temperature=None):
        used = cfg if temperature is None else with_values(cfg, {"temperature": temperature})
        return method.loss(teacher, student, labels, used, params=params)

    with jax.enable_x64(True):
        return loss, rows, jax.jit(jax.grad(loss, 1))(*rows.astype(np.float64))


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", OFFSET_BY_ROW)
def test_close_logits_keep_their_differences_however_large_they_are(name, scheduled):
    """Compares at T = 3, since a division by a power of two rounds nothing, in a program that XLA fuses."""
    if scheduled and not hasattr(METHODS[name].config(), "temperature"):
        pytest.skip(f"{name} has no temperature")
    loss, rows, expected = with_offsets(name)
    arguments = (*rows, np.float32(3)) if scheduled else tuple(rows)
    found = jax.jit(jax.grad(loss, 1)).lower(*arguments).compile(compiler_options=AS_USERS)(*arguments)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", METHODS)
def test_rows_whose_spread_no_float32_holds_are_no_nan_and_have_gradients_where_the_loss_is_finite(name):
    """The differences overflow, where the probabilities are 0 and 1; a loss that overflows itself is infinite."""
    method = METHODS[name]
    cfg = method.config(**{"bild": dict(top_k=3), "ldrld": dict(depth=3)}.get(name, {}))
    student, params = np.array([[3e38, -3e38, 0, 1], [1, 2, 0, -1]], np.float32), given(method, cfg, 4)

    @jax.jit
    def loss_and_gradient(student, teacher, labels):
        def loss(student):
            rows = [jnp.broadcast_to(x, lead(method, cfg, 2) + x.shape[1:]) for x in (teacher, student, labels)]
            return method.loss(*rows, cfg, params=params)

        return jax.value_and_grad(loss)(student)

    same = np.float32(0.9) * student
    for label in (0, 1):
        labels = np.array([label, 0])
        loss, gradient = loss_and_gradient(student, same, labels)
        if name == "sld" and label == 1:  # it learns the swapped logits, and they are 6e38 apart
            assert loss == np.inf
        else:
            assert np.isfinite(loss) and np.all(np.isfinite(gradient))
        assert not np.isnan(loss_and_gradient(student, same[:, ::-1], labels)[0])


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("classes", [6, 1100], ids=["one block", "two blocks"])
def test_ldrlds_remainder_of_logits_near_float32s_limit_is_that_of_float64(implementation, classes):
    """Compares rows in which each side has a class that is twice float32's range away from the other's maximum."""
    cfg, between = LDRLDConfig(depth=3), [0.0] * (classes - 6)
    teacher = np.array([[1e30, 0, 0, *between, 0.5, 0.5, 3.3e38]], np.float32)
    student = np.array([[3.3e38, 3, 3, *between, 0, 0, 1]], np.float32)
    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(functools.partial(ldrld_loss, cfg=cfg), 1))(
            *(row.astype(np.float64) for row in (teacher, student))
        )
    ours = functools.partial(ldrld_loss, cfg=cfg, implementation=implementation)
    loss, gradient = jax.jit(jax.value_and_grad(ours, 1))(teacher, student)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_ldrld_of_any_float32_is_a_number_and_has_a_gradient_where_it_is_finite(implementation, temperature, rng):
    values = np.array([0, 1, -1, 1e4, 1e30, -1e30, 3.3e38, -3.3e38, -np.inf], np.float32)
    teacher, student = rng.choice(values, size=(2, 500, 6))
    terms = functools.partial(
        ldrld_terms, cfg=LDRLDConfig(depth=3, temperature=temperature), implementation=implementation
    )
    loss, pull = jax.vjp(jax.jit(lambda z: sum(terms(teacher, z))), student)
    assert not np.isnan(loss).any()
    assert np.isfinite(pull(jnp.ones(500))[0][np.isfinite(loss)]).all()


def test_luminet_of_classes_near_float32s_limit_is_that_of_float64(rng):
    """Standardises classes of any size: mean, variance and their slopes do not overflow."""
    rows = rng.normal(size=(2, 40, 5)).astype(np.float32)
    rows[0, :, 0], rows[1, :, 0] = (rng.choice(np.float32([3.3e38, -3.3e38]), size=40) for _ in range(2))
    rows[:, :, 1] *= np.float32(1e17)
    with jax.enable_x64(True):
        program = jax.jit(jax.value_and_grad(METHODS["luminet"].loss, 1))
        expected = program(*rows.astype(np.float64), np.arange(40) % 5, METHODS["luminet"].config())
    found = program(*rows, np.arange(40) % 5, METHODS["luminet"].config())
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-3, atol=1e-4 * np.abs(expected[1]).max())


@pytest.mark.parametrize("name", ["kd", "dkd", "mlkd", "wsld"])
def test_a_students_class_masked_by_float32s_minimum_has_its_whole_gradient(name):
    method, cfg = METHODS[name], METHODS[name].config()
    gradient = jax.jit(jax.grad(lambda z, teacher: method.loss(teacher, z, np.array([0]), cfg)))
    teacher, row = np.array([[1.0, 0.0, 2.0, 0.5]], np.float32), [1.0, 3.0, 0.0]
    of_minimum, of_less = (
        gradient(np.array([[*row, fill]], np.float32), teacher) for fill in (np.finfo(np.float32).min, -1e30)
    )
    np.testing.assert_allclose(of_minimum, of_less, rtol=1e-6)
    assert abs(of_less[0, 3]) > 1e-2


def test_types_of_a_config_may_be_text():
    class Own(MethodConfig):
        """A config as a module with `from __future__ import annotations` defines it."""

        temperature: "Positive" = 4.0
        top_k: "int | None" = None
        exact: "bool" = False

    kinds = jax.tree_util.register_static(dataclasses.dataclass(frozen=True, kw_only=True)(Own))
    assert kinds(temperature=2, top_k=3) == kinds(temperature=2.0, top_k=3)
    for wrong in ({"temperature": 0}, {"top_k": 2.5}, {"exact": 1}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            kinds(**wrong)


def test_thresholds_of_crld_are_probabilities():
    for name in ("weak_threshold", "strong_threshold"):
        with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, got 90.0"):
            CRLDConfig(**{name: 90.0})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32])
def test_labels_of_few_bits_are_the_same_classes(dtype):
    values = jnp.arange(200.0)[None]
    assert at_labels(values, jnp.array([100], dtype)) == 100.0
    if np.issubdtype(dtype, np.signedinteger):
        assert np.isnan(at_labels(values, jnp.array([-1], dtype)))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_config_of_another_method_is_refused(name):
    method, other = METHODS[name], METHODS["kd" if name != "kd" else "nkd"].config()
    with pytest.raises(ValueError, match=f"^cfg must be a {method.config.__name__}, got {type(other).__name__}"):
        method.loss(jnp.zeros((3, 5)), jnp.zeros((3, 5)), jnp.zeros(3, int), other)

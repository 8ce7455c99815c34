"""The fast LDRLD against the plain one, and what it promises of memory, sharding, dtypes and derivatives.

LDRLD_JAX_EXAMPLES=500 compares on that many shapes, depths and temperatures instead of a few.
"""

import functools
import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import ldrld_jax
from ldrld_jax import LDRLDConfig, ldrld_loss, ldrld_terms
from ldrld_jax.losses.divergence import bernoulli_kl
from tests.collectives import transfers
from tests.conftest import AS_USERS
from tests.losses import ldrld_reference

EXAMPLES = int(os.environ.get("LDRLD_JAX_EXAMPLES", "0"))
BATCH, BATCH_AND_CLASSES = P("data"), P("data", "model")


compiled = functools.partial(jax.jit, compiler_options=AS_USERS)


@compiled
def fast(teacher, student, cfg):
    """The terms `[3, ..., N]` and the gradient of the loss."""
    return jnp.stack(ldrld_terms(teacher, student, cfg)), jax.grad(ldrld_loss, 1)(teacher, student, cfg)


@compiled
def plain(teacher, student, cfg):
    """The same of the plain version."""
    terms = jnp.stack(ldrld_reference.ldrld_terms(teacher, student, cfg))
    return terms, jax.grad(ldrld_reference.ldrld_loss, 1)(teacher, student, cfg)


value_and_grad = compiled(jax.value_and_grad(ldrld_loss, 1), static_argnames="block_rows")


def logits(rng, *shape, scale=3.0, dtype=np.float32):
    return tuple(jnp.asarray(rng.normal(size=shape) * scale, dtype) for _ in range(2))


def largest(array):
    return np.max(np.abs(np.asarray(array, np.float64)), initial=0)


def error(a, b):
    return largest(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(AxisType.Auto,) * len(sizes))


def assert_close_to_plain(teacher, student, cfg):
    """The two bounds: 1e-10 in float64; in float32 4 times the plain version's error + 1e-6 of the largest entry.

    What is exact is the plain version in float64 after a shift that puts the largest logit at 0:
    unshifted, its own error reaches 1e-10 of small losses at logits of 1e4. The last summand of each
    bound is the rounding of T^2 times a KL, a difference of numbers near 1; it matters to the smallest losses.
    """
    rounding = cfg.temperature**2 * np.array([1e-14, 1e-8])
    single = [jnp.asarray(z, jnp.float32) for z in (teacher, student)]
    ours, theirs = fast(*single, cfg), plain(*single, cfg)
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(z), jnp.float64) for z in single]  # the float32 numbers, exactly
        exact = plain(*(z - jnp.max(z, -1, keepdims=True) for z in double), cfg)
        for a, b in zip(fast(*double, cfg), exact, strict=True):
            assert error(a, b) <= 1e-10 * largest(b) + rounding[0]
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) <= 4 * error(b, c) + 1e-6 * largest(c) + rounding[1]


# A shape costs four compilations, so that few are tried unless asked for.
# (classes, depth): by repeated maximum; every class; by blocks, the last one not full.
SHAPES = st.sampled_from([(10, 4), (5, 5), (131, 3)])
if EXAMPLES:
    SHAPES = st.integers(2, 400).flatmap(lambda c: st.tuples(st.just(c), st.integers(2, min(c, 9))))


# Nor is a failure shrunk: each step would compile again.
@hypothesis.settings(
    max_examples=EXAMPLES or 60,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(
    shape=SHAPES,
    temperature=st.floats(0.5, 20) if EXAMPLES else st.just(3.0),
    rank_by=st.sampled_from(["student", "teacher"]) if EXAMPLES else st.just("student"),
    scale=st.sampled_from([1e-3, 1.0, 10.0, 1e3]),
    offset=st.sampled_from([0.0, 1e4]),
    ties=st.sampled_from(["none", "some", "most", "all", "sides alike"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_terms_and_gradient_are_the_plain_versions(shape, temperature, rank_by, scale, offset, ties, seed):
    classes, depth = shape
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(size=(2, 3, classes))
    if ties in ("some", "most"):
        step = {"some": 0.5, "most": 2}[ties]
        teacher, student = (np.round(z / step) * step for z in (teacher, student))
    if ties == "all":
        student = np.zeros_like(student)
    if ties == "sides alike":
        student = teacher + 0.1 * student
    cfg = LDRLDConfig(depth=depth, temperature=temperature, rank_by=rank_by)
    assert_close_to_plain(teacher * scale, student * scale + offset, cfg)


@pytest.mark.parametrize("rank_by", ["student", "teacher"])
def test_terms_and_gradient_are_the_plain_versions_at_a_thousand_classes(rank_by, rng):
    assert_close_to_plain(*logits(rng, 8, 1000), LDRLDConfig(rank_by=rank_by, depth=4))


def test_the_bernoulli_kl_keeps_its_digits_where_both_sides_are_sure():
    # The derivative is q - p of two numbers within 1e-8 of 1.
    teacher, student = jnp.array([20.0, -20.0]), jnp.array([18.0, -18.0])
    value, slope = jax.vmap(jax.value_and_grad(bernoulli_kl, 1))(teacher, student)
    p, q = 1 / (1 + np.exp(20.0)), 1 / (1 + np.exp(18.0))  # of the unlikely outcome
    np.testing.assert_allclose(slope, [p - q, q - p], rtol=1e-5)
    np.testing.assert_allclose(value, p * np.log(p / q) + (1 - p) * (np.log1p(-p) - np.log1p(-q)), rtol=1e-5)
    # The second derivative, q (1 - q), of equal student logits.
    assert jax.grad(jax.grad(bernoulli_kl, 1), 1)(1.0, 0.0) == 0.25


@pytest.mark.parametrize("modes", [["rev"], ["fwd"]])
def test_derivatives_are_those_of_the_value(modes, rng, x64):
    teacher, student = logits(rng, 3, 12, dtype=np.float64)
    loss = jax.jit(lambda s: ldrld_loss(teacher, s, LDRLDConfig(depth=3)))
    check_grads(loss, (student,), order=1, modes=modes)


def test_second_derivatives_are_the_plain_versions(rng, x64):
    teacher, student = logits(rng, 12, dtype=np.float64)
    hessians = [
        jax.jit(jax.hessian(loss, 1))(teacher, student, LDRLDConfig(depth=3))
        for loss in (ldrld_loss, ldrld_reference.ldrld_loss)
    ]
    assert error(*hessians) < 1e-10 * largest(hessians[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_raised_and_its_gradient_comes_back_in_it(dtype, rng, strict_dtypes):
    half = [z.astype(dtype) for z in logits(rng, 8, 100)]
    loss, gradient = value_and_grad(*half, LDRLDConfig())
    exact, exact_gradient = value_and_grad(*(z.astype(jnp.float32) for z in half), LDRLDConfig())
    assert (loss.dtype, gradient.dtype) == (jnp.float32, dtype)
    assert error(loss, exact) <= 1e-6 * exact
    assert np.all(gradient == exact_gradient.astype(dtype))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_give_a_finite_value_and_gradient(scale, rng):
    assert_close_to_plain(*logits(rng, 3, 131, scale=scale), LDRLDConfig(depth=3, temperature=3))


def test_classes_ruled_out_on_both_sides_take_no_part(rng, x64):
    teacher, student = (np.array(z) for z in logits(rng, 6, 40, dtype=np.float64))
    out = rng.permutation(40)[:25]
    allowed = np.setdiff1d(np.arange(40), out)
    cfg = LDRLDConfig(depth=5)
    expected, expected_gradient = value_and_grad(
        jnp.asarray(teacher[:, allowed]), jnp.asarray(student[:, allowed]), cfg
    )
    teacher[:, out] = student[:, out] = -np.inf
    loss, gradient = value_and_grad(jnp.asarray(teacher), jnp.asarray(student), cfg)
    assert error(loss, expected) < 1e-12 * expected
    assert error(gradient[:, allowed], expected_gradient) < 1e-12 * largest(expected_gradient)
    assert np.all(gradient[:, out] == 0)


@pytest.mark.parametrize("classes", [20, 300])
def test_minus_infinity_anywhere_gives_a_finite_value_and_gradient(classes, rng):
    cfg = LDRLDConfig(depth=4)
    places = {
        "fewer than d left on both sides": np.s_[:, 2:],
        "all but one": np.s_[:, 1:],
        "everything in one row": np.s_[0],
        "a few": np.s_[:, ::3],
    }
    for name, place in places.items():
        for sides in ((0, 1), (0,), (1,)):
            rows = [np.array(z) for z in logits(rng, 4, classes)]
            for side in sides:
                rows[side][place] = -np.inf
            loss, gradient = value_and_grad(*map(jnp.asarray, rows), cfg)
            assert np.isfinite(loss), (name, sides)
            assert np.all(np.isfinite(gradient)), (name, sides)


def test_blocks_of_rows_change_neither_value_nor_gradient(rng):
    teacher, student = logits(rng, 2, 5, 30)
    where = jnp.asarray(rng.random((2, 5)) < 0.7)
    cfg = LDRLDConfig(depth=3)
    loss, gradient = value_and_grad(teacher, student, cfg, where=where)
    for block_rows in (3, 10):  # 3 leaves a last block of one row
        in_blocks = value_and_grad(teacher, student, cfg, where=where, block_rows=block_rows)
        assert error(in_blocks[0], loss) <= 1e-6 * loss
        assert error(in_blocks[1], gradient) <= 1e-6 * largest(gradient)


def temporary_arrays(rows, classes, **keywords):
    """Temporary memory of value and gradient, in arrays of the logits' size."""
    z = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    memory = value_and_grad.lower(z, z, LDRLDConfig(), **keywords).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * rows * classes)


@pytest.mark.parametrize(("rows", "classes"), [(256, 1000), (64, 21841)])
def test_temporary_memory_is_below_two_arrays(rows, classes):
    assert temporary_arrays(rows, classes) < 2


def test_at_vocabulary_scale_blocks_leave_one_array():
    assert temporary_arrays(2048, 262144, block_rows=16) < 1.1


@pytest.mark.parametrize(("axis_type", "classes"), [(AxisType.Auto, 1003), (AxisType.Explicit, 100)])
def test_batch_sharded_logits_are_not_gathered(classes, axis_type, rng):
    """Compiles plain jit over a mesh, as the trainer calls it: four numbers alone travel."""
    teacher, student = logits(rng, 16, classes)
    cfg = LDRLDConfig()
    expected, expected_gradient = value_and_grad(teacher, student, cfg)

    @jax.jit
    def parts_and_grad(teacher, student, where):
        def loss_and_parts(student):
            labels = jnp.zeros(student.shape[:-1], int)
            parts = ldrld_jax.METHODS["ldrld"].parts(teacher, student, labels, cfg, where=where)
            return sum(parts.values()), parts

        return jax.value_and_grad(loss_and_parts, has_aux=True)(student)

    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(axis_type,))):
        sharded = [jax.device_put(z, BATCH) for z in (teacher, student, jnp.ones(16, bool))]
        compiled = parts_and_grad.lower(*sharded).compile()
        (loss, _), gradient = compiled(*sharded)
    moved = transfers(compiled)
    assert moved, "the mean is over all devices"
    for kind, shapes in moved:
        assert kind == "all-reduce" and set(shapes) == {(), (3,)}  # the number of rows, and the sums of the parts
    assert gradient.sharding.spec == BATCH or gradient.sharding.spec == P("data", None)
    assert error(loss, expected) <= 1e-6 * expected
    assert error(gradient, expected_gradient) <= 1e-6 * largest(expected_gradient)


# 24: a shard of 6 holds fewer than d + 1 = 8.
@pytest.mark.parametrize(
    ("inside", "classes"), [(False, 1000), (True, 24)], ids=["gradient outside", "gradient inside"]
)
def test_sharded_classes_are_not_gathered(inside, classes, rng):
    """Logits as a tensor-parallel head leaves them, batch over 2 devices and classes over 4."""
    teacher, student = logits(rng, 8, classes)
    student = jnp.round(student, 1)  # ties across shards
    where = jnp.asarray(rng.random(8) < 0.7)
    cfg = LDRLDConfig()
    devices = mesh(2, 4)

    def loss(teacher, student, where):
        return ldrld_loss(teacher, student, cfg, where=where, axis_name="data", class_axis_name="model")

    def sharded(function, out_specs):
        specs = (BATCH_AND_CLASSES, BATCH_AND_CLASSES, BATCH)
        return jax.shard_map(function, mesh=devices, in_specs=specs, out_specs=out_specs)

    if inside:
        function = jax.jit(sharded(jax.value_and_grad(loss, 1), (P(), BATCH_AND_CLASSES)))
    else:
        function = jax.jit(jax.value_and_grad(sharded(loss, P()), 1))

    def run(dtype):
        rows = [jax.device_put(z.astype(dtype), NamedSharding(devices, BATCH_AND_CLASSES)) for z in (teacher, student)]
        arguments = *rows, jax.device_put(where, NamedSharding(devices, BATCH))
        compiled = function.lower(*arguments).compile()
        return compiled(*arguments), transfers(compiled)

    expected = value_and_grad(teacher, student, cfg, where=where)
    single, moved = run(jnp.float32)
    with jax.enable_x64(True):
        exact = value_and_grad(teacher.astype(jnp.float64), student.astype(jnp.float64), cfg, where=where)
        for a, b in zip(run(jnp.float64)[0], exact, strict=True):
            assert error(a, b) <= 1e-10 * largest(b)
    for a, b, c in zip(single, expected, exact, strict=True):
        assert error(a, c) <= 4 * error(b, c) + 1e-6 * largest(c)
    assert single[1].sharding.spec == BATCH_AND_CLASSES

    for kind, shapes in moved:
        assert kind == "all-reduce"
        # What travels: 4 shards' candidates, at most d + 1 of each, for the 4 rows of a device, and sums.
        assert all(np.prod(shape) <= 4 * 4 * 8 for shape in shapes), shapes


def test_too_deep_for_all_shards_together_is_refused():
    devices = mesh(1, 8)
    loss = jax.shard_map(
        lambda z: ldrld_loss(z, z, LDRLDConfig(depth=17), class_axis_name="model"),
        mesh=devices,
        in_specs=BATCH_AND_CLASSES,
        out_specs=P(),
    )
    with pytest.raises(ValueError, match=r"number of classes \(16\), got 17"):
        loss(jnp.zeros((2, 16)))

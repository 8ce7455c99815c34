"""The Pallas kernels, interpreted: against the official numbers, the plain version in float64 and the XLA path."""

import contextlib
import functools
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ldrld_jax
from ldrld_jax import LDRLDConfig, ldrld_loss, ldrld_terms
from ldrld_jax.aot import hlo
from ldrld_jax.losses import ldrld
from ldrld_jax.losses.ldrld import parts_of_terms
from ldrld_jax.losses.ldrld_fused import ldrld_terms as fused_terms
from ldrld_jax.losses.ldrld_kernel import row_sums_gpu, row_sums_tpu
from tests.losses import ldrld_reference

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/ldrld_official.npz")
CFG = LDRLDConfig(depth=4)
# Blocks of 128 classes: one pass for up to as many, several for more.
KERNELS = {
    "tpu": functools.partial(row_sums_tpu, interpret=True, block_classes=128),
    "gpu": functools.partial(row_sums_gpu, interpret=True, block_classes=128),
}
KERNEL = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
pallas_loss = functools.partial(ldrld_loss, implementation="pallas")


def logits(rng, *shape, scale=3.0, dtype=np.float32):
    """A teacher and a student that agree about as much as trained ones do."""
    teacher = rng.normal(size=shape) * scale
    return tuple(jnp.asarray(z, dtype) for z in (teacher, teacher + rng.normal(size=shape) * scale))


def error(a, b):
    """The max-norm relative error of a against b, which may be 0."""
    a, b = (np.asarray(z, np.float64) for z in (a, b))
    return np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-6)


# The file's time is that of compilation, and what is compiled runs once.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnames=("cfg", "kernel"))
def terms_and_grads(teacher, student, cfg, kernel=None, where=None):
    """The terms `[3, N]` and the gradient of each one's sum `[3, N, C]`: of a kernel, the XLA path or the plain one."""

    def terms_of(student):
        if kernel is None:
            return jnp.stack(ldrld_reference.ldrld_terms(teacher, student, cfg))
        if kernel == "xla":
            return jnp.stack(ldrld_terms(teacher, student, cfg, implementation="xla"))
        return jnp.stack(fused_terms(teacher, student, cfg, where=where, kernel=kernel))

    terms, pull_back = jax.vjp(terms_of, student)
    one_part = jnp.repeat(jnp.eye(3, dtype=terms.dtype)[:, :, None], terms.shape[1], axis=2)
    return terms, jax.vmap(lambda part: pull_back(part)[0])(one_part)


def assert_close_to_plain(teacher, student, cfg, kernel):
    """2e-5 of the largest entry of each term and of each gradient, against the plain version in float64.

    The second summand is the rounding of T^2 times a KL, a difference of numbers near 1; it matters to the smallest.
    """
    ours = terms_and_grads(teacher, student, cfg, kernel)
    with jax.enable_x64(True):
        double = (jnp.asarray(np.asarray(z), jnp.float64) for z in (teacher, student))
        exact = jax.tree.map(np.asarray, terms_and_grads(*double, cfg))
    for a, b, factor in zip(ours, exact, (cfg.temperature**2, cfg.temperature), strict=True):
        for part in range(3):
            difference = np.max(np.abs(np.asarray(a[part], np.float64) - b[part]))
            assert difference <= 2e-5 * np.max(np.abs(b[part])) + factor * 5e-7, part


@KERNEL
@pytest.mark.parametrize("case", range(5))
def test_value_and_gradient_are_the_official_codes(case, kernel, strict_dtypes):
    get = lambda key: GOLDEN[f"{case}/{key}"]  # noqa: E731
    depth, temperature, alpha, beta = get("params")
    cfg = LDRLDConfig(depth=depth, temperature=temperature, alpha=alpha, beta=beta)
    teacher, student = (jnp.asarray(get(side), jnp.float32) for side in ("teacher", "student"))

    @compiled
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def loss_and_parts(teacher, student):
        parts = parts_of_terms(fused_terms(teacher, student, cfg, kernel=kernel), cfg)
        return sum(parts.values()), parts

    (loss, parts), gradient = loss_and_parts(teacher, student)
    assert loss.dtype == gradient.dtype == jnp.float32
    assert error(loss, get("loss")) < 2e-5
    assert error(gradient, get("grad")) < 2e-5
    assert error((parts["pairs"] + parts["integrity"]) / cfg.alpha, get("local")) < 2e-5
    assert error(parts["remainder"] / cfg.beta, get("rntk")) < 2e-5


# (rows, classes, depth): d = 2 and one class beyond d; d = C; more rows than one block, and a last block of 3 classes.
SHAPES = [(1, 3, 2), (5, 7, 7), (130, 131, 3)]


@hypothesis.settings(
    max_examples=24, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate]
)
@hypothesis.given(
    kernel=st.sampled_from(list(KERNELS.values())),
    shape=st.sampled_from(SHAPES),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    ties=st.sampled_from([0.0, 0.5, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_term_and_its_gradient_are_the_plain_versions(kernel, shape, scale, ties, seed):
    rows, classes, depth = shape
    teacher, student = logits(np.random.default_rng(seed), rows, classes)
    if ties:  # steps of a size that makes few or most logits of a row equal
        teacher, student = (jnp.round(z / ties) * ties for z in (teacher, student))
    assert_close_to_plain(teacher * scale, student * scale, LDRLDConfig(depth=depth), kernel)


@KERNEL
def test_every_field_of_the_config_counts(kernel, rng):
    """Tests a depth of 9, which is more than the rows of a TPU's register."""
    cfg = LDRLDConfig(depth=9, rank_by="teacher", temperature=1.5, use_erd=False, irw_epsilon=0.5)
    assert_close_to_plain(*logits(rng, 4, 20), cfg, kernel)


@KERNEL
def test_logits_far_from_zero_and_far_apart_keep_their_digits(kernel, rng):
    teacher, student = logits(rng, 4, 300)
    ours = terms_and_grads(teacher, jnp.round(student * 256) / 256 + 8192, CFG, kernel)
    shifted_back = terms_and_grads(teacher, jnp.round(student * 256) / 256, CFG, kernel)
    for a, b in zip(ours, shifted_back, strict=True):
        assert error(a, b) < 2e-6
    terms, gradients = terms_and_grads(teacher * 1e4, student * 1e4, CFG, kernel)
    assert np.all(np.isfinite(terms))
    assert np.all(np.isfinite(gradients))


@KERNEL
def test_of_equal_logits_the_lower_class_comes_first_in_every_block(kernel):
    row = np.zeros(400, np.float32)
    row[[399, 130, 5, 300, 200]] = 1, 1, 1, 2, 1
    student = jnp.asarray(np.stack([row, np.zeros(400, np.float32), np.arange(400, dtype=np.float32)]))
    sums = compiled(kernel, static_argnums=2)(student, student, CFG)
    np.testing.assert_array_equal(sums.classes.T, [[300, 5, 130, 200], [0, 1, 2, 3], [399, 398, 397, 396]])
    np.testing.assert_array_equal(sums.terms, np.zeros((3, 3)))


@KERNEL
@pytest.mark.parametrize(("rank_by", "classes"), [("student", 300), ("teacher", 20)])
def test_minus_infinity_is_what_it_is_to_the_xla_path(rank_by, classes, kernel, rng):
    cfg = LDRLDConfig(depth=4, rank_by=rank_by)
    for place in (np.s_[:, 2:], np.s_[:, 1:], np.s_[0], np.s_[:, ::3]):
        for sides in ((0, 1), (0,), (1,)):
            rows = [np.array(z) for z in logits(rng, 4, classes)]
            for side in sides:
                rows[side][place] = -np.inf
            rows = [jnp.asarray(z) for z in rows]
            for a, b in zip(terms_and_grads(*rows, cfg, kernel), terms_and_grads(*rows, cfg, "xla"), strict=True):
                assert np.all(np.isfinite(a))
                for part in range(3):
                    assert error(a[part], b[part]) < 2e-5, (place, sides, part)


@KERNEL
def test_rows_left_out_may_hold_nan(kernel, rng):
    teacher, student = logits(rng, 4, 300)
    where = jnp.asarray([True, False, True, True])
    dirty = (jnp.where(where[:, None], z, jnp.nan) for z in (teacher, student))
    terms, gradients = terms_and_grads(*dirty, CFG, kernel, where)
    expected, expected_gradients = terms_and_grads(teacher, student, CFG, kernel)
    np.testing.assert_array_equal(terms, jnp.where(where, expected, 0))
    np.testing.assert_allclose(gradients, jnp.where(where[:, None], expected_gradients, 0), rtol=1e-6)
    # A row that is kept passes its NaN on.
    assert np.all(np.isnan(terms_and_grads(teacher.at[2, 9].set(jnp.nan), student, CFG, kernel)[0][2, 2]))


def test_forward_mode_and_second_derivatives(rng):
    teacher, student, direction = *logits(rng, 3, 20), logits(rng, 3, 20)[0]
    cfg = LDRLDConfig(depth=3)

    def loss(terms, student):
        return sum(parts_of_terms(terms(teacher, student, cfg), cfg).values())

    @functools.partial(compiled, static_argnums=0)
    def derivatives(terms, student):
        value, slope = jax.jvp(functools.partial(loss, terms), (student,), (direction,))
        gradient = jax.grad(loss, 1)
        return value, slope, gradient(terms, student), jax.jvp(lambda s: gradient(terms, s), (student,), (direction,))

    ours = derivatives(functools.partial(ldrld_terms, implementation="pallas"), student)
    plain = derivatives(ldrld_reference.ldrld_terms, student)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert error(a, b) < 2e-5


def test_reverse_mode_keeps_the_logits_and_numbers_of_each_row(rng):
    teacher, student = logits(rng, 8, 100)
    _, pull_back = jax.vjp(lambda s: jnp.stack(ldrld_terms(teacher, s, CFG, implementation="pallas")), student)
    large = [z for z in jax.tree.leaves(pull_back) if z.size >= student.size]
    assert [(z.shape, z.dtype) for z in large] == [((8, 100), jnp.float32)] * 2


@KERNEL
def test_bfloat16_is_raised_inside(kernel, rng, strict_dtypes):
    half = logits(rng, 4, 20, dtype=jnp.bfloat16)
    terms, gradients = terms_and_grads(*half, CFG, kernel)
    exact, exact_gradients = terms_and_grads(*(z.astype(jnp.float32) for z in half), CFG, kernel)
    assert (terms.dtype, gradients.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(terms, exact)
    np.testing.assert_array_equal(gradients, exact_gradients.astype(jnp.bfloat16))


# What follows goes through the public functions, interpreted by what a CPU takes.


def uncompiled_both(teacher, student, cfg, **keywords):
    """Value and gradient of both implementations."""
    return [
        jax.value_and_grad(functools.partial(ldrld_loss, implementation=name, **keywords), 1)(teacher, student, cfg)
        for name in ("pallas", "xla")
    ]


both = compiled(uncompiled_both, static_argnames="block_rows")


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) < 2e-6


def test_masks_weights_leading_axes_and_blocks_agree_with_the_xla_path(rng, strict_dtypes):
    teacher, student = logits(rng, 2, 5, 30)
    where, weights = jnp.asarray(rng.random((2, 5)) < 0.7), jnp.asarray(rng.random((2, 5)), jnp.float32)
    keywords = dict(weights=weights, block_rows=5)
    assert_same(*both(teacher, student, CFG, where=where, **keywords))
    (loss, gradient), _ = both(teacher, student, CFG, where=jnp.zeros_like(where), **keywords)
    assert loss == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 5, 30)))


def test_no_rows_at_all_give_zero():
    for loss, gradient in both(jnp.zeros((0, 30)), jnp.zeros((0, 30)), CFG):
        assert loss == 0
        assert gradient.shape == (0, 30)


def test_vmap_and_scan_agree_with_the_xla_path(rng):
    """Over any axis and over one side alone, of single rows."""

    @compiled
    def over_rows(teachers, students):
        def of_one_teacher(rows):
            teacher, students = rows
            return jax.vmap(lambda s: uncompiled_both(teacher, s, CFG), in_axes=1)(students.T)

        return jax.lax.map(of_one_teacher, (teachers, students))

    teacher, student = logits(rng, 3, 4, 30)
    assert_same(*over_rows(teacher[:, 0], student))


@pytest.mark.parametrize("inside", [False, True], ids=["gradient outside", "gradient inside"])
def test_batch_sharded_rows_in_a_shard_map(inside, rng):
    teacher, student = logits(rng, 16, 100)
    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, cfg = P("data"), LDRLDConfig(depth=2)

    def loss(teacher, student):
        return pallas_loss(teacher, student, cfg, axis_name="data")

    if inside:
        function = jax.shard_map(
            jax.value_and_grad(loss, 1), mesh=devices, in_specs=(rows, rows), out_specs=(P(), rows)
        )
    else:
        function = jax.value_and_grad(jax.shard_map(loss, mesh=devices, in_specs=(rows, rows), out_specs=P()), 1)
    expected = compiled(jax.value_and_grad(ldrld_loss, 1))(teacher, student, cfg)
    assert_same(compiled(function)(teacher, student), expected)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.12 on
def test_one_program_is_exported_for_three_platforms(rng):
    teacher, student = logits(rng, 8, 100)
    cfg = LDRLDConfig(depth=2)
    function = jax.jit(lambda t, s: jax.value_and_grad(pallas_loss, 1)(t, s, cfg))
    exported = jax.export.export(
        function,
        platforms=("cpu", "cuda", "tpu"),
        # JAX promises no stability of Triton's code, which is then compiled by the same version only.
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )(teacher, student)
    again = jax.export.deserialize(exported.serialize())
    for target in ("__gpu$xla.gpu.triton", "tpu_custom_call"):
        assert again.mlir_module().count(f"@{target}(") == 1
    assert_same(again.call(teacher, student), compiled(jax.value_and_grad(ldrld_loss, 1))(teacher, student, cfg))


@pytest.mark.parametrize(
    ("sizes", "spec", "axis_type", "rows"),
    [((8,), P("data"), AxisType.Auto, 16), ((4, 2), P("data"), AxisType.Explicit, 16), ((8,), P(), AxisType.Auto, 3)],
    ids=["by rows", "by rows over some axes, in the types", "copied, and too few rows"],
)
def test_under_jit_no_logits_travel(sizes, spec, axis_type, rows, rng):
    """Runs the kernel on each device's share of the rows; scalars, or numbers of each row, travel.

    Where all devices hold all rows, the gradient travels once, as all of them get all of it.
    """
    teacher, student = logits(rng, rows, 100)
    where, cfg = jnp.asarray(rng.random(rows) < 0.8), LDRLDConfig(depth=2)
    devices = jax.make_mesh(sizes, ("data", "model")[: len(sizes)], axis_types=(axis_type,) * len(sizes))

    def value_and_gradient(teacher, student, where, implementation):
        loss = functools.partial(ldrld_loss, teacher, cfg=cfg, where=where, implementation=implementation)
        return jax.value_and_grad(loss)(student)

    function = compiled(value_and_gradient, static_argnames="implementation")
    expected = function(teacher, student, where, "xla")
    with jax.set_mesh(devices) if axis_type == AxisType.Explicit else contextlib.nullcontext():
        placed = [jax.device_put(z, NamedSharding(devices, spec)) for z in (teacher, student, where)]
        program = function.lower(*placed, "pallas").compile()
        loss, gradient = program(*placed)
    assert error(loss, expected[0]) < 1e-6
    assert error(gradient, expected[1]) < 1e-6
    if spec == P():
        (moved,) = hlo.CompiledText(program.as_text()).collectives
        assert (moved.kind, moved.bytes) == ("all-reduce", student.nbytes + 4 * 4)  # sums of 3 parts, and the rows
    else:
        most = 0 if len(sizes) == 1 else 4 * rows * (3 * cfg.depth + 3 + 2 + 2)
        assert gradient.sharding.spec[0] == "data"
        for moved in hlo.CompiledText(program.as_text()).collectives:
            assert moved.bytes <= (6 * 4 if moved.kind == "all-reduce" else most)


def test_none_takes_the_kernel_where_it_is_proven(rng, monkeypatch):
    teacher, student = logits(rng, 8, 10)
    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def calls_kernel(implementation, sharded):
        def terms(teacher, student):
            return jnp.stack(ldrld_terms(teacher, student, CFG, implementation=implementation))

        if sharded:
            terms = jax.shard_map(terms, mesh=devices, in_specs=(P("data"), P("data")), out_specs=P(None, "data"))
        return "ldrld_row_sums" in str(jax.make_jaxpr(terms)(teacher, student))

    assert not ldrld.PROVEN_DEVICES
    assert [calls_kernel(name, sharded=True) for name in (None, "xla", "pallas")] == [False, False, True]
    monkeypatch.setitem(ldrld.PROVEN_DEVICES, jax.devices()[0].device_kind, "the date, the version")
    assert [calls_kernel(name, sharded=True) for name in (None, "xla", "pallas")] == [True, False, True]
    assert [calls_kernel(name, sharded=False) for name in (None, "xla", "pallas")] == [True, False, True]


def test_what_the_kernel_cannot_do_is_said(x64):
    z = jnp.zeros((2, 10), jnp.float32)
    with pytest.raises(ValueError, match="whole rows of classes"):
        ldrld_terms(z, z, CFG, implementation="pallas", class_axis_name="model")
    with pytest.raises(ValueError, match="float32 and less, got float64"):
        ldrld_jax.ldrld_loss(z.astype(jnp.float64), z, CFG, implementation="pallas")
    with pytest.raises(ValueError, match="implementation must be None"):
        ldrld_loss(z, z, CFG, implementation="triton")
    with pytest.raises(ValueError, match=r"number of classes \(10\), got 11"):
        ldrld_loss(z, z, LDRLDConfig(depth=11), implementation="pallas")

"""LDRLD against the official code's numbers, against the formula in NumPy, and its properties."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ldrld_jax
from ldrld_jax import LDRLDConfig, ldrld_loss, ldrld_terms, rank_weights
from ldrld_jax.losses import METHODS, ldrld_parts

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/ldrld_official.npz")
CASES = range(5)
# Most tests share a config and two shapes, so that they share compiled functions too.
CFG = LDRLDConfig(depth=4)
SMALL, WIDE = (6, 20), (6, 211)  # WIDE: the largest are found by blocks, the last one not full
value_and_grad = jax.jit(jax.value_and_grad(ldrld_loss, argnums=1))  # a config passes through jit as an argument


@jax.jit
def parts_and_grad(teacher, student, cfg):
    """The loss, its parts and its gradient."""

    def loss_and_parts(student):
        parts = ldrld_parts(teacher, student, cfg)
        return sum(parts.values()), parts

    (loss, parts), gradient = jax.value_and_grad(loss_and_parts, has_aux=True)(student)
    return loss, parts, gradient


@jax.jit
def terms_and_grads(teacher, student, cfg):
    """The three terms `[3, N]` and the gradient of each one's sum `[3, N, C]`."""
    terms, pull_back = jax.vjp(lambda s: jnp.stack(ldrld_terms(teacher, s, cfg)), student)
    one_part = jnp.repeat(jnp.eye(3, dtype=terms.dtype)[:, :, None], terms.shape[1], axis=2)
    return terms, jax.vmap(lambda part: pull_back(part)[0])(one_part)


def logits(rng, *shape, scale=3.0, dtype=np.float64):
    """A teacher and a student that agree about as much as trained ones do."""
    teacher = rng.normal(size=shape) * scale
    return jnp.asarray(teacher, dtype), jnp.asarray(teacher + rng.normal(size=shape) * scale, dtype)


def relative(a, b):
    """The max-norm relative error of a against b."""
    return np.max(np.abs(np.asarray(a, np.float64) - b)) / np.max(np.abs(b))


def golden(case, dtype):
    get = lambda key: GOLDEN[f"{case}/{key}"]  # noqa: E731
    depth, temperature, alpha, beta = get("params")
    cfg = LDRLDConfig(depth=depth, temperature=temperature, alpha=alpha, beta=beta)
    return jnp.asarray(get("teacher"), dtype), jnp.asarray(get("student"), dtype), cfg, get


def numpy_terms(teacher, student, cfg):
    """The three terms `[N]` and their gradients `[N, C]`, from the formulas, in float64, loop by loop."""
    teacher, student = np.asarray(teacher, np.float64), np.asarray(student, np.float64)
    values, gradients = np.zeros((3, len(student))), np.zeros((3, *student.shape))

    def add(part, row, classes, weight):
        log_p, log_q = (z[row, classes] / cfg.temperature for z in (teacher, student))
        log_p, log_q = (z - z.max() - np.log(np.sum(np.exp(z - z.max()))) for z in (log_p, log_q))
        p, q = np.exp(log_p), np.exp(log_q)
        values[part, row] += weight * cfg.temperature**2 * np.sum(p * (log_p - log_q))
        gradients[part, row, classes] += weight * cfg.temperature * (q - p)

    for row in range(len(student)):
        ranking = (teacher if cfg.rank_by == "teacher" else student)[row]
        order = np.argsort(-ranking, kind="stable")
        for j in range(2, cfg.depth + 1):
            for i in range(1, j):
                irw = 1 / (abs(i - j) + cfg.irw_epsilon) if cfg.use_irw else 1
                erd = cfg.erd_scale * np.exp(-cfg.erd_decay * (i + j)) if cfg.use_erd else 1
                add(0, row, order[[i - 1, j - 1]], irw * erd)
        add(1, row, order[: cfg.depth], 1)
        if cfg.depth < student.shape[1]:
            add(2, row, order[cfg.depth :], 1)
    return values, gradients


def numpy_loss(teacher, student, cfg):
    """The loss and its gradient, from the formula in float64."""
    values, gradients = numpy_terms(teacher, student, cfg)
    divisor = cfg.depth * (cfg.depth - 1) / 2 + 1 if cfg.pair_reduction == "mean" else 1
    integrity = cfg.alpha / divisor * cfg.use_integrity
    if cfg.depth == 2 and cfg.pair_reduction == "mean":
        integrity *= float(cfg.erd_scale * np.exp(-3 * cfg.erd_decay) / (1 + cfg.irw_epsilon))
    weights = np.array([cfg.alpha / divisor, integrity, cfg.beta * cfg.use_remainder])
    return weights @ values.mean(1), np.tensordot(weights, gradients, 1) / len(student)


@pytest.mark.parametrize("case", CASES)
def test_value_parts_and_gradient_are_the_official_codes_in_float64(case, x64, strict_dtypes):
    teacher, student, cfg, get = golden(case, jnp.float64)
    loss, parts, gradient = parts_and_grad(teacher, student, cfg)
    assert loss.dtype == gradient.dtype == jnp.float64
    assert relative(loss, get("loss")) < 1e-12
    assert relative(gradient, get("grad")) < 1e-12
    assert set(parts) == {"pairs", "integrity", "remainder"}
    assert relative((parts["pairs"] + parts["integrity"]) / cfg.alpha, get("local")) < 1e-12
    assert relative(parts["remainder"] / cfg.beta, get("rntk")) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_the_official_codes_in_float32(case, strict_dtypes):
    teacher, student, cfg, get = golden(case, jnp.float32)
    loss, gradient = value_and_grad(teacher, student, cfg)
    assert loss.dtype == gradient.dtype == jnp.float32
    assert relative(loss, get("loss")) < 2e-5
    assert relative(gradient, get("grad")) < 2e-5


def test_the_method_table_gives_the_same_loss(x64):
    teacher, student, cfg, get = golden(1, jnp.float64)
    loss = ldrld_jax.METHODS["ldrld"].loss(teacher, student, jnp.asarray(get("labels")), cfg)
    assert relative(loss, get("loss")) < 1e-12


def test_the_same_without_jit_under_vmap_and_over_any_leading_axes(x64):
    teacher, student, cfg, get = golden(1, jnp.float64)  # [8, 100]
    assert relative(ldrld_loss(teacher, student, cfg), get("loss")) < 1e-12
    loss = jax.vmap(lambda t, s: ldrld_loss(t, s, cfg))(teacher, student)
    assert relative(jnp.mean(loss), get("loss")) < 1e-12
    folded = [z.reshape(2, 1, 4, 100) for z in (teacher, student)]
    loss, gradient = value_and_grad(*folded, cfg)
    assert relative(loss, get("loss")) < 1e-12
    assert relative(gradient.reshape(8, 100), get("grad")) < 1e-12
    assert ldrld_terms(*folded, cfg).pairs.shape == (2, 1, 4)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_the_same_inside_pmap_over_eight_devices(x64):
    teacher, student, cfg, get = golden(1, jnp.float64)
    loss = jax.pmap(lambda t, s: ldrld_loss(t, s, cfg, axis_name="batch"), axis_name="batch")
    chex.assert_trees_all_close(loss(teacher[:, None], student[:, None]), np.full(8, get("loss")), rtol=1e-12)


def test_the_same_under_shard_map_over_eight_devices(x64):
    teacher, student, cfg, get = golden(1, jnp.float64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data = P("data")
    loss = jax.shard_map(
        lambda t, s: ldrld_loss(t, s, cfg, axis_name="data"), mesh=mesh, in_specs=(data, data), out_specs=P()
    )
    loss, gradient = jax.jit(jax.value_and_grad(loss, argnums=1))(teacher, student)
    assert relative(loss, get("loss")) < 1e-12
    assert relative(gradient, get("grad")) < 1e-12


def test_without_axis_name_the_mean_is_local(x64):
    teacher, student, cfg, get = golden(1, jnp.float64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data = P("data")
    loss = jax.shard_map(lambda t, s: ldrld_loss(t, s, cfg)[None], mesh=mesh, in_specs=(data, data), out_specs=data)
    local = jax.jit(loss)(teacher, student)
    assert local.shape == (8,)
    assert relative(local[3], ldrld_loss(teacher[3:4], student[3:4], cfg)) < 1e-12
    assert relative(jnp.mean(local), get("loss")) < 1e-12


CONFIGS = {
    "defaults": {},
    "teacher ranks": dict(rank_by="teacher"),
    "sum": dict(pair_reduction="sum"),
    "no irw": dict(use_irw=False),
    "no erd": dict(use_erd=False),
    "no integrity": dict(use_integrity=False),
    "no remainder": dict(use_remainder=False),
    "no alpha": dict(alpha=0),
    "no beta": dict(beta=0),
    "alpha alone": dict(alpha=1, beta=0, use_integrity=False, pair_reduction="sum"),
    "beta alone": dict(alpha=0, beta=1),
    "other constants": dict(temperature=1.5, irw_epsilon=0.5, erd_scale=3, erd_decay=0.2, alpha=2, beta=0.3),
    "two": dict(depth=2),
    "two, sum": dict(depth=2, pair_reduction="sum"),
    "all but one": dict(classes=5),
    "all": dict(classes=4),
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
def test_value_and_gradient_follow_the_formula(fields, rng, x64):
    fields = {"depth": 4, "classes": 20, **fields}
    teacher, student = logits(rng, 6, fields.pop("classes"))
    cfg = LDRLDConfig(**fields)
    expected, expected_gradient = numpy_loss(teacher, student, cfg)
    loss, parts, gradient = parts_and_grad(teacher, student, cfg)
    assert relative(loss, expected) < 1e-12
    assert relative(gradient, expected_gradient) < 1e-12
    assert ("integrity" in parts, "remainder" in parts) == (cfg.use_integrity, cfg.use_remainder)


@pytest.mark.parametrize(("shape", "rank_by"), [(SMALL, "student"), (WIDE, "student"), (WIDE, "teacher")])
def test_the_terms_follow_the_formula(shape, rank_by, rng, x64):
    cfg = LDRLDConfig(depth=4, rank_by=rank_by)
    teacher, student = logits(rng, *shape)
    values, gradients = numpy_terms(teacher, student, cfg)
    terms, our_gradients = terms_and_grads(teacher, student, cfg)
    np.testing.assert_allclose(terms, values, rtol=1e-11)
    for ours, gradient in zip(our_gradients, gradients, strict=True):
        assert relative(ours, gradient) < 1e-12


def test_weights_of_depth_seven():
    weights = np.asarray(rank_weights(LDRLDConfig(depth=7)))
    published = {(1, 2): 0.6886, (1, 3): 0.4678, (2, 3): 0.6230, (1, 7): 0.1788, (6, 7): 0.4176}
    for (i, j), weight in published.items():
        assert weights[i - 1, j - 1] == pytest.approx(weight, abs=5e-5)
    assert weights.sum() == pytest.approx(7.7237, abs=5e-5)
    assert np.all(np.tril(weights) == 0)


def test_weights_without_a_factor():
    assert np.all(np.triu(rank_weights(LDRLDConfig(use_irw=False, use_erd=False)), 1) == np.triu(np.ones((7, 7)), 1))
    irw = rank_weights(LDRLDConfig(use_erd=False, erd_scale=9))
    np.testing.assert_allclose(irw[0, 2], 1 / 3.5, rtol=1e-6)  # delta belongs to ERD
    erd = rank_weights(LDRLDConfig(use_irw=False))
    np.testing.assert_allclose(erd[0, 2], 2 * np.exp(-0.2), rtol=1e-6)


@pytest.mark.parametrize("shifted_side", [0, 1])
def test_a_shift_of_an_examples_logits_changes_nothing(shifted_side, rng, x64):
    sides = logits(rng, *SMALL)
    shifted = list(sides)
    shifted[shifted_side] = shifted[shifted_side] + 100 * rng.normal(size=(6, 1))
    loss, gradient = value_and_grad(*sides, CFG)
    shifted_loss, shifted_gradient = value_and_grad(*shifted, CFG)
    assert relative(shifted_loss, loss) < 1e-12
    assert relative(shifted_gradient, gradient) < 1e-12


@pytest.mark.parametrize("shape", [SMALL, WIDE])
def test_a_permutation_of_the_classes_permutes_the_gradient_alone(shape, rng, x64):
    teacher, student = logits(rng, *shape)
    order = rng.permutation(shape[1])
    loss, gradient = value_and_grad(teacher, student, CFG)
    permuted_loss, permuted_gradient = value_and_grad(teacher[:, order], student[:, order], CFG)
    assert relative(permuted_loss, loss) < 1e-12
    assert relative(permuted_gradient, gradient[:, order]) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_equal_logits_on_both_sides_give_nothing(dtype, bound, rng, x64):
    teacher, _ = logits(rng, *WIDE, dtype=dtype)
    loss, gradient = value_and_grad(teacher, teacher, CFG)
    assert abs(loss) < bound
    assert np.max(np.abs(gradient)) < bound


def test_the_gradient_of_each_part_sums_to_zero_over_the_classes(rng, x64):
    _, gradients = terms_and_grads(*logits(rng, *SMALL), CFG)
    assert np.all(np.max(np.abs(gradients), axis=(1, 2)) > 0.1)
    assert np.max(np.abs(np.sum(gradients, axis=-1))) < 1e-13


def test_no_gradient_flows_into_the_teacher(rng, x64):
    teacher, student = logits(rng, *SMALL)
    for rank_by in ("student", "teacher"):
        cfg = LDRLDConfig(rank_by=rank_by, depth=2)
        assert np.all(jax.jit(jax.grad(ldrld_loss))(teacher, student, cfg) == 0)


@pytest.mark.parametrize("depth", [5, 6])
def test_a_remainder_of_one_class_or_none_is_zero(depth, rng):
    terms, gradients = terms_and_grads(*logits(rng, 6, 6, dtype=np.float32), LDRLDConfig(depth=depth))
    assert np.all(terms[2] == 0)
    assert np.all(gradients[2] == 0)
    assert np.all(np.isfinite(gradients))


def test_ties_go_to_the_lower_class(rng, x64):
    # In WIDE the tied ones lie in different blocks, ahead of and behind the boundary of the d chosen.
    for shape in (SMALL, WIDE):
        student = jnp.asarray(np.round(rng.normal(size=shape)))
        teacher = jnp.asarray(rng.normal(size=shape))
        expected, expected_gradient = numpy_loss(teacher, student, CFG)
        loss, gradient = value_and_grad(teacher, student, CFG)
        assert relative(loss, expected) < 1e-12
        assert relative(gradient, expected_gradient) < 1e-12


def test_ties_in_any_order_are_worth_the_same_if_the_teacher_ties_too(rng, x64):
    teacher, student = (np.array(z) for z in logits(rng, *SMALL))
    student[:, [4, 9]] = student.max(1, keepdims=True) + 1
    teacher[:, [4, 9]] = 1.5
    swapped = np.arange(20)
    swapped[[4, 9]] = 9, 4
    loss, _ = value_and_grad(jnp.asarray(teacher), jnp.asarray(student), CFG)
    other, _ = value_and_grad(jnp.asarray(teacher[:, swapped]), jnp.asarray(student[:, swapped]), CFG)
    assert relative(other, loss) < 1e-14


def test_a_mask_keeps_nan_out_of_value_and_gradient(rng, x64):
    teacher, student = logits(rng, 2, 3, 20)
    where = np.array([[True, False, True], [False, False, True]])
    expected, expected_gradient = numpy_loss(teacher[where], student[where], CFG)
    teacher, student = (jnp.where(where[..., None], z, jnp.nan) for z in (teacher, student))
    loss, gradient = value_and_grad(teacher, student, CFG, where=where)
    assert relative(loss, expected) < 1e-12
    assert relative(gradient[where], expected_gradient) < 1e-12
    assert np.all(gradient[~where] == 0)
    assert all(np.all(term[~where] == 0) for term in ldrld_terms(teacher, student, CFG, where=where))


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_kept_row_makes_the_loss_nan(side, rng):
    for place in (0, 100, 210):
        sides = [np.array(z) for z in logits(rng, *WIDE, dtype=np.float32)]
        sides[side][1, place] = np.nan
        loss, _ = value_and_grad(*map(jnp.asarray, sides), CFG)
        assert np.isnan(loss)


def test_an_empty_mask_gives_zero(rng):
    teacher, student = logits(rng, *SMALL, dtype=np.float32)
    loss, gradient = value_and_grad(teacher, student * jnp.nan, CFG, where=jnp.zeros(6, bool))
    assert loss == 0
    assert np.all(gradient == 0)


def test_an_empty_batch_gives_zero():
    empty = jnp.zeros((0, 20))
    assert ldrld_loss(empty, empty, LDRLDConfig()) == 0


def test_weights_weigh_the_mean(rng, x64):
    teacher, student = logits(rng, *SMALL)
    weights, where = rng.random(6), np.array([True, False, True, True, False, True])
    per_example = [numpy_loss(teacher[row : row + 1], student[row : row + 1], CFG)[0] for row in range(6)]
    expected = np.average(per_example, weights=weights)
    assert relative(ldrld_loss(teacher, student, CFG, weights=jnp.asarray(weights)), expected) < 1e-12
    expected = np.average(per_example, weights=weights * where)
    assert relative(ldrld_loss(teacher, student, CFG, weights=jnp.asarray(weights), where=where), expected) < 1e-12
    assert ldrld_loss(teacher, student, CFG, weights=jnp.zeros(6)) == 0


def test_a_traced_weight_multiplies_the_terms_outside(rng, x64):
    """A loop of one's own can schedule alpha so, since config fields cannot be traced; a run has `loss_schedule`."""
    teacher, student = logits(rng, *SMALL)
    cfg = LDRLDConfig(depth=4, alpha=3, beta=2, pair_reduction="sum")

    @jax.jit
    def scheduled(alpha):
        terms = ldrld_terms(teacher, student, cfg)
        return jnp.mean(alpha * (terms.pairs + terms.integrity) + cfg.beta * terms.remainder)

    assert relative(scheduled(3.0), numpy_loss(teacher, student, cfg)[0]) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=1), "depth must be at least 2"),
        (dict(depth=2.5), "whole number"),
        (dict(depth=float("inf")), "depth must be a whole number and not negative, got inf"),
        (dict(depth=10**400), "depth must be a number, got 1000"),
        (dict(depth=None), "depth must be a number, got None"),
        (dict(alpha=[[1], [1, 2]]), r"alpha must be a number, got \[\[1\], \[1, 2\]\]"),
        (dict(alpha=np.array("3")), r"alpha must be a number, got array"),
        (dict(depth=np.array([3])), r"depth must be a number, got array\(\[3\]\)"),
        (dict(alpha=jnp.array(True)), "alpha must be a number, got True"),
        (dict(temperature=1j), "temperature must be a number, got 1j"),
        (dict(rank_by=["student"]), r"rank_by must be one of student, teacher, got \['student'\]"),
        (dict(temperature=0), "temperature must be finite and above 0"),
        (dict(temperature=float("nan")), "temperature must be finite and above 0"),
        (dict(alpha=-1), "alpha must be finite and not negative"),
        (dict(rank_by="both"), "rank_by must be one of student, teacher"),
        (dict(pair_reduction="none"), "pair_reduction must be one of mean, sum"),
        (dict(use_irw=1), "use_irw must be True or False"),
    ],
)
def test_a_config_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LDRLDConfig(**fields)


def test_a_config_takes_the_scalars_of_numpy_and_jax_and_no_traced_ones():
    cfg = LDRLDConfig(depth=np.int64(3), temperature=jnp.float32(2), use_irw=np.False_, use_erd=jnp.array(False))
    assert cfg == LDRLDConfig(depth=3, temperature=2.0, use_irw=False, use_erd=False)
    assert hash(cfg) == hash(LDRLDConfig(depth=3, temperature=2.0, use_irw=False, use_erd=False))
    assert type(cfg.use_irw) is type(cfg.use_erd) is bool
    with pytest.raises(ValueError, match="alpha must be a plain value, got a traced array: configs are static"):
        jax.jit(lambda alpha: LDRLDConfig(alpha=alpha).alpha)(3.0)


def test_bad_arguments_are_refused():
    z = jnp.zeros((3, 10))
    cfg = LDRLDConfig(depth=4)
    for teacher, student, keywords, message in [
        (z, z[:, :4], {}, "one shape"),
        (z[:2], z, {}, "one shape"),
        (z.astype(int), z, {}, "teacher_logits must be floating, got int32. Pass logits"),
        (z, z.astype(int), {}, "student_logits must be floating"),
        (z[0, 0], z[0, 0], {}, "got a scalar"),
        (z[:, :3], z[:, :3], {}, r"number of classes \(3\), got 4. Lower loss.ldrld.depth"),
        (z, z, dict(where=jnp.ones((3, 10), bool)), "where must have the shape"),
        (z, z, dict(where=jnp.ones(3)), "where must be boolean"),
        (z, z, dict(weights=jnp.ones(2)), "weights must have the shape"),
        (z, z, dict(block_rows=0), "block_rows must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ldrld_loss(teacher, student, cfg, **keywords)
    for other in ({"depth": 4}, METHODS["kd"].config()):
        with pytest.raises(ValueError, match=f"cfg must be an LDRLDConfig, got {type(other).__name__}"):
            ldrld_loss(z, z, other)

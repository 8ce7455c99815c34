"""Properties of every method of the table: shapes, masks, weights, dtypes, errors; and what composes with each."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from ldrld_jax.losses import METHODS, MethodConfig, standardize_logits, standardized
from tests.conftest import AS_USERS
from tests.losses.rows import given, lead, loss_of_rows, parts_of_rows

NAMES = sorted(METHODS)
ENTROPY = dict(entropy_weighting=False, entropy_temperature=3.0, entropy_bound=None)
DEFAULTS = {
    "kd": dict(temperature=4.0, standardize=False, **ENTROPY),
    "dkd": dict(alpha=1.0, beta=8.0, temperature=4.0, standardize=False, **ENTROPY, top_k=0),
    "nkd": dict(temperature=3.0, gamma=3.5),
    "wsld": dict(temperature=4.0, alpha=2.25),
    "dist": dict(beta=1.0, gamma=1.0, temperature=4.0),
    "ttm": dict(gamma=0.1),
    "wttm": dict(gamma=0.2),
    "rld": dict(alpha=1.0, beta=8.0, alpha_temperature=1.0, temperature=4.0),
    "mlkd": dict(views=1),
    "ctkd": dict(),
    "abkd": dict(temperature=4.0, alpha=0.8, beta=0.3),
    "skd": dict(temperature=4.0, ridge=0.1, kl_weight=1.0, direction_weight=1.0, batch_masks=False),
    "wkd": dict(temperature=8.0, gamma=600.0, regularization=0.05, iterations=10),
    "luminet": dict(temperature=4.0, alpha=33.0),
    "crld": dict(temperature=4.0, weak_threshold=0.9, strong_threshold=0.2, within_weight=2.0, cross_weight=0.5),
    "sld": dict(student_swap=1.0, student_swap_epoch=150),
    "bild": dict(top_k=8, temperature=3.0),
    "topk_tail": dict(top_k=1, temperature=1.0, beta=1.0, tail=True),
}
BATCH = [name for name, method in METHODS.items() if not method.decomposes]
LABELLED = ["dkd", "nkd", "rld", "sld", "wkd", "wsld"]


def default(name):
    """Makes a config for five classes, with views that count."""
    fields = {"ldrld": dict(depth=3), "bild": dict(top_k=3), "crld": dict(weak_threshold=0.5)}
    return METHODS[name].config(**fields.get(name, {}))


def batch(rng, *shape, dtype=np.float64):
    """Teacher, student and labels for rows `shape`, 5 classes."""
    teacher, student = (2 * rng.normal(size=(2, *shape, 5))).astype(dtype)
    return teacher, student, rng.integers(5, size=shape)


@functools.cache
def compiled(method, cfg, as_users=False):
    of_rows = loss_of_rows(method)
    loss = lambda student, teacher, labels, rows: of_rows(teacher, student, labels, cfg, **rows)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=AS_USERS if as_users else None)


@functools.cache
def of_standard_logits(name):
    """Returns `standardized` of a method, made once so that its programs are compiled once."""
    return standardized(METHODS[name])


def evaluate(name, teacher, student, labels, standard=False, as_users=False, **rows):
    """The default loss and its gradients with respect to the student and the teacher; compiled once a shape."""
    method = of_standard_logits(name) if standard else METHODS[name]
    value, gradients = compiled(method, default(name), as_users)(student, teacher, labels, rows)
    return value, *gradients


def shapes(name, teacher, student, labels, **rows):
    """Traces value and gradient without computing them; enough for dtypes and errors."""
    of_rows = loss_of_rows(METHODS[name])
    loss = lambda s, t, y, rows: of_rows(t, s, y, default(name), **rows)  # noqa: E731
    # Not through grad for what is no float: the loss itself has to complain.
    function = jax.value_and_grad(loss) if jnp.issubdtype(student.dtype, jnp.floating) else loss
    return jax.eval_shape(function, student, teacher, labels, rows)


# Six rows, four of them kept: with weights, and compared to the four alone.
KEPT = np.array([True, False, True, True, False, True])
ONES = np.ones(6)


def six_of_four(teacher, student, labels):
    """Four rows among six; the other two hold NaN and no label."""
    rows, padded = np.full((2, 6, 5), np.nan), np.full(6, -100)
    rows[0, KEPT], rows[1, KEPT], padded[KEPT] = teacher, student, labels
    return *rows, padded


def test_the_table_has_the_published_fields_and_defaults():
    assert set(METHODS) == {*DEFAULTS, "ldrld"}
    for name, fields in DEFAULTS.items():
        cfg = METHODS[name].config()
        assert dataclasses.asdict(cfg) == fields
        assert all(type(value) is type(getattr(cfg, field)) for field, value in fields.items())
        with pytest.raises(dataclasses.FrozenInstanceError):
            cfg.temperature = 1.0
        assert isinstance(cfg, MethodConfig) and jax.tree.leaves(cfg) == []
    assert [name for name in NAMES if METHODS[name].init] == ["ctkd"]
    assert [name for name in NAMES if METHODS[name].at_epoch] == ["sld"]
    assert [name for name in NAMES if METHODS[name].from_teacher] == ["wkd"]
    assert [name for name in NAMES if METHODS[name].views(default(name)) == 2] == ["crld", "sld"]
    assert BATCH == ["dist", "mlkd", "skd", "luminet"]


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_rows(name, rng, x64):
    teacher, student, labels = batch(rng, 2, 2)
    value, gradient, _ = evaluate(name, teacher, student, labels)
    flat, flat_gradient, _ = evaluate(name, teacher.reshape(4, 5), student.reshape(4, 5), labels.reshape(4))
    assert value.shape == () and value > 0.01
    np.testing.assert_allclose(value, flat, rtol=1e-12)
    np.testing.assert_allclose(gradient.reshape(4, 5), flat_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_masked_rows_are_as_good_as_absent(name, rng, x64):
    arrays = batch(rng, 4)
    want, want_gradient, _ = evaluate(name, *arrays)
    value, gradient, _ = evaluate(name, *six_of_four(*arrays), where=KEPT, weights=ONES)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient[KEPT], want_gradient, rtol=1e-10, atol=1e-14)
    assert not np.any(gradient[~KEPT]) and np.any(gradient)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_gives_0(name, x64):
    nothing = np.full((6, 5), np.nan)
    value, gradient, _ = evaluate(name, nothing, nothing, np.full(6, -100), where=np.zeros(6, bool), weights=ONES)
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_shares_and_weight_0_is_a_mask(name, rng, x64):
    arrays, everywhere = batch(rng, 6), np.ones(6, bool)
    weights = np.where(KEPT, rng.uniform(0.5, 3.0, 6), 0.0)
    value, gradient, _ = evaluate(name, *arrays, where=everywhere, weights=weights)
    scaled, _, _ = evaluate(name, *arrays, where=everywhere, weights=7 * weights)
    masked, masked_gradient, _ = evaluate(name, *arrays, where=KEPT, weights=weights)
    alike, _, _ = evaluate(name, *arrays, where=KEPT, weights=3 * ONES)
    plain, _, _ = evaluate(name, *(array[KEPT] for array in arrays))
    np.testing.assert_allclose(scaled, value, rtol=1e-12)
    np.testing.assert_allclose(masked, value, rtol=1e-12)
    np.testing.assert_allclose(masked_gradient, gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(alike, plain, rtol=1e-12)
    assert abs(value - plain) > 1e-3 * plain


@pytest.mark.parametrize("name", sorted({*NAMES} - {*BATCH}))
def test_the_mean_is_weighted(name, rng, x64):
    arrays, weights = batch(rng, 6), rng.uniform(0.5, 3.0, 6)
    rows = [evaluate(name, *arrays, where=np.arange(6) == i, weights=ONES)[0] for i in range(6)]
    value, _, _ = evaluate(name, *arrays, where=np.ones(6, bool), weights=weights)
    np.testing.assert_allclose(value, np.dot(weights, rows) / np.sum(weights), rtol=1e-12)


def test_in_dist_a_row_of_weight_two_is_two_rows(rng, x64):
    """Up to the 1e-8 in rho, which has no unit."""
    arrays, twice = batch(rng, 6), np.array([0, 2, 3, 3])
    weights = np.array([1.0, 0.0, 1.0, 2.0, 0.0, 0.0])
    value, _, _ = evaluate("dist", *arrays, where=np.ones(6, bool), weights=weights)
    want, _, _ = evaluate("dist", *(array[twice] for array in arrays))
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient_and_the_student_one_that_sums_to_0(name, rng, x64):
    _, of_student, of_teacher = evaluate(name, *batch(rng, 4))
    largest = np.max(np.abs(of_student))
    assert not np.any(of_teacher)
    assert largest > 1e-3
    if name in ("skd", "luminet"):
        return  # a shift of a row is another direction, and another row of the batch's statistics
    assert np.max(np.abs(np.sum(of_student, axis=-1))) < 1e-14 * max(1, largest)  # a shift of a row changes nothing


@pytest.mark.parametrize("name", ["kd", "dkd", "ctkd", "mlkd", "abkd", "luminet", "bild", "topk_tail"])
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(name, rng):
    teacher, _, labels = batch(rng, 4, dtype=np.float32)
    # XLA rounds the two sides of these alike, by one set of options or the other: bild's loss is 2e-8 by a user's.
    value, gradient, _ = evaluate(name, teacher, teacher, labels, as_users=name != "bild")
    assert value == 0 and np.max(np.abs(gradient)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_a_program_computes_on_the_way_give_what_given_ones_do(name, rng):
    """XLA computes them once for each use, contracted with what follows or not, and ties need not stay ties."""
    method, cfg = METHODS[name], default(name)
    teacher, student = np.round(2 * rng.normal(size=(2, 512, 5))).astype(np.float32)
    bias, labels = rng.normal(size=(512, 1)).astype(np.float32), rng.integers(5, size=512)
    of_rows, scale = loss_of_rows(method), np.float32(0.137)

    def loss(student, teacher):
        return of_rows(scale * teacher + bias, scale * student + bias, labels, cfg)

    value, gradient = jax.jit(jax.value_and_grad(loss))(student, teacher)
    given = (np.asarray(scale * z + bias) for z in (teacher, student))
    want, want_gradient, _ = evaluate(name, *given, labels)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, scale * want_gradient, atol=1e-5 * scale * np.max(np.abs(want_gradient)))


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_raised_to_float32_first(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    half = jnp.asarray(teacher, jnp.bfloat16), jnp.asarray(student, jnp.bfloat16)
    value, gradient, _ = evaluate(name, *half, labels)
    exact, exact_gradient, _ = evaluate(name, *(np.asarray(z, np.float64) for z in half), labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, exact, rtol=1e-5)  # bfloat16 itself has 4e-3
    largest = np.max(np.abs(exact_gradient))
    np.testing.assert_allclose(np.asarray(gradient, np.float64), exact_gradient, rtol=2**-8, atol=2e-5 * largest)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_are_never_promoted_by_accident(name, x64, strict_dtypes):
    labels, where, weights = jnp.zeros(4, jnp.int8), jnp.ones(4, bool), jnp.ones(4, jnp.float32)
    learnt = {"params": METHODS[name].init(default(name))} if METHODS[name].init else {}
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        z = jnp.zeros((4, 5), dtype)
        for rows in ({}, {"where": where, "weights": weights, **learnt}):
            value, gradient = shapes(name, z, z, labels, **rows)
            assert value.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32) and gradient.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_and_configs_pass_through_transformations(name, rng, x64):
    arrays = batch(rng, 2, 4)
    parts = jax.jit(jax.vmap(parts_of_rows(METHODS[name]), in_axes=(0, 0, 0, None)))(*arrays, default(name))
    for i in (0, 1):
        value, _, _ = evaluate(name, *(array[i] for array in arrays))
        np.testing.assert_allclose(sum(part[i] for part in parts.values()), value, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "field", "part"),
    [
        ("dkd", "alpha", "target"),
        ("dkd", "beta", "non_target"),
        ("nkd", "gamma", "non_target"),
        ("rld", "alpha", "confidence"),
        ("rld", "beta", "masked"),
        ("dist", "beta", "inter"),
        ("dist", "gamma", "intra"),
        ("wsld", "alpha", ""),
        ("skd", "kl_weight", "kl"),
        ("skd", "direction_weight", "direction"),
        ("wkd", "gamma", "transport"),
        ("crld", "within_weight", "within"),
        ("crld", "cross_weight", "cross"),
        ("sld", "student_swap", "student"),
    ],
)
def test_each_weight_multiplies_its_part_alone(name, field, part, rng, x64):
    arrays = batch(rng, 4)
    configs = [dataclasses.replace(default(name), **{field: weight}) for weight in (0, 1, 3)]
    parts = parts_of_rows(METHODS[name])
    none, one, three = jax.jit(lambda *arrays: [parts(*arrays, cfg) for cfg in configs])(*arrays)
    assert none[part] == 0 and one[part] > 1e-3
    np.testing.assert_allclose(three[part], 3 * one[part], rtol=1e-12)
    for other in {*one} - {part}:
        assert one[other] > 1e-3
        np.testing.assert_allclose([none[other], three[other]], one[other], rtol=1e-12)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_compared_and_not_gathered(name, rng):
    """A gather's gradient is a scatter, and a sharded one gathers the logits first."""
    arrays = map(jnp.asarray, batch(rng, 4, dtype=np.float32))
    gradient = jax.grad(loss_of_rows(METHODS[name]), argnums=1)
    jaxpr = str(jax.make_jaxpr(lambda *a: gradient(*a, default(name)))(*arrays))
    assert "gather" not in jaxpr and "scatter" not in jaxpr and "exp" in jaxpr


# --- standardisation ------------------------------------------------------------------------------------------------


def test_standardized_logits_have_mean_0_and_deviation_1(rng, x64):
    z = jnp.asarray(5 + 3 * rng.normal(size=(4, 6)))
    standard = standardize_logits(z)
    np.testing.assert_allclose(np.mean(standard, axis=-1), 0, atol=1e-14)
    np.testing.assert_allclose(np.std(standard, axis=-1, ddof=1), 1, rtol=1e-6)
    np.testing.assert_allclose(standardize_logits(7 * z - 2), standard, rtol=1e-6)
    assert standardize_logits(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32


def test_logits_whose_squares_overflow_are_standardized_as_smaller_ones(rng):
    z = rng.normal(size=(4, 6)).astype(np.float32)
    want = standardize_logits(jnp.asarray(z))
    for factor in (2.0**40, 2.0**64, 2.0**125):
        found, pull = jax.vjp(standardize_logits, jnp.asarray(z * np.float32(factor)))
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
        assert np.all(np.isfinite(pull(jnp.asarray(z))[0]))
    assert not np.any(standardize_logits(jnp.full((1, 4), 2.0**127)))


@pytest.mark.parametrize("name", NAMES)
def test_standardisation_composes_with_every_method(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    z = lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-7)  # noqa: E731
    value, gradient, of_teacher = evaluate(name, teacher, student, labels, standard=True)
    want, _, _ = evaluate(name, z(teacher), z(student), labels)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    affine, _, _ = evaluate(name, 3 * teacher + 1, 0.2 * student - 5, labels, standard=True)
    np.testing.assert_allclose(affine, value, rtol=1e-5)  # up to the 1e-7 in the denominator
    assert abs(value - evaluate(name, teacher, student, labels)[0]) > 1e-3 * value
    along = np.sum(gradient * student, axis=-1)  # the loss does not depend on the scale
    assert np.max(np.abs(along)) < 1e-5 * np.max(np.abs(gradient)) and not np.any(of_teacher)


@pytest.mark.parametrize("name", ["dist", "rld"])  # one of either kind: the transform is the same before all
def test_standardisation_keeps_nan_in_masked_rows_out(name, rng, x64):
    arrays = batch(rng, 4)
    want, want_gradient, _ = evaluate(name, *arrays, standard=True)
    value, gradient, _ = evaluate(name, *six_of_four(*arrays), standard=True, where=KEPT, weights=ONES)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient[KEPT], want_gradient, rtol=1e-9, atol=1e-14)
    assert not np.any(gradient[~KEPT])


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_the_standardize_field_is_the_transform(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    with_field, _ = compiled(METHODS[name], METHODS[name].config(standardize=True))(student, teacher, labels, {})
    want, _, _ = evaluate(name, teacher, student, labels, standard=True)
    np.testing.assert_allclose(with_field, want, rtol=1e-12)
    assert abs(with_field - evaluate(name, teacher, student, labels)[0]) > 1e-3


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_wrong_logits_are_named(name):
    z, labels = jnp.zeros((2, 5)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"one shape .* got \((2, )?2, 5\) and \((2, )?2, 4\)"):
        shapes(name, z, z[:, :4], labels)
    with pytest.raises(ValueError, match="teacher_logits must be floating, got int32"):
        shapes(name, z.astype(jnp.int32), z, labels)
    with pytest.raises(ValueError, match="student_logits must be floating, got int32"):
        shapes(name, z, z.astype(jnp.int32), labels)
    with pytest.raises(ValueError, match=r"where must have the shape .* got \((2, )?3,?\)"):
        shapes(name, z, z, labels, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="where must be boolean"):
        shapes(name, z, z, labels, where=jnp.ones(2))
    with pytest.raises(ValueError, match=r"weights must have the shape .* got \((2, )?2, 5\)"):
        shapes(name, z, z, labels, weights=z)


@pytest.mark.parametrize("name", LABELLED)
def test_wrong_labels_are_named(name):
    z = jnp.zeros((2, 5))
    with pytest.raises(ValueError, match=r"labels must have the shape .* \((2, )?2,?\), got \((2, )?3,?\)"):
        shapes(name, z, z, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="labels must be integer classes, got float32"):
        shapes(name, z, z, jnp.zeros(2))


@pytest.mark.parametrize(("name", "least"), [("dkd", 3), ("nkd", 3), ("rld", 2), ("wsld", 2), ("wkd", 2)])
def test_too_few_classes_are_named(name, least):
    few, enough, labels = jnp.zeros((2, least - 1)), jnp.zeros((2, least)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=f"{name} needs at least {least} classes, got {least - 1}"):
        shapes(name, few, few, labels)
    value, gradient, _ = evaluate(name, enough, enough, labels)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, fields in DEFAULTS.items() for field in fields],
)
def test_wrong_fields_are_named(name, field):
    config = METHODS[name].config
    with pytest.raises(ValueError, match=rf"{field} must be .* got -1"):
        config(**{field: -1})
    with pytest.raises(ValueError, match=rf"{field} must be .* got 'x'"):
        config(**{field: "x"})
    if field.endswith("temperature"):
        with pytest.raises(ValueError, match=f"{field} must be finite and above 0, got 0.0"):
            config(**{field: 0})


@pytest.mark.parametrize("name", NAMES)
def test_rows_over_the_explicit_axes_of_a_mesh_are_those_of_one_device(name, rng):
    method, cfg = METHODS[name], default(name)
    shape, params = lead(method, cfg, 16), given(method, cfg, 5)
    teacher, student, labels = batch(rng, *shape, dtype=np.float32)
    loss = jax.value_and_grad(lambda student, *rest: method.loss(rest[0], student, rest[1], cfg, params=params))
    expected = jax.jit(loss)(student, teacher, labels)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        rows = jax.P(*[None] * (len(shape) - 1), "data")
        found = jax.jit(loss)(*(jax.device_put(z, rows) for z in (student, teacher, labels)))
        assert found[1].sharding.spec[len(shape) - 1] == "data"
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [2**32 + 1, -(2**32) + 1, 2**40])
def test_a_label_beyond_32_bits_is_no_class(name, label, rng):
    method, cfg = METHODS[name], default(name)
    shape, params = lead(method, cfg, 3), given(method, cfg, 5)
    teacher, student, labels = batch(rng, *shape, dtype=np.float32)
    labels[..., 1] = label
    with pytest.raises(ValueError, match=f"labels must be between 0 and 4, got {label}"):
        method.loss(teacher, student, labels, cfg, params=params)
    where = np.broadcast_to(np.arange(3) != 1, shape)
    assert np.isfinite(method.loss(teacher, student, labels, cfg, params=params, where=where))

"""What every method of the table keeps: shapes, masks, weights, dtypes, errors; and what composes with each."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import METHODS, LDRLDConfig, MethodConfig, standardize_logits, standardized

NAMES = sorted(METHODS)
DEFAULTS = {
    "kd": dict(temperature=4.0, standardize=False),
    "dkd": dict(alpha=1.0, beta=8.0, temperature=4.0, standardize=False),
    "nkd": dict(temperature=3.0, gamma=3.5),
    "wsld": dict(temperature=4.0, alpha=2.25),
    "dist": dict(beta=1.0, gamma=1.0, temperature=4.0),
    "ttm": dict(gamma=0.1),
    "wttm": dict(gamma=0.2),
    "rld": dict(alpha=1.0, beta=8.0, alpha_temperature=1.0, temperature=4.0),
    "mlkd": dict(views=1),
    "ctkd": dict(),
}
BATCH = ["dist", "mlkd"]  # those that relate examples to each other
LABELLED = ["dkd", "nkd", "rld", "wsld"]


def default(name):
    return LDRLDConfig(depth=3) if name == "ldrld" else METHODS[name].config()


def batch(rng, *shape, dtype=np.float64):
    """Teacher, student and labels for rows `shape`, 5 classes."""
    teacher, student = (2 * rng.normal(size=(2, *shape, 5))).astype(dtype)
    return teacher, student, rng.integers(5, size=shape)


def value_and_grad(name, teacher, student, labels, method=None, cfg=None, **rows):
    method, cfg = method or METHODS[name], cfg or default(name)
    loss = lambda s: method.loss(jnp.asarray(teacher), s, jnp.asarray(labels), cfg, **rows)  # noqa: E731
    return jax.value_and_grad(loss)(jnp.asarray(student))


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


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_rows(name, rng, x64):
    teacher, student, labels = batch(rng, 2, 3)
    value, gradient = value_and_grad(name, teacher, student, labels)
    flat, flat_gradient = value_and_grad(name, teacher.reshape(6, 5), student.reshape(6, 5), labels.reshape(6))
    assert value.shape == () and value > 0.01
    np.testing.assert_allclose(value, flat, rtol=1e-12)
    np.testing.assert_allclose(gradient.reshape(6, 5), flat_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_masked_rows_are_as_good_as_absent(name, rng, x64):
    teacher, student, labels = batch(rng, 2, 3)
    where = np.array([[True, False, True], [False, True, True]])
    want, want_gradient = value_and_grad(name, teacher[where], student[where], labels[where])
    teacher[~where], student[~where], labels[~where] = np.nan, np.nan, -100
    value, gradient = value_and_grad(name, teacher, student, labels, where=jnp.asarray(where))
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient[where], want_gradient, rtol=1e-10, atol=1e-14)
    assert not np.any(gradient[~where]) and np.any(gradient)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_mask_gives_0(name, rng):
    teacher, student, _ = batch(rng, 3, dtype=np.float32)
    value, gradient = value_and_grad(name, teacher * np.nan, student * np.nan, [-100] * 3, where=jnp.zeros(3, bool))
    assert value == 0 and not np.any(gradient)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_shares_and_weight_0_is_a_mask(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    weights = jnp.array([0.5, 0.0, 2.0, 3.0])
    value, gradient = value_and_grad(name, teacher, student, labels, weights=weights)
    scaled, _ = value_and_grad(name, teacher, student, labels, weights=7 * weights)
    masked, masked_gradient = value_and_grad(name, teacher, student, labels, weights=weights, where=weights > 0)
    alike, _ = value_and_grad(name, teacher, student, labels, weights=jnp.full(4, 3.0))
    plain, _ = value_and_grad(name, teacher, student, labels)
    np.testing.assert_allclose(scaled, value, rtol=1e-12)
    np.testing.assert_allclose(masked, value, rtol=1e-12)
    np.testing.assert_allclose(masked_gradient, gradient, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(alike, plain, rtol=1e-12)
    assert abs(value - plain) > 1e-3 * plain


@pytest.mark.parametrize("name", sorted({*NAMES} - {*BATCH}))
def test_the_mean_is_weighted(name, rng, x64):
    teacher, student, labels = batch(rng, 3)
    weights = np.array([0.5, 2.0, 1.0])
    rows = [value_and_grad(name, teacher[[i]], student[[i]], labels[[i]])[0] for i in range(3)]
    value, _ = value_and_grad(name, teacher, student, labels, weights=jnp.asarray(weights))
    np.testing.assert_allclose(value, np.dot(weights, rows) / 3.5, rtol=1e-12)


@pytest.mark.parametrize("name", ["dist"])
def test_a_row_of_weight_two_is_two_rows(name, rng, x64):
    """Up to the 1e-8 in rho, which has no unit."""
    teacher, student, labels = batch(rng, 4)
    twice = np.array([0, 1, 1, 2, 3])
    value, _ = value_and_grad(name, teacher, student, labels, weights=jnp.array([1.0, 2.0, 1.0, 1.0]))
    want, _ = value_and_grad(name, teacher[twice], student[twice], labels[twice])
    np.testing.assert_allclose(value, want, rtol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient_and_the_student_one_that_sums_to_0(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    loss = lambda t, s: METHODS[name].loss(t, s, jnp.asarray(labels), default(name))  # noqa: E731
    of_teacher, of_student = jax.grad(loss, argnums=(0, 1))(jnp.asarray(teacher), jnp.asarray(student))
    assert not np.any(of_teacher)
    assert np.max(np.abs(of_student)) > 1e-3  # a shift of a row changes nothing, hence:
    assert np.max(np.abs(np.sum(of_student, axis=-1))) < 1e-14


@pytest.mark.parametrize("name", NAMES)
def test_float32_inside_whatever_comes_in(name, rng, strict_dtypes):
    teacher, student, labels = batch(rng, 4, dtype=np.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        t, s = jnp.asarray(teacher, dtype), jnp.asarray(student, dtype)
        value, gradient = value_and_grad(name, t, s, labels)
        raised, raised_gradient = value_and_grad(name, t.astype(jnp.float32), s.astype(jnp.float32), labels)
        assert value.dtype == jnp.float32 and value == raised
        chex.assert_trees_all_equal(gradient, raised_gradient.astype(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_float64_stays_float64(name, rng, x64, strict_dtypes):
    teacher, student, labels = batch(rng, 4)
    params = METHODS[name].init(default(name)) if METHODS[name].init else None
    value, gradient = value_and_grad(name, teacher, student, labels.astype(np.int8), params=params)
    assert value.dtype == gradient.dtype == jnp.float64
    lower, _ = value_and_grad(name, teacher.astype(np.float32), student.astype(np.float32), labels)
    assert lower.dtype == jnp.float32 and 0 < abs(float(lower) - float(value)) < 1e-5 * value


@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_and_configs_pass_through_transformations(name, rng, x64):
    teacher, student, labels = map(jnp.asarray, batch(rng, 2, 4))
    method = METHODS[name]
    parts = jax.jit(method.parts)(teacher[0], student[0], labels[0], default(name))
    assert all(part.shape == () for part in parts.values())
    apart = jax.vmap(method.loss, in_axes=(0, 0, 0, None))(teacher, student, labels, default(name))
    np.testing.assert_allclose(sum(parts.values()), apart[0], rtol=1e-12)
    np.testing.assert_allclose(method.loss(teacher[1], student[1], labels[1], default(name)), apart[1], rtol=1e-12)


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
    ],
)
def test_each_weight_multiplies_its_part_alone(name, field, part, rng, x64):
    arrays, method = batch(rng, 4), METHODS[name]
    none, one, three = (method.parts(*arrays, method.config(**{field: weight})) for weight in (0, 1, 3))
    assert none[part] == 0 and one[part] > 1e-3
    np.testing.assert_allclose(three[part], 3 * one[part], rtol=1e-12)
    assert {k: v for k, v in none.items() if k != part} == {k: v for k, v in three.items() if k != part}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_compared_and_not_gathered(name, rng):
    """A gather's gradient is a scatter, and a sharded one gathers the logits first."""
    arrays = map(jnp.asarray, batch(rng, 4, dtype=np.float32))
    gradient = jax.grad(METHODS[name].loss, argnums=1)
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


@pytest.mark.parametrize("name", NAMES)
def test_standardisation_composes_with_every_method(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    method = standardized(METHODS[name])
    z = lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, ddof=1, keepdims=True) + 1e-7)  # noqa: E731
    value, gradient = value_and_grad(name, teacher, student, labels, method=method)
    np.testing.assert_allclose(value, METHODS[name].loss(z(teacher), z(student), labels, default(name)), rtol=1e-12)
    affine, _ = value_and_grad(name, 3 * teacher + 1, 0.2 * student - 5, labels, method=method)
    np.testing.assert_allclose(affine, value, rtol=1e-5)  # up to the 1e-7 in the denominator
    assert abs(value - METHODS[name].loss(teacher, student, labels, default(name))) > 1e-3 * value
    along = np.sum(gradient * student, axis=-1)  # the loss does not depend on the scale
    assert np.max(np.abs(along)) < 1e-5 * np.max(np.abs(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_standardisation_keeps_nan_in_masked_rows_out(name, rng, x64):
    teacher, student, labels = batch(rng, 4)
    where = np.array([True, False, True, True])
    method = standardized(METHODS[name])
    want, want_gradient = value_and_grad(name, teacher[where], student[where], labels[where], method=method)
    teacher[1], student[1], labels[1] = np.nan, np.nan, -100
    value, gradient = value_and_grad(name, teacher, student, labels, method=method, where=jnp.asarray(where))
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(gradient[where], want_gradient, rtol=1e-9, atol=1e-14)
    assert not np.any(gradient[1])


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_the_standardize_field_is_the_transform(name, rng, x64):
    arrays, method = batch(rng, 4), METHODS[name]
    with_field = method.loss(*arrays, method.config(standardize=True))
    np.testing.assert_allclose(with_field, standardized(method).loss(*arrays, method.config()), rtol=1e-12)
    assert abs(with_field - method.loss(*arrays, method.config())) > 1e-3


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_wrong_logits_are_named(name):
    loss, z, labels = METHODS[name].loss, jnp.zeros((2, 5)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 5\) and \(2, 4\)"):
        loss(z, z[:, :4], labels, default(name))
    with pytest.raises(ValueError, match="student_logits must be floating, got int32"):
        loss(z, z.astype(jnp.int32), labels, default(name))
    with pytest.raises(ValueError, match=r"where must have the shape .* got \(3,\)"):
        loss(z, z, labels, default(name), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="where must be boolean"):
        loss(z, z, labels, default(name), where=jnp.ones(2))
    with pytest.raises(ValueError, match=r"weights must have the shape .* got \(2, 5\)"):
        loss(z, z, labels, default(name), weights=z)


@pytest.mark.parametrize("name", LABELLED)
def test_wrong_labels_are_named(name):
    z = jnp.zeros((2, 5))
    with pytest.raises(ValueError, match=r"labels must have the shape .* \(2,\), got \(3,\)"):
        METHODS[name].loss(z, z, jnp.zeros(3, int), default(name))
    with pytest.raises(ValueError, match="labels must be integer classes, got float32"):
        METHODS[name].loss(z, z, jnp.zeros(2), default(name))


@pytest.mark.parametrize(("name", "least"), [("dkd", 3), ("nkd", 3), ("rld", 2), ("wsld", 2)])
def test_too_few_classes_are_named(name, least):
    z, labels = jnp.zeros((2, least - 1)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=f"{name} needs at least {least} classes, got {least - 1}"):
        METHODS[name].loss(z, z, labels, default(name))
    enough = jnp.zeros((2, least))
    assert np.isfinite(METHODS[name].loss(enough, enough, labels, default(name)))


@pytest.mark.parametrize(
    ("name", "field"),
    [(name, field) for name, fields in DEFAULTS.items() for field in fields if field != "standardize"],
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

"""Every method against the published code's numbers and against NumPy, written anew from the formulas."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ldrld_jax.losses import METHODS, standardized
from ldrld_jax.losses.correlation import _gram_distance
from tests.losses.references import FIELDS, REFERENCES, VARIANTS, ctkd, reference_loss_and_gradient
from tests.losses.rows import loss_of_rows

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "baselines_official.npz")


@functools.cache
def compiled(method, cfg):
    """Value and gradient with respect to the student, compiled once a shape."""
    loss = lambda student, teacher, labels, rows: method.loss(teacher, student, labels, cfg, **rows)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradient(method, cfg, teacher, student, labels, **rows):
    return compiled(method, cfg)(student, teacher, labels, rows)


@functools.cache
def compiled_rows(method, cfg):
    """Compiles a function of rows of logits: see `tests.losses.rows`."""
    of_rows = loss_of_rows(method)
    loss = lambda student, teacher, labels, rows: of_rows(teacher, student, labels, cfg, **rows)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss))


def error(got, want):
    """Max-norm relative."""
    return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.max(np.abs(want))


# --- the published code ---------------------------------------------------------------------------------------------

GOLDEN_CONFIGS = {
    "kd": lambda t, a, b, g: dict(temperature=t),
    "kd_logit_standardized": lambda t, a, b, g: dict(temperature=t, standardize=True),
    "dkd": lambda t, a, b, g: dict(temperature=t, alpha=a, beta=b),
    "rld": lambda t, a, b, g: dict(temperature=t, alpha=a, beta=b, alpha_temperature=1.0),
    "nkd": lambda t, a, b, g: dict(temperature=t, gamma=g),
    "ttm": lambda t, a, b, g: dict(gamma=g / 10),
    "wttm": lambda t, a, b, g: dict(gamma=g / 10),
    "wsld": lambda t, a, b, g: dict(temperature=t, alpha=g),
    "dist": lambda t, a, b, g: dict(temperature=t, beta=a, gamma=b),
}


def test_every_golden_method_is_checked():
    stored = {key.split("/")[1] for key in GOLDEN.files if key.endswith("/grad")}
    assert stored == set(GOLDEN_CONFIGS)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
@pytest.mark.parametrize("case", ["0", "1"])
@pytest.mark.parametrize("name", sorted(GOLDEN_CONFIGS))
def test_value_and_gradient_are_those_of_the_published_code(name, case, dtype, tolerance, x64):
    method = METHODS[name.removesuffix("_logit_standardized")]
    cfg = method.config(**GOLDEN_CONFIGS[name](*GOLDEN[f"{case}/T_alpha_beta_gamma"]))
    teacher, student = (GOLDEN[f"{case}/{side}"].astype(dtype) for side in ("teacher", "student"))
    loss, gradient = loss_and_gradient(method, cfg, teacher, student, GOLDEN[f"{case}/labels"])
    assert loss.dtype == gradient.dtype == dtype
    assert error(loss, GOLDEN[f"{case}/{name}/loss"]) < tolerance
    assert error(gradient, GOLDEN[f"{case}/{name}/grad"]) < tolerance


# --- the formulas, in NumPy -----------------------------------------------------------------------------------------


def worst(teacher, rng):
    return np.argmin(teacher, axis=-1)


def best(teacher, rng):
    return np.argmax(teacher, axis=-1)


def any_label(teacher, rng):
    return rng.integers(teacher.shape[-1], size=len(teacher))


DATA = {
    "plain": (lambda n: (2 * n(), 2 * n()), any_label),
    "spread": (lambda n: (30 * n(), 30 * n()), any_label),
    "the label is the teacher's worst class": (lambda n: (2 * n(), 2 * n()), worst),
    "the label is the teacher's best class": (lambda n: (2 * n(), 2 * n()), best),
    "ties": (lambda n: (np.round(n()), np.round(n())), any_label),
    "huge": (lambda n: (1e4 * n(), 1e4 * n()), any_label),
    "near": (lambda n: (lambda z: (z, z + 1e-3 * n()))(2 * n()), any_label),
    "equal student": (lambda n: (2 * n(), 0 * n() + 3), any_label),
    "equal teacher": (lambda n: (0 * n() - 2, 2 * n()), any_label),
    "equal both": (lambda n: (0 * n(), 0 * n() + 1), any_label),
}


def check_against_reference(name, rows, classes, temperature, fields, seed):
    method = METHODS[name.partition(" ")[0]]
    fields = fields | ({"temperature": temperature} if hasattr(method.config(), "temperature") else {})
    cfg, rng = method.config(**fields), np.random.default_rng(seed)
    # Two rows are masked out, wherever they fall; they hold NaN and no label.
    where = rng.permutation(np.arange(rows + 2) < rows)
    weights = np.full(rows + 2, np.nan)
    weights[where] = w = rng.uniform(0.5, 2.0, rows)
    for kind, (draw, choose) in DATA.items():
        if name == "dist" and kind.startswith("equal"):
            continue  # there rho divides rounding by 1e-8; test_equal_logits holds what can be held
        t, s = draw(lambda: rng.normal(size=(rows, classes)))
        y = choose(t, rng)
        teacher, student = np.full((2, rows + 2, classes), np.nan)
        labels = np.full(rows + 2, -100)
        teacher[where], student[where], labels[where] = t, s, y
        kept = dict(where=where, weights=weights)
        loss, gradient = compiled_rows(method, cfg)(student, teacher, labels, kept)
        want, want_gradient = reference_loss_and_gradient(REFERENCES[name.partition(" ")[0]], t, s, y, w, cfg)
        largest = max(1.0, np.max(np.abs([t, s])))
        assert abs(loss - want) <= 1e-10 * abs(want) + 1e-12 * largest, (kind, cfg, float(loss), want)
        # Standardisation multiplies the rounding of equal logits by 1e7, as it does their gradient.
        floor = 1e-8 if getattr(cfg, "standardize", False) and kind.startswith("equal") else 1e-12
        close = np.max(np.abs(gradient[where] - want_gradient)) <= 1e-10 * np.max(np.abs(want_gradient)) + floor
        assert close, (kind, cfg, gradient[where], want_gradient)
        assert not np.any(gradient[~where]), (kind, cfg)


def test_every_method_has_a_reference():
    assert set(REFERENCES) == set(FIELDS) == set(METHODS) - {"ldrld"}


@pytest.mark.parametrize("name", sorted({*REFERENCES, *VARIANTS}))
def test_one_row_of_three_classes_agrees_with_numpy(name, x64):
    fields = {"bild": FIELDS["bild"]} | VARIANTS  # the others with their defaults
    temperature = getattr(METHODS[name.partition(" ")[0]].config(), "temperature", None)
    check_against_reference(name, 1, 3, temperature, fields.get(name, {}), seed=1)


@pytest.mark.parametrize("name", sorted({*REFERENCES, *VARIANTS}))
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a smaller failing shape is not worth the compilations to find it
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(2, 5),
    classes=st.integers(3, 8),
    temperature=st.sampled_from([1.0, 2.5, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_agrees_with_numpy(name, x64, rows, classes, temperature, seed):
    check_against_reference(name, rows, classes, temperature, (FIELDS | VARIANTS)[name], seed)


# --- what is special to one method ----------------------------------------------------------------------------------


def test_ctkd_temperature_has_the_gradient_of_the_formula(rng, x64):
    teacher, student = 3 * rng.normal(size=(2, 4, 6))
    method = METHODS["ctkd"]
    cfg = method.config()
    loss = lambda params: method.loss(  # noqa: E731
        jnp.asarray(teacher), jnp.asarray(student), jnp.zeros(4, int), cfg, params=params
    )
    gradient_at = jax.jit(jax.grad(loss))
    for theta in (1.0, -3.0, 40.0):
        gradient = gradient_at({"theta": jnp.asarray(theta)})["theta"]
        want = np.mean([ctkd(t, s, None, cfg, theta=theta + 1e-30j) for t, s in zip(teacher, student, strict=True)])
        np.testing.assert_allclose(gradient, want.imag / 1e-30, rtol=1e-10, atol=1e-14)


def test_ctkd_starts_at_a_temperature_of_15_6(rng, x64):
    (teacher, student), labels = rng.normal(size=(2, 4, 6)), np.zeros(4, int)
    method, cfg = METHODS["ctkd"], METHODS["ctkd"].config()
    params = method.init(cfg)
    assert params["theta"].shape == () and params["theta"] == 1
    fixed = METHODS["kd"].config(temperature=1 + 20 / (1 + np.exp(-1)))
    assert fixed.temperature == pytest.approx(15.6, abs=0.03)
    loss, gradient = loss_and_gradient(method, cfg, teacher, student, labels, params=params)
    without, _ = loss_and_gradient(method, cfg, teacher, student, labels)
    want, want_gradient = loss_and_gradient(METHODS["kd"], fixed, teacher, student, labels)
    np.testing.assert_allclose([loss, without], want, rtol=1e-12)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-10, atol=1e-16)


def test_ctkd_gradient_turns_adversarial_over_ten_epochs(strict_dtypes):
    scale = METHODS["ctkd"].gradient_scale
    want = [-(1 - np.cos(np.pi * min(e, 10) / 10)) / 2 for e in range(13)]
    np.testing.assert_allclose([scale(e) for e in range(13)], want, atol=1e-7)
    np.testing.assert_allclose(jax.jit(scale)(jnp.float32(2.5)), -(1 - np.cos(np.pi / 4)) / 2, atol=1e-7)
    assert want[0] == 0 and want[10] == want[12] == -1


def test_ctkd_climbs_the_loss_in_theta(rng, x64):
    """A descent step on the scaled gradient raises the loss: the task grows harder."""
    teacher, student = 2 * rng.normal(size=(2, 4, 6))
    method = METHODS["ctkd"]
    loss = lambda p: method.loss(teacher, student, np.zeros(4, int), method.config(), params=p)  # noqa: E731

    @jax.jit
    def before_and_after(params):
        value, gradient = jax.value_and_grad(loss)(params)
        return value, loss(jax.tree.map(lambda p, g: p - 0.1 * method.gradient_scale(10) * g, params, gradient))

    before, after = before_and_after({"theta": jnp.asarray(-2.0)})
    assert after > before * (1 + 1e-6)


def test_mlkd_of_two_views_is_the_mean_of_each(rng, x64):
    teacher, student = rng.normal(size=(2, 2, 5, 4))
    where, weights = rng.random((2, 5)) < 0.7, rng.uniform(0.5, 2.0, (2, 5))
    method, labels = METHODS["mlkd"], np.zeros(5, int)
    one, two = method.config(), method.config(views=2)
    assert (method.views(one), method.views(two), METHODS["kd"].views(METHODS["kd"].config())) == (1, 2, 1)
    rows = lambda v: dict(where=where[v], weights=weights[v])  # noqa: E731
    apart = [loss_and_gradient(method, one, teacher[v], student[v], labels, **rows(v))[0] for v in (0, 1)]
    assert abs(apart[0] - apart[1]) > 1e-3
    both, _ = loss_and_gradient(method, two, teacher, student, labels, where=where, weights=weights)
    np.testing.assert_allclose(both, (apart[0] + apart[1]) / 2, rtol=1e-12)


def test_mlkd_of_two_views_needs_two():
    cfg = METHODS["mlkd"].config(views=2)
    z = jnp.zeros((3, 4, 5))
    with pytest.raises(ValueError, match=r"first axis of 2, got shape \(3, 4, 5\)"):
        METHODS["mlkd"].loss(z, z, jnp.zeros(4, int), cfg)
    with pytest.raises(ValueError, match="needs where with a first axis of 2"):
        METHODS["mlkd"].loss(z[:2], z[:2], jnp.zeros(4, int), cfg, where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="views must be one of 1, 2, got 3"):
        METHODS["mlkd"].config(views=3)


def test_rld_without_classes_below_the_label_is_its_confidence_alone(x64):
    teacher, student = np.array([[3.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    method, labels = METHODS["rld"], np.array([1, 0])  # a class tied with the worst one, and three tied
    loss, gradient = loss_and_gradient(method, method.config(), teacher, student, labels)
    confidence, confidence_gradient = loss_and_gradient(method, method.config(beta=0), teacher, student, labels)
    assert loss == confidence > 0.1
    assert np.array_equal(gradient, confidence_gradient)


@pytest.mark.parametrize("transform", [lambda method: method, standardized], ids=["plain", "standardized"])
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_equal_logits_and_one_row_give_finite_values_and_gradients(name, transform):
    method, labels, rising = transform(METHODS[name]), np.zeros(3, int), np.tile(np.arange(4, dtype=np.float32), (3, 1))
    cfg = method.config(**({"top_k": 3} if name == "bild" else {}))
    for value in (0.0, 0.1, -1e4):
        equal = np.full((3, 4), value, np.float32)
        for teacher, student in ((equal, equal), (rising, equal), (equal, rising), (rising, rising)):
            for where in (np.array([True, True, True]), np.array([False, True, False])):
                loss, gradient = compiled_rows(method, cfg)(student, teacher, labels, {"where": where})
                assert np.isfinite(loss) and np.all(np.isfinite(gradient)), (value, where)
                assert not np.any(gradient[~where])


def test_equal_logits_are_uncorrelated(x64):
    """rho is 0 where either side is constant, so dist is T^2 (beta + gamma) with no gradient if the teacher is."""
    method = METHODS["dist"]
    cfg = method.config(beta=0.5, gamma=2.0, temperature=3.0)
    rising = np.arange(12.0).reshape(3, 4) ** 1.5
    loss, gradient = loss_and_gradient(method, cfg, np.zeros((3, 4)), rising, np.zeros(3, int))
    np.testing.assert_allclose(loss, 9 * 2.5, rtol=1e-7)
    assert np.max(np.abs(gradient)) < 1e-6
    loss, gradient = loss_and_gradient(method, cfg, rising, np.zeros((3, 4)), np.zeros(3, int))
    np.testing.assert_allclose(loss, 9 * 2.5, rtol=1e-7)
    assert np.max(np.abs(gradient)) > 1e5  # the slope |b| / 1e-8 that the docstring warns of


def test_one_row_has_no_correlation_over_the_batch(rng, x64):
    method = METHODS["dist"]
    teacher, student = rng.normal(size=(2, 1, 4))
    cfg = method.config(beta=0, gamma=2.0, temperature=3.0)
    loss, gradient = loss_and_gradient(method, cfg, teacher, student, np.zeros(1, int))
    assert loss == 18 and not np.any(gradient)


@pytest.mark.parametrize(("rows", "classes"), [(4, 9), (9, 4), (5, 5), (1, 3), (6, 1)])
def test_the_distances_of_gram_matrices_are_those_of_either_side(rows, classes, rng, x64):
    a, b = rng.normal(size=(2, rows, classes))
    weights = np.maximum(rng.normal(size=rows), 0)
    found = _gram_distance(jnp.asarray(a), jnp.asarray(b), jnp.asarray(weights))
    w = np.diag(weights)
    by_classes, by_rows = a.T @ w @ a - b.T @ w @ b, np.sqrt(w) @ (a @ a.T - b @ b.T) @ np.sqrt(w)
    np.testing.assert_allclose(found, (np.sum(by_classes**2), np.sum(by_rows**2)), rtol=1e-12)


def test_no_matrix_of_mlkd_has_more_entries_than_its_smaller_side_squared():
    """[C, C] at five temperatures takes 18 GB for 21,841 classes."""
    shapes = (jax.ShapeDtypeStruct((4, 300), jnp.float32),) * 2
    cfg = METHODS["mlkd"].config()
    program = jax.make_jaxpr(jax.grad(lambda s, t: METHODS["mlkd"].loss(t, s, jnp.zeros(4, int), cfg)))(*shapes)
    assert max(math.prod(v.aval.shape) for e in program.jaxpr.eqns for v in e.outvars) <= 5 * 4 * 300

"""Every method against the published code's numbers and against NumPy, written anew from the formulas."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ldrld_jax.losses import METHODS, standardized
from tests.losses.rows import from_teacher, loss_of_rows

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
    """As `compiled`, of rows of logits: see `tests.losses.rows`."""
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
# reference(t, s, y, w, cfg): logits [B, C], labels [B], weights [B], to a scalar. `s` may be complex, for the
# derivative by a step in the imaginary direction, which has no cancellation: the real part decides and shifts.


def log_softmax(z):
    z = z - np.max(z.real, axis=-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def kl_of_one(t, s):
    """Of two rows of logits."""
    p, log_p, log_q = softmax(t), log_softmax(t), log_softmax(s)
    return sum(p[c] * (log_p[c] - log_q[c]) for c in range(len(t)))


def lse(z):
    peak = np.max(z.real)
    return peak + np.log(np.sum(np.exp(z - peak)))


def two_way(z, c):
    """Log of [p_c, 1 - p_c], the second from the sum over the others."""
    z = z - np.max(z.real)
    return np.array([z[c] - lse(z), lse(np.delete(z, c)) - lse(z)])


def kl_two_way(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q))


def by_example(term):
    """The weighted mean of `term(t, s, y, cfg)` over the rows."""

    def reference(t, s, y, w, cfg):
        return sum(w[i] * term(t[i], s[i], y[i], cfg) for i in range(len(y))) / np.sum(w)

    return reference


def standardize(z):
    centred = z - np.sum(z) / len(z)
    return centred / (np.sqrt(np.sum(centred * centred) / (len(z) - 1)) + 1e-7)


def entropy_weight(t, s, cfg, log):
    """Of two rows; the student's real part alone, for no gradient flows into it."""
    t, s = softmax(t / cfg.entropy_temperature), softmax(s.real / cfg.entropy_temperature)
    of_teacher, of_student = -np.sum(t * log(t)), -np.sum(s * log(s))
    return of_teacher * (1 + of_student / (cfg.entropy_bound or np.log(len(t)))) / 2


def kd(t, s, y, cfg):
    weight = entropy_weight(t, s, cfg, lambda p: np.log(p + 1e-10)) if cfg.entropy_weighting else 1.0
    if cfg.standardize:
        t, s = standardize(t), standardize(s)
    return weight * cfg.temperature**2 * kl_of_one(t / cfg.temperature, s / cfg.temperature)


def dkd(t, s, y, cfg):
    if cfg.standardize:
        t, s = standardize(t), standardize(s)
    weight = entropy_weight(t, s, cfg, lambda p: np.log(np.fmax(p, 1e-10))) if cfg.entropy_weighting else 1.0
    others = np.argsort(-t, kind="stable")[: cfg.top_k or len(t)]
    others = np.sort(others[others != y])
    t, s = t / cfg.temperature, s / cfg.temperature
    target = kl_two_way(two_way(t, y), two_way(s, y))
    rest = kl_of_one(t[others], s[others]) if len(others) else 0.0
    return weight * cfg.temperature**2 * (cfg.alpha * target + cfg.beta * rest)


def nkd(t, s, y, cfg):
    q_t = softmax(np.delete(t, y) / cfg.temperature)
    log_q_s = log_softmax(np.delete(s, y) / cfg.temperature)
    return -softmax(t)[y] * log_softmax(s)[y] - cfg.gamma * cfg.temperature**2 * np.sum(q_t * log_q_s)


def wsld(t, s, y, cfg):
    bracket = 1 - np.exp(log_softmax(s.real)[y] / (-log_softmax(t)[y] + 1e-7))
    entropy = -np.sum(softmax(t / cfg.temperature) * log_softmax(s / cfg.temperature))
    return cfg.alpha * cfg.temperature**2 * bracket * entropy


def ttm(t, s, y, cfg):
    return kl_of_one(cfg.gamma * log_softmax(t), s)  # norm(p^gamma) = softmax(gamma log p)


def wttm(t, s, y, cfg):
    return np.sum(softmax(t) ** cfg.gamma) * ttm(t, s, y, cfg)


def rld(t, s, y, cfg):
    log_m = two_way(t / cfg.alpha_temperature, np.argmax(t))
    confidence = kl_two_way(log_m, two_way(s / cfg.alpha_temperature, y))
    keep = t < t[y]
    masked = kl_of_one(t[keep] / cfg.temperature, s[keep] / cfg.temperature) if keep.any() else 0.0
    return cfg.alpha * cfg.alpha_temperature**2 * confidence + cfg.beta * cfg.temperature**2 * masked


def ctkd(t, s, y, cfg, theta=1.0):
    temperature = 1 + 20 / (1 + np.exp(-theta))
    return temperature**2 * kl_of_one(t / temperature, s / temperature)


def dist(t, s, y, w, cfg):
    p, q = softmax(t / cfg.temperature), softmax(s / cfg.temperature)
    w = w * len(w) / np.sum(w)

    def rho(a, b, w):
        a, b = a - np.sum(w * a) / np.sum(w), b - np.sum(w * b) / np.sum(w)
        return np.sum(w * a * b) / (np.sqrt(np.sum(w * a * a)) * np.sqrt(np.sum(w * b * b)) + 1e-8)

    rows = [w[i] * rho(p[i], q[i], np.ones(p.shape[1])) for i in range(len(p))]
    columns = [rho(p[:, c], q[:, c], w) for c in range(p.shape[1])]
    return cfg.temperature**2 * (cfg.beta * (1 - sum(rows) / len(rows)) + cfg.gamma * (1 - sum(columns) / len(columns)))


def mlkd(t, s, y, w, cfg):
    """The clean form: the published code drops, masks and mixes up views, which one view does not show."""
    rows, classes = t.shape
    w = w * rows / np.sum(w)
    total = 0
    for temperature in (2, 3, 4, 5, 6):
        p, q = softmax(t / temperature), softmax(s / temperature)
        by_class = p.T @ np.diag(w) @ p - q.T @ np.diag(w) @ q
        by_row = np.diag(np.sqrt(w)) @ (p @ p.T - q @ q.T) @ np.diag(np.sqrt(w))
        divergence = sum(w[i] * kl_of_one(t[i] / temperature, s[i] / temperature) for i in range(rows)) / rows
        total += temperature**2 * divergence + np.sum(by_class**2) / classes + np.sum(by_row**2) / rows
    return total


def abkd(t, s, y, cfg):
    a, b = cfg.alpha, cfg.beta
    log_p, log_q = log_softmax(t / cfg.temperature), log_softmax(s / cfg.temperature)
    whole = (a * np.exp((a + b) * log_p) + b * np.exp((a + b) * log_q)) / (a + b)
    return np.sum(whole - np.exp(a * log_p + b * log_q)) / (a * b)


def skd(t, s, y, w, cfg):
    """Weights as whole numbers would act by repeating rows."""
    rows, w = len(y), w * len(y) / np.sum(w)
    kl = sum(w[i] * kl_of_one(t[i] / cfg.temperature, s[i] / cfg.temperature) for i in range(rows)) / rows

    def unit(z):
        norm = np.sqrt(np.sum(z * z, axis=-1))[:, None]
        return z / np.where(norm.real > 1e-12, norm, 1e-12)

    difference = (unit(s) @ unit(s).T - unit(t) @ unit(t).T) / t.shape[1]
    # W^(1/2) on either side: for whole weights the covariance of repeated rows.
    root = np.diag(np.sqrt(w))
    centred = root @ (difference - (difference @ w / rows)[:, None]) @ root
    covariance = centred @ centred.T / max(rows - 1, 1) + cfg.ridge * np.eye(rows)
    scaled = root @ difference
    squares = np.array([scaled[:, i] @ np.linalg.solve(covariance, scaled[:, i]) for i in range(rows)])
    lengths = np.where(squares.real > 0, np.sqrt(np.where(squares.real > 0, squares, 1.0)), 0.0)
    direction = np.sum(w * lengths) / rows if rows > 1 else 0.0
    factors = [1.0, 1.0]
    if cfg.batch_masks:
        sure, classes = np.max(softmax(t), -1), w @ softmax(t)
        below = lambda x, w: np.array([np.sum(w[x < value]) < np.sum(w) / 2 * (1 - 1e-9) for value in x])  # noqa: E731
        factors = [np.sum(w * below(sure, w)) / rows, np.mean(below(classes, np.ones(len(classes))))]
    return factors[0] * cfg.kl_weight * cfg.temperature**2 * kl + factors[1] * cfg.direction_weight * direction


def luminet(t, s, y, w, cfg):
    share = (w / np.sum(w))[:, None]

    def standard(z):
        z = z - np.sum(share * z, 0)
        return z / np.sqrt(np.sum(share * z * z, 0) + 1e-5) / cfg.temperature

    t, s = standard(t), standard(s)
    return cfg.alpha**2 * sum(share[i, 0] * kl_of_one(t[i], s[i]) for i in range(len(y)))


def wkd(t, s, y, cfg):
    cost = np.asarray(from_teacher(METHODS["wkd"], len(t))["params"])
    others = np.delete(np.arange(len(t)), y)
    cost = np.maximum(cost[np.ix_(others, others)], 0) + 1e-8
    a, b = (softmax(z[others] / cfg.temperature) for z in (s, t))
    kernel, u = np.exp(-cost / cfg.regularization), np.full(len(others), 1 / len(others))
    for _ in range(cfg.iterations):
        v = b / (kernel.T @ u + 1e-8)
        u = a / (kernel @ v + 1e-8)
    moved = sum(u[j] * kernel[j, k] * v[k] * cost[j, k] for j in range(len(others)) for k in range(len(others)))
    return -softmax(t)[y] * log_softmax(s)[y] + cfg.gamma * moved


def crld(t, s, y, cfg):
    """The strong view is the weak one with the classes in reverse order, as in `tests.losses.rows`."""
    sure = np.max(softmax(t))
    k = lambda t, s: cfg.temperature**2 * kl_of_one(t / cfg.temperature, s / cfg.temperature)  # noqa: E731
    within = (sure >= cfg.weak_threshold) * (k(t, s) + k(t[::-1], s[::-1]))
    return cfg.within_weight * within + cfg.cross_weight * (sure >= cfg.strong_threshold) * (
        k(t, s[::-1]) + k(t[::-1], s)
    )


def swapped(z, y):
    """The first of the largest changes places with the label."""
    top = np.argmax(z.real)
    z = z.copy()
    z[y], z[top] = z[top], z[y]
    return z


def sld(t, s, y, cfg):
    total = 0
    for t_view, s_view, label in ((t, s, y), (t[::-1], s[::-1], len(t) - 1 - y)):
        for temperature in range(1, 7):
            for target, weight in ((t_view, 1.0), (s_view, cfg.student_swap)):
                log_p, log_q = (log_softmax(z / temperature) for z in (swapped(target, label), s_view))
                total += weight * temperature**2 * np.sum(np.exp(log_p) * (log_p - log_q))
    return total


def bild(t, s, y, cfg):
    total = 0
    for leader in (t, s.real):
        order = np.argsort(-leader, kind="stable")[: cfg.top_k]
        pairs = [(order[i], order[j]) for i in range(cfg.top_k) for j in range(i + 1, cfg.top_k)]
        total += kl_of_one(*(np.array([z[i] - z[j] for i, j in pairs]) / cfg.temperature for z in (t, s)))
    return total


def topk_tail(t, s, y, cfg):
    log_p, log_q = log_softmax(t / cfg.temperature), log_softmax(s / cfg.temperature)
    tops = [set(np.argsort(-z.real, kind="stable")[: cfg.top_k]) for z in (t, s)]
    kept = sorted({0: tops[0], 1: tops[1]}.get(cfg.beta, tops[0] | tops[1]))
    rest = np.delete(np.arange(len(t)), kept)

    def buckets(log_p):
        if not cfg.tail:
            return log_p[kept] - lse(log_p[kept])
        return np.append(log_p[kept], lse(log_p[rest])) if len(rest) else log_p[kept]

    p, q = buckets(log_p), buckets(log_q)
    kl = lambda a, b: np.sum(np.exp(a) * (a - b))  # noqa: E731
    if cfg.beta in (0, 1):
        return kl(p, q) if cfg.beta == 0 else kl(q, p)
    mix = np.array([lse(np.array([x + np.log(cfg.beta), z + np.log(1 - cfg.beta)])) for x, z in zip(p, q, strict=True)])
    return cfg.beta * kl(p, mix) + (1 - cfg.beta) * kl(q, mix)


BY_EXAMPLE = (kd, dkd, nkd, wsld, ttm, wttm, rld, ctkd, abkd, wkd, crld, sld, bild, topk_tail)
REFERENCES = {term.__name__: by_example(term) for term in BY_EXAMPLE}
REFERENCES |= {"dist": dist, "mlkd": mlkd, "skd": skd, "luminet": luminet}
FIELDS = {
    "kd": dict(standardize=True),
    "dkd": dict(alpha=0.7, beta=3.0),
    "nkd": dict(gamma=1.3),
    "wsld": dict(alpha=1.7),
    "ttm": dict(gamma=0.3),
    "wttm": dict(gamma=0.6),
    "rld": dict(alpha=0.7, beta=3.0, alpha_temperature=1.5),
    "dist": dict(beta=0.7, gamma=1.9),
    "mlkd": {},
    "ctkd": {},
    "abkd": dict(alpha=0.4, beta=0.7),
    "skd": dict(ridge=0.02, kl_weight=0.7, direction_weight=1.3),
    "wkd": dict(gamma=3.0, regularization=0.2, iterations=4),
    "luminet": dict(alpha=1.5),
    "crld": dict(weak_threshold=0.4, within_weight=0.7, cross_weight=1.3),
    "sld": dict(student_swap=0.6),
    "bild": dict(top_k=3),
    "topk_tail": dict(top_k=2, beta=0.3),
}
# More of one method, whose name stands before the first space.
VARIANTS = {
    "kd of EA": dict(entropy_weighting=True),
    "dkd of EA": dict(entropy_weighting=True, entropy_temperature=2.0, entropy_bound=5.0, beta=3.0),
    "dkd of DeepKD": dict(top_k=2, beta=3.0),
    "skd with masks": dict(batch_masks=True),
    "topk_tail forward": dict(top_k=2, beta=0.0),
    "topk_tail without a tail": dict(top_k=2, beta=0.5, tail=False),
}


def reference_loss_and_gradient(reference, t, s, y, w, cfg):
    gradient = np.zeros(s.shape)
    for index in np.ndindex(s.shape):
        stepped = s.astype(complex)
        stepped[index] += 1e-30j
        gradient[index] = np.imag(reference(t, stepped, y, w, cfg)) / 1e-30
    return np.real(reference(t, s.astype(complex), y, w, cfg)), gradient


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
    with pytest.raises(ValueError, match="views must be 1 or 2, got 3"):
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

"""Every method in NumPy, written anew from the formulas, slowly and without looking at the code under test.

`REFERENCES[NAME](t, s, y, w, cfg)`: logits `[B, C]`, labels `[B]`, weights `[B]`, to a scalar. `s` may be complex,
for the derivative by a step in the imaginary direction, which has no cancellation: the real part decides and shifts.
"""

import numpy as np

from ldrld_jax.losses import METHODS
from tests.losses.rows import from_teacher


def log_softmax(z):
    z = z - np.max(z.real, axis=-1, keepdims=True)
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def kl_of_one(t, s):
    """Returns the KL divergence of two rows of logits."""
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
    """Returns the weight of two rows; the student's real part alone, for no gradient flows into it."""
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

"""abkd, the alpha-beta divergence of two softmaxes.

The loss is the bare term, without cross-entropy, warm-up or outer weight.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import MethodConfig, Positive, prepare_logits

_TERMS = 18  # for arguments up to 1, truncating the power series here omits less than 1e-16 of its value


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class ABKDConfig(MethodConfig):
    """Distillation by the alpha-beta divergence.

    Attributes:
      temperature: T > 0 of both sides; the loss is not multiplied by T^2.
      alpha: >= 0, the teacher's power; large values emphasise classes that the teacher finds likely.
      beta: >= 0, the student's power; large values emphasise classes that the student finds likely.
    """

    temperature: Positive = 4.0
    alpha: float = 0.8
    beta: float = 0.3


def abkd_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: ABKDConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Computes the alpha-beta divergence of teacher and student, per example.

    .. math:: D = -\frac{1}{\alpha \beta} \sum_c
              \Big[p^\alpha q^\beta - \frac{\alpha}{s} p^s - \frac{\beta}{s} q^s\Big], \quad s = \alpha + \beta

    with p, q the softmaxes at T. (alpha, beta) = (1, 0) gives KL(p || q), (0, 1) gives KL(q || p), (.5, .5)
    twice the squared distance of the square roots, (0, 0) half the squared distance of the log-probabilities.

    If alpha, beta or their sum is 0, the result is the limit of the divergence. Precision holds near 0 because
    each class is computed as the second divided difference of :math:`r \mapsto p^{s - r} q^r` at 0, beta and s.
    The published code returns a different value if one of the two is 0 and the other is not 1: it lacks
    a factor 1/alpha or 1/beta.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: an `ABKDConfig`.
      where: `[...]` bool; rows where it is False give 0 and may hold NaN.

    Returns:
      `[...]`, float32 (float64 for float64 logits); not negative. Value and gradient stay finite for
      probabilities that underflow, because the computation uses their logarithms.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher, student = jnp.array([[2.0, 0.0, -2.0]]), jnp.array([[0.0, 0.0, 0.0]])
      >>> for alpha, beta in ((1, 0), (1, 1e-6), (0.5, 0.5)):
      ...     print(f"{abkd_terms(teacher, student, ABKDConfig(temperature=1, alpha=alpha, beta=beta))[0]:.4f}")
      0.6576
      0.6576
      0.7679

    References:
      "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
      alpha-beta-Divergence", ICML 2025; agrees with the published code to 1e-9
      (tests/losses/golden_2026_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    log_p, log_q = (numerics.log_softmax(z, cfg.temperature) for z in (teacher, student))
    return jnp.sum(_of_class(log_p, log_q, cfg.alpha, cfg.beta), axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _of_class(log_p: jax.Array, log_q: jax.Array, alpha: float, beta: float) -> jax.Array:
    """Computes the summand of each class, elementwise; differentiable in log_q only."""
    log_p, log_q = (_bounded(z, alpha + beta) for z in (log_p, log_q))
    ratio, total = log_q - log_p, alpha + beta
    if total == 0:
        return ratio**2 / 2
    teacher, mixed, student = total * log_p, alpha * log_p + beta * log_q, total * log_q
    far = (_secant(mixed, student, ratio) - _secant(teacher, mixed, ratio)) / total
    # If the three exponents are close, so are the two secants, and their difference cancels: use the power
    # series. Its coefficients are the complete homogeneous polynomials of the nodes 0, beta / total and 1.
    near = jnp.zeros_like(ratio)
    step = jnp.clip(total * ratio, -1, 1)
    for j in reversed(range(_TERMS)):
        near = near * step + sum((beta / total) ** i for i in range(j + 1)) / math.factorial(j + 2)
    return jnp.where(jnp.abs(total * ratio) < 1, jnp.exp(teacher) * ratio**2 * near, far)


@_of_class.defjvp
def _(alpha, beta, primals, tangents):
    log_p, log_q = (_bounded(z, alpha + beta) for z in primals)
    slope = _secant(alpha * log_p + beta * log_q, (alpha + beta) * log_q, log_q - log_p)
    return _of_class(log_p, log_q, alpha, beta), slope * tangents[1]


def _bounded(log_p: jax.Array, power: float) -> jax.Array:
    """Raises logarithms whose product with `power` would overflow, as of a class masked by the dtype's minimum."""
    return jnp.maximum(log_p, float(jnp.finfo(log_p.dtype).min) / (1 + power))


def _secant(a: jax.Array, b: jax.Array, factor: jax.Array) -> jax.Array:
    """Computes factor * (exp(a) - exp(b)) / (a - b) for exponents <= 0, elementwise; factor * exp(a) where a equals b.

    The factor is a multiple of a - b. Their quotient comes first: 1 / (a - b) alone underflows for a masked class.
    """
    gap = jnp.abs(a - b)
    apart = gap > 0
    gap = jnp.where(apart, gap, 1.0)
    return jnp.exp(jnp.maximum(a, b)) * jnp.where(apart, -jnp.expm1(-gap) * (factor / gap), factor)

"""Losses that compare whole softmaxes (kd, ctkd, ttm, wttm), and the standardisation of logits.

Each is the bare term, without cross-entropy, warm-up or outer weight.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import MethodConfig, Positive, computed_in, prepare_logits
from ldrld_jax.losses.entropy import entropy_weight


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KDConfig(MethodConfig):
    """Hinton's distillation.

    Attributes:
      temperature: T > 0 of both sides; the loss is multiplied by T^2.
      standardize: whether to standardise both sides' logits first.
      entropy_weighting: whether to multiply each example by its entropy weight (EA-KD).
      entropy_temperature: t > 0 of the entropies in the entropy weight.
      entropy_bound: > 0, the divisor H_ub of the student's entropy in the entropy weight; None for log C. The
        published CIFAR-100 code uses 100.
    """

    temperature: Positive = 4.0
    standardize: bool = False
    entropy_weighting: bool = False
    entropy_temperature: Positive = 3.0
    entropy_bound: Positive | None = None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class CTKDConfig(MethodConfig):
    """Curriculum temperature: no settings, because the temperature is learnt."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class TTMConfig(MethodConfig):
    """Transformed teacher matching.

    Attributes:
      gamma: >= 0, the power of the teacher's probabilities; it corresponds to 1/T of kd.
    """

    gamma: float = 0.1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class WTTMConfig(MethodConfig):
    """Weighted transformed teacher matching.

    Attributes:
      gamma: >= 0, the power of the teacher's probabilities; their sum is the example's weight.
    """

    gamma: float = 0.2


def standardize_logits(logits: jax.Array) -> jax.Array:
    r"""Standardises logits to zero mean and unit deviation per example, `[..., C]` to `[..., C]`.

    .. math:: z \leftarrow (z - \bar z) / (\mathrm{std}(z) + 10^{-7})

    The deviation is the sample deviation (ddof = 1). Equal logits give 0; the gradient there is finite
    but 10^7 times the incoming one, as the formula implies: do not start a student at 0.

    This is a transform of both sides, not a loss: `ldrld_jax.losses.standardized` applies it before any method.
    It was published with temperature 2.

    Args:
      logits: `[..., C]`, any float dtype.

    Returns:
      An array of the same shape, float32 (float64 for float64 logits).

    Example:
      >>> standardize_logits(jnp.array([[1.0, 2.0, 3.0]])).round(3).tolist()
      [[-1.0, 0.0, 1.0]]

    References:
      Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    logits = logits.astype(computed_in(logits))
    # The result is compared with itself, as in rld's "below the label". XLA may compute it once for each use, with or
    # without the mean's multiplication contracted into the subtraction, and equal logits would differ. It contracts
    # nothing that is rounded after the multiplication.
    float_type = jnp.finfo(logits.dtype)
    scale = numerics.down_scale(logits)
    logits = scale * logits
    mean = jax.lax.reduce_precision(jnp.mean(logits, axis=-1, keepdims=True), float_type.nexp, float_type.nmant - 1)
    centred = logits - mean
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    return centred / (numerics.sqrt(variance) + 1e-7 * scale)


def kd_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: KDConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Computes Hinton's distillation loss, per example.

    .. math:: T^2 \, \mathrm{KL}\big(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\big)

    With `entropy_weighting` (EA-KD) each example is multiplied by

    .. math:: w = \tfrac12 \big(H_t + H_t H_s / H_{ub}\big)

    which carries no gradient. H are the entropies of the softmaxes at the entropy temperature, of the
    logits before any standardisation. The weights reach log C, so they also scale the loss.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `KDConfig`.
      where: `[...]` bool; rows where it is False give 0 and may hold NaN.

    Returns:
      `[...]`, float32 (float64 for float64 logits), in nats times T^2.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> z = jnp.array([[2.0, 0.0, -2.0]])
      >>> float(kd_terms(z, z, KDConfig(temperature=4.0))[0])
      0.0

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, eq. 1;
      agrees with mdistiller's KD to 1e-10 (tests/losses/baselines_test.py). "EA-KD: Entropy-based
      Adaptive Knowledge Distillation", ICCV 2025.
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    weight: float | jax.Array = 1.0
    if cfg.entropy_weighting:
        weight = entropy_weight(teacher, student, cfg.entropy_temperature, cfg.entropy_bound)
    if cfg.standardize:
        teacher, student = standardize_logits(teacher), standardize_logits(student)
    return weight * cfg.temperature**2 * numerics.kl(teacher, student, cfg.temperature)


def ctkd_init(cfg: CTKDConfig) -> dict[str, jax.Array]:
    """Returns the learnt parameter of ctkd: a scalar theta = 1, i.e. T = 15.6, in the default float dtype."""
    del cfg
    return {"theta": jnp.ones(())}


def ctkd_temperature(params: dict[str, jax.Array]) -> jax.Array:
    r"""Computes the learnt temperature, between 1 and 21.

    .. math:: T = 1 + 20 \, \mathrm{sigmoid}(\theta)

    Example:
      >>> print(f"{ctkd_temperature(ctkd_init(CTKDConfig())):.2f}")
      15.62
    """
    return 1 + 20 * jax.nn.sigmoid(params["theta"])


def ctkd_gradient_scale(epoch: float | jax.Array) -> jax.Array:
    r"""Returns the factor of theta's gradient: it is negative, so that the temperature makes the task harder.

    .. math:: -\big(1 - \cos(\pi \min(e, 10) / 10)\big) / 2

    It falls from 0 at the start to -1 at epoch 10 and stays there. It depends on the epoch, not on the
    logits, so `ctkd_terms` returns the plain gradient and the owner of the optimizer applies the factor.

    Args:
      epoch: e >= 0, a number or a scalar array, with or without a fraction.

    Example:
      >>> [round(float(ctkd_gradient_scale(e)), 3) for e in (0, 5, 10, 99)]
      [-0.0, -0.5, -1.0, -1.0]
    """
    return -(1 - jnp.cos(jnp.pi * jnp.minimum(epoch, 10) / 10)) / 2


def ctkd_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: CTKDConfig,
    *,
    params: dict[str, jax.Array] | None = None,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the curriculum temperature loss, per example: kd at a learnt temperature.

    .. math:: T^2 \, \mathrm{KL}\big(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\big), \quad
              T = 1 + 20 \, \mathrm{sigmoid}(\theta)

    The gradient flows into the student and, through T on both sides and through T^2, into theta.
    It is the plain gradient: multiply theta's by `ctkd_gradient_scale(epoch)` before the update, so
    that the temperature ascends the loss that the student descends.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `CTKDConfig`.
      params: the result of `ctkd_init`, which is also used for None.
      where: `[...]` bool; rows where it is False give 0 and may hold NaN.

    Returns:
      `[...]`, float32 (float64 for float64 logits), in nats times T^2.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher, student = jnp.array([[2.0, 0.0, -2.0]]), jnp.array([[0.0, 0.0, 0.0]])
      >>> print(f"{ctkd_terms(teacher, student, CTKDConfig())[0]:.3f}")
      1.328

    References:
      Li et al., "Curriculum Temperature for Knowledge Distillation", AAAI 2023, global temperature.
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    params = ctkd_init(cfg) if params is None else params
    temperature = ctkd_temperature(params).astype(student.dtype)
    return temperature**2 * numerics.kl(teacher, student, temperature)


def _power_matching(teacher: jax.Array, student: jax.Array, gamma: float) -> tuple[jax.Array, jax.Array]:
    """Computes KL(norm(p_t^gamma) || p_s) and the log of the normaliser, log sum p_t^gamma; both `[...]`."""
    power = gamma * numerics.log_softmax(teacher, 1.0)
    log_mass = jax.nn.logsumexp(power, axis=-1, keepdims=True)
    return numerics.divergence(power - log_mass, numerics.log_softmax(student, 1.0)), log_mass[..., 0]


def ttm_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: TTMConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Computes transformed teacher matching, per example: only the teacher has a temperature.

    .. math:: \mathrm{KL}\Big(\frac{p_t^\gamma}{\sum_c p_{t,c}^\gamma} \,\Big\|\, p_s\Big)

    with both probabilities at temperature 1. gamma takes the place of 1/T, and there is no factor T^2.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `TTMConfig`.
      where: `[...]` bool; rows where it is False give 0, the value of equal logits, and may hold NaN.

    Returns:
      `[...]`, float32 (float64 for float64 logits), in nats.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher, student = jnp.array([[20.0, 0.0, -20.0]]), jnp.array([[2.0, 0.0, -2.0]])
      >>> float(ttm_terms(teacher, student, TTMConfig(gamma=0.1))[0])
      0.0

    References:
      Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024;
      agrees with the published code to 1e-10 (tests/losses/baselines_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    return _power_matching(teacher, student, cfg.gamma)[0]


def wttm_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: WTTMConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Computes weighted transformed teacher matching, per example: ttm with more weight if the teacher is unsure.

    .. math:: \Big(\sum_c p_{t,c}^\gamma\Big) \,
              \mathrm{KL}\Big(\frac{p_t^\gamma}{\sum_c p_{t,c}^\gamma} \,\Big\|\, p_s\Big)

    Arguments, errors and source are those of `ttm_terms`, with a `WTTMConfig`. For gamma <= 1 the factor
    is between 1 (a teacher that is sure) and C^(1 - gamma).

    Returns:
      `[...]`, float32 (float64 for float64 logits).

    Example:
      >>> teacher, student = jnp.zeros((1, 4)), jnp.array([[2.0, 0.0, 0.0, 0.0]])
      >>> ttm = ttm_terms(teacher, student, TTMConfig(gamma=0.5))
      >>> print(f"{(wttm_terms(teacher, student, WTTMConfig(gamma=0.5)) / ttm)[0]:.3f}")
      2.000
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    divergence, log_mass = _power_matching(teacher, student, cfg.gamma)
    return jnp.exp(log_mass) * divergence

"""Losses with statistics over the whole batch: skd, luminet.

Each is the bare term, without cross-entropy, warm-up or outer weight. Leading axes are flattened to N
rows. Rows of weight 0 are ignored, and the other weights are scaled to a mean of 1. N counts the global
batch under `jit` over a mesh, and under `pmap` or `shard_map` only if `axis_name` is given.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import MethodConfig, Positive, batch_rows, mean_over_rows
from ldrld_jax.losses.divergence import AxisName


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class SKDConfig(MethodConfig):
    """Distillation of the directions between examples.

    Attributes:
      temperature: T > 0 of the KL, which is multiplied by T^2; the directions use no temperature.
      ridge: > 0, added to the diagonal of the covariance.
      kl_weight: weight of the KL.
      direction_weight: weight of the directions.
      batch_masks: whether to multiply the KL and the directions by the published code's factors, about .5 each. The
        published weights, ce_weight .1 and kd_weight .9, belong to terms with these factors; without them, as by
        default, the terms weigh about twice as much.
    """

    temperature: Positive = 4.0
    ridge: Positive = 0.1
    kl_weight: float = 1.0
    direction_weight: float = 1.0
    batch_masks: bool = False


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LumiNetConfig(MethodConfig):
    """Distillation of logits that are standardised per class.

    Attributes:
      temperature: T > 0 of the softmaxes of the standardised logits.
      alpha: the loss is multiplied by alpha^2, which takes the place of T^2.
    """

    temperature: Positive = 4.0
    alpha: float = 33.0


def skd_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: SKDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    r"""Computes the KL of each example, and a Mahalanobis distance of the cosines between examples.

    .. math:: w_k f_B T^2 \, \mathrm{KL}(p_t \| p_s) + w_d f_C \, \frac1N \sum_i \sqrt{D_i S^{-1} D_i^T}, \quad
              D = \frac1C (\bar Z_s \bar Z_s^T - \bar Z_t \bar Z_t^T), \quad
              S = \mathrm{cov}(D) + \mathrm{ridge} \cdot I

    with :math:`\bar Z` the `[N, C]` logits, each row divided by its norm, D_i the rows of D, and cov their
    covariance (ddof 1), a function of the student. The loss compares examples, so it is not a mean over them.

    With `batch_masks`, f_B is the share of examples whose largest teacher probability (T = 1) is at
    most the batch's median, and f_C is the share of classes whose summed teacher probability is at most
    the classes' median. Otherwise both are 1.

    The second part is 0 if the student's cosines equal the teacher's, where the slope of the root is taken
    as 0, and for a single row, which has no cosines. A row of zeros has a finite but large slope of 10^12:
    do not start a student at 0. Shifting a row's logits changes its direction.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: an `SKDConfig`.
      where: `[...]` bool; only rows where it is True are compared, the others may hold NaN.
      weights: `[...]`, non-negative; each row's share in the means, in D_i and in the covariance.
      axis_name: inside `pmap` or `shard_map`, the mapped axes over which the batch is split.

    Returns:
      "kl" and "direction": scalars, float32 (float64 for float64 logits), 0 if no row counts. Time
      grows with N^3, memory with N^2.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> parts = skd_parts(teacher, teacher[::-1], SKDConfig(temperature=1.0))  # the same angle between both
      >>> print(f"{parts['kl']:.3f} {parts['direction']:.3f}")
      1.080 0.000

    References:
      SKD, CVPR 2026; agrees with the published code (HyunJunSik/StreamLined) to 1e-9
      (tests/losses/golden_2026_test.py).
    """
    teacher, student, kept, count = batch_rows(teacher_logits, student_logits, where, weights, axis_name)
    kl = numerics.kl(teacher, student, cfg.temperature)
    distances = jnp.where(count > 1, _direction_distances(teacher, student, kept, count, cfg.ridge), 0.0)
    parts = {
        "kl": cfg.kl_weight * cfg.temperature**2 * mean_over_rows(kl, weights=kept),
        "direction": cfg.direction_weight * mean_over_rows(distances, weights=kept),
    }
    if cfg.batch_masks:
        p = jax.nn.softmax(teacher)
        classes = jnp.sum(kept[:, None] * p, axis=0)
        parts["kl"] *= _share_up_to_median(jnp.max(p, axis=-1), kept)
        parts["direction"] *= _share_up_to_median(classes, jnp.ones_like(classes))
    return parts


def _direction_distances(
    teacher: jax.Array, student: jax.Array, weights: jax.Array, count: jax.Array, ridge: float
) -> jax.Array:
    """Computes the Mahalanobis length of each row of the difference of cosines, `[N]`.

    A row of weight w acts as w equal rows: its entries carry sqrt(w) in D_i and in the covariance.
    """
    teacher, student = (numerics.down_scale(z) * z for z in (teacher, student))
    norm = lambda z: numerics.sqrt(jnp.sum(z**2, axis=-1, keepdims=True))  # noqa: E731  # of slope 0 at 0
    of_teacher, of_student = (z / jnp.maximum(norm(z), 1e-12) for z in (teacher, student))
    dot = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    # A A' - B B' = ((A - B)(A + B)' + its transpose) / 2 avoids subtracting large numbers if A is near B.
    product = dot(of_student - of_teacher, (of_student + of_teacher).T)
    root = numerics.sqrt(weights)[:, None]
    rows = root * (product + product.T) / (2 * student.shape[-1])  # sqrt(W) D, whose columns are the D_i
    centred = (rows - dot(rows, weights[:, None]) / jnp.maximum(count, 1.0)) * root.T
    covariance = dot(centred, centred.T) / jnp.maximum(count - 1, 1.0)
    factor = jnp.linalg.cholesky(covariance + ridge * jnp.eye(len(rows), dtype=rows.dtype))
    return numerics.sqrt(jnp.sum(jax.scipy.linalg.solve_triangular(factor, rows, lower=True) ** 2, axis=0))


def _share_up_to_median(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the share of weight on values up to the median, by counting smaller values: no sort, no gather."""
    smaller = jnp.sum(jnp.where(values[None] < values[:, None], weights[None], 0.0), axis=-1)
    total = jnp.sum(weights)
    # A value with exactly half the weight below it is above the median; the margin absorbs rounding.
    up_to = 2 * smaller < total * (1 - 1e-6)
    return jnp.sum(jnp.where(up_to, weights, 0.0)) / jnp.where(total > 0, total, 1.0)


def luminet_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LumiNetConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    r"""Computes the KL of logits that are standardised per class over the batch, each side by itself.

    .. math:: \alpha^2 \, \mathrm{KL}\big(\sigma(\hat z^t / T) \,\|\, \sigma(\hat z^s / T)\big), \quad
              \hat z_{ic} = \frac{z_{ic} - \mathrm{mean}_c}{\sqrt{\mathrm{var}_c + 10^{-5}}}

    with the population variance. The statistics span the batch, so the loss is not a mean over examples. A
    single row gives 0. A class that is constant over the batch is divided by .003, so its gradients are large.
    In float32, logits are clipped to +-2.3e18, so that no variance overflows.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `LumiNetConfig`.
      where: `[...]` bool; only rows where it is True enter the mean and the statistics, the others may hold NaN.
      weights: `[...]`, non-negative; each row's share in the mean and in the statistics.
      axis_name: inside `pmap` or `shard_map`, the mapped axes over which the batch is split.

    Returns:
      "": a scalar, float32 (float64 for float64 logits), 0 if no row counts.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> cfg = LumiNetConfig(temperature=1.0, alpha=1.0)
      >>> print(f"{luminet_parts(teacher, 3 - 2 * teacher, cfg)['']:.3f}")
      1.447

    References:
      "LumiNet: Perception-Driven Knowledge Distillation via Statistical Logit Calibration", TMLR 2025;
      agrees with the published code to 1e-9 (tests/losses/golden_2026_test.py).
    """
    teacher, student, kept, count = batch_rows(teacher_logits, student_logits, where, weights, axis_name)
    teacher, student = (_standardized_classes(z, kept, count) for z in (teacher, student))
    return {"": cfg.alpha**2 * mean_over_rows(numerics.kl(teacher, student, cfg.temperature), weights=kept)}


def _standardized_classes(z: jax.Array, weights: jax.Array, count: jax.Array) -> jax.Array:
    """Returns logits `[N, C]` with mean 0 and variance 1 in each class over the rows that count."""
    share, limit = weights[:, None] / jnp.maximum(count, 1.0), 2.0 ** (jnp.finfo(z.dtype).maxexp // 2 - 3)
    mean = lambda x: jnp.sum(share * x, axis=0, keepdims=True)  # noqa: E731
    z = jnp.clip(z, -limit, limit)
    centred = z - mean(z)
    return centred * jax.lax.rsqrt(mean(centred**2) + 1e-5)

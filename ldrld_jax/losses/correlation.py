"""Losses that relate the examples of a batch to each other: dist, mlkd.

Each is the bare term, without cross-entropy, warm-up or outer weight. Neither is a mean of per-example
values, so `*_parts` takes the mask and the weights and returns scalars. Leading axes are flattened to N
rows. Rows of weight 0 are ignored, and the other weights are scaled to a mean of 1, so that only their
ratios matter.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import MethodConfig, Positive, batch_rows, check_views, mean_over_rows
from ldrld_jax.losses.divergence import AxisName


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DISTConfig(MethodConfig):
    """Distillation by correlation.

    Attributes:
      beta: weight of the correlation over classes.
      gamma: weight of the correlation over the batch.
      temperature: T > 0 of the softmaxes; the loss is multiplied by T^2.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: Positive = 4.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLKDConfig(MethodConfig):
    """Multi-level distillation.

    Attributes:
      views: 1, or 2 for logits `[2, ..., C]` of two augmentations of every image.

    Raises:
      ValueError: if views is neither 1 nor 2.
    """

    views: Literal[1, 2] = 1


_MLKD_TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


def _pearson(a: jax.Array, b: jax.Array, weights: jax.Array, count: jax.Array | int) -> jax.Array:
    r"""Computes the weighted correlation of two arrays `[M, K]` along K, `[M]`; 0 where either is constant.

    .. math:: \rho = \frac{\langle a, b \rangle}{|a| |b| + 10^{-8}} \text{ of the centred vectors}

    Args:
      a: `[M, K]`.
      b: `[M, K]`.
      weights: `[1, K]`, adding up to `count`.
      count: the number of entries of K that count.
    """
    a, b = (x - jnp.sum(weights * x, axis=-1, keepdims=True) / count for x in (a, b))
    dot = lambda x, y: jnp.sum(weights * x * y, axis=-1)  # noqa: E731
    return dot(a, b) / (numerics.sqrt(dot(a, a)) * numerics.sqrt(dot(b, b)) + 1e-8)


def dist_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: DISTConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    r"""Computes the dist loss: correlations in place of divergences.

    .. math:: T^2 \Big[\beta \Big(1 - \frac1N \sum_i \rho(P^t_{i \cdot}, P^s_{i \cdot})\Big)
              + \gamma \Big(1 - \frac1C \sum_c \rho(P^t_{\cdot c}, P^s_{\cdot c})\Big)\Big]

    with P the `[N, C]` softmaxes at T and rho the centred cosine with 1e-8 added to its denominator.
    A single row has no correlation over the batch: rho is 0 and the second part is the constant
    gamma T^2. If the student's logits are all equal, the slope of rho is finite but large, up to
    1e8: do not start a student at 0.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `DISTConfig`.
      where: `[...]` bool; only rows where it is True are correlated, the others may hold NaN.
      weights: `[...]`, non-negative; each row's share in the mean and in the correlations.
      axis_name: inside `pmap` or `shard_map`, the mapped axes over which the batch is split.

    Returns:
      "inter" (over classes) and "intra" (over the batch): scalars, float32 (float64 for float64
      logits), 0 if no row counts.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> parts = dist_parts(teacher, -teacher, DISTConfig(temperature=1.0))
      >>> print(f"{parts['inter']:.3f} {parts['intra']:.3f}")
      1.838 1.333

    References:
      Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022;
      agrees with the published code to 1e-10 (tests/losses/baselines_test.py).
    """
    teacher, student, kept, count = batch_rows(teacher_logits, student_logits, where, weights, axis_name)
    p, q = (numerics.softmax(z, cfg.temperature) for z in (teacher, student))
    q = jnp.where(jnp.isnan(student), jnp.nan, q)  # XLA's exp of a NaN may be a number
    over_classes = _pearson(p, q, jnp.ones((1, q.shape[-1]), q.dtype), q.shape[-1])
    over_batch = _pearson(p.T, q.T, kept[None], jnp.maximum(count, 1.0))
    scale = cfg.temperature**2
    return {
        "inter": cfg.beta * scale * mean_over_rows(1 - over_classes, weights=kept),
        "intra": cfg.gamma * scale * jnp.where(count > 0, 1 - jnp.mean(over_batch), 0.0),
    }


def _gram_distance(teacher: jax.Array, student: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Computes the squared distances of the Gram matrices of two `[N, C]` arrays, over classes and over rows.

    .. math:: \|A^T W A - B^T W B\|_F^2, \quad \|\sqrt W (A A^T - B B^T) \sqrt W\|_F^2

    With D = A - B and S = A + B, A'A - B'B = (D'S + S'D) / 2 needs one product instead of two, and
    subtracts no large numbers if the student is near the teacher. Both distances follow from products of one
    side, rows or classes: |D'S + S'D|^2 / 2 = tr(DD' SS') + tr(DS' DS'). The smaller side is used, so that no matrix
    is larger than `[min(N, C), min(N, C)]`.
    """
    difference, total = teacher - student, teacher + student
    dot = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    by_rows = len(teacher) <= teacher.shape[-1]
    if by_rows:
        shares = weights[:, None] * weights[None]
        within = shares * dot(difference, difference.T) * dot(total, total.T)
        across = dot(difference, total.T)
    else:
        shares = jnp.ones((), teacher.dtype)
        weighted = weights[:, None] * total
        within = dot(difference.T, weights[:, None] * difference) * dot(total.T, weighted)
        across = dot(difference.T, weighted)
    this_side = jnp.sum(shares * ((across + across.T) / 2) ** 2)
    other_side = jnp.sum(within + shares * across * across.T) / 2
    return (other_side, this_side) if by_rows else (this_side, other_side)


def _mlkd_view(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    where: jax.Array | None,
    weights: jax.Array | None,
    axis_name: AxisName,
) -> dict[str, jax.Array]:
    """Computes the parts of mlkd for one view, `[..., C]`."""
    teacher, student, kept, count = batch_rows(teacher_logits, student_logits, where, weights, axis_name)

    def at(temperature: jax.Array) -> dict[str, jax.Array]:
        log_p, log_q = (numerics.log_softmax(z, temperature) for z in (teacher, student))
        classes, batch = _gram_distance(jnp.exp(log_p), jnp.exp(log_q), kept)
        return {
            "instance": temperature**2 * mean_over_rows(numerics.divergence(log_p, log_q), weights=kept),
            "class": classes / student.shape[-1],
            "batch": batch / jnp.maximum(count, 1.0),
        }

    return jax.tree.map(jnp.sum, jax.vmap(at)(jnp.asarray(_MLKD_TEMPERATURES, student.dtype)))


def mlkd_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: MLKDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    r"""Computes the multi-level loss: instances, classes and the batch, at five temperatures.

    .. math:: \sum_{T=2}^{6} T^2 \, \mathrm{KL}(P_t \| P_s) + \frac1C \|P_t^T P_t - P_s^T P_s\|_F^2
              + \frac1N \|P_t P_t^T - P_s P_s^T\|_F^2

    with P the `[N, C]` softmaxes at T. With two views the result is the mean of the two views' losses, each
    with its own matrices. It is a mean because the cross-entropy is a mean over both views, too.

    The published code differs from this formula: its class and batch terms use the weak view alone; the
    weak view's terms are multiplied by the mean of a confidence mask, about 0.5; at T = 2 and 6 its
    KL of the strong view is in fact that of the weak one; and it adds up the views, with
    cross-entropy on both, over 480 epochs.

    Args:
      teacher_logits: `[..., C]`, or `[2, ..., C]` for `views=2`, any float dtype; no gradient flows into it.
      student_logits: the same shape.
      cfg: an `MLKDConfig`.
      where: bool, the shape of the logits without classes; rows where it is False may hold NaN.
      weights: the same shape, non-negative; each row's share in the mean and in the matrices.
      axis_name: inside `pmap` or `shard_map`, the mapped axes over which the batch is split.

    Returns:
      "instance", "class" and "batch": scalars, float32 (float64 for float64 logits), 0 if no row
      counts. Time grows with N C min(N, C); no matrix is larger than the five softmaxes.

    Raises:
      ValueError: if the shapes differ, a dtype is not floating, or views is 2 and the first axis is not 2.

    Example:
      >>> z = jnp.array([[2.0, 0.0, -2.0], [0.0, 1.0, 0.0]])
      >>> {name: float(part) for name, part in mlkd_parts(z, z, MLKDConfig()).items()}
      {'batch': 0.0, 'class': 0.0, 'instance': 0.0}

    References:
      Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
    """
    if cfg.views == 1:
        return _mlkd_view(teacher_logits, student_logits, where, weights, axis_name)
    arrays = {"teacher_logits": teacher_logits, "student_logits": student_logits, "where": where, "weights": weights}
    check_views("mlkd with views=2", "Stack the two views, or set loss.mlkd.views=1.", **arrays)

    def view(i: int) -> dict[str, jax.Array]:
        kept, shares = (None if array is None else jnp.asarray(array)[i] for array in (where, weights))
        return _mlkd_view(jnp.asarray(teacher_logits)[i], jnp.asarray(student_logits)[i], kept, shares, axis_name)

    return jax.tree.map(lambda a, b: (a + b) / 2, view(0), view(1))

"""wkd, distillation by optimal transport between classes, and its transport cost.

The loss is the bare term, without cross-entropy, warm-up or outer weight.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import Between, MethodConfig, Positive, computed_in, prepare_logits

_TINY = 1e-8  # added to costs and divisors, as in the published code


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class WKDConfig(MethodConfig):
    """Distillation by a Wasserstein distance.

    Attributes:
      temperature: T > 0 of the two distributions between which mass is moved.
      gamma: weight of the transport.
      regularization: > 0, entropy regularisation; small values are closer to the true transport but converge slower.
      iterations: the number of iterations of Sinkhorn's algorithm, at least 1.

    Raises:
      ValueError: if iterations is below 1.
    """

    temperature: Positive = 8.0
    gamma: float = 600.0
    regularization: Positive = 0.05
    iterations: Annotated[int, Between(1)] = 10


def wkd_cost(rows: jax.Array, *, sharpen: float = 1.0) -> jax.Array:
    r"""Computes wkd's cost between classes from the teacher's weights or features.

    .. math:: 1 - e^{-\mathrm{sharpen} \cdot d_{jk}}

    with d_jk one minus the cosine of the two classes' rows of the last layer, or one minus the linear CKA
    of their features: the cosine of the two centred Gram matrices.

    Args:
      rows: `[C, d]`, the last layer's weights, one row per class; or `[C, n, d]`, features of n >= 2
        training examples of each class. A class whose row is 0 is at distance 1 from all others.
      sharpen: >= 0; 0 returns the distance d itself.

    Returns:
      `[C, C]`, symmetric, 0 on the diagonal; float32 (float64 for float64 rows), without gradient.

    Raises:
      ValueError: if the rows have another number of axes, there is one example of each class, or sharpen is negative
        or not finite.

    Example:
      >>> wkd_cost(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), sharpen=0).tolist()
      [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]

    References:
      Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024.
    """
    if rows.ndim not in (2, 3) or (rows.ndim == 3 and rows.shape[1] < 2):
        raise ValueError(f"rows must be [classes, d] or features [classes, n >= 2, d], got shape {rows.shape}.")
    if not 0 <= sharpen < math.inf:
        raise ValueError(f"sharpen must be finite and not negative, got {sharpen}.")
    rows = jax.lax.stop_gradient(rows).astype(computed_in(rows))
    dot = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    if rows.ndim == 3:
        centred = rows - jnp.mean(rows, axis=1, keepdims=True)
        rows = dot(centred, jnp.swapaxes(centred, 1, 2)).reshape(len(rows), -1)
    norm = numerics.sqrt(jnp.sum(rows**2, axis=-1, keepdims=True))
    rows = rows / jnp.where(norm > 0, norm, 1.0)
    distance = jnp.where(jnp.eye(len(rows), dtype=bool), 0.0, 1 - dot(rows, rows.T))
    return -jnp.expm1(-sharpen * distance) if sharpen else distance


def wkd_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    labels: jax.Array,
    cfg: WKDConfig,
    *,
    params: jax.Array | None = None,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""Computes the cost of turning the student's distribution into the teacher's, per example.

    .. math:: -p_{t,y} \log p_{s,y} + \gamma \sum_{jk} u_j K_{jk} v_k c_{jk}, \quad K = e^{-c / \mathrm{regularization}}

    with p at temperature 1, and u, v from `iterations` rounds of Sinkhorn between the softmaxes at T of
    student (j) and teacher (k) over the classes c != y, starting at u = 1 / (C - 1). The gradient flows
    through all rounds. After them the student's marginal holds exactly and the teacher's approximately. The
    loss does not include the entropy. The published recipe lowers gamma to 0 by a cosine from epoch 150 to
    240; here it is constant.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      labels: `[...]` integer classes.
      cfg: a `WKDConfig`.
      params: the cost `[C, C]` of moving mass from class j to class k, as returned by `wkd_cost`; negative
        entries count as 0. It is not learnt: no gradient flows into it.
      where: `[...]` bool; rows where it is False give a constant and may hold NaN and any label.

    Returns:
      "target" and "transport": `[...]`, float32 (float64 for float64 logits), the latter times gamma.
      With two classes only one is left and nothing can be moved. Time and memory grow with rows times
      C^2 and with the iterations.

    Raises:
      ValueError: if C < 2, the shapes differ, a dtype is not floating, the labels are not integers below C,
        or the cost is missing or not `[C, C]`.

    Example:
      >>> teacher, student = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[2.0, 0.0, 1.0]])
      >>> cfg = WKDConfig(temperature=1, gamma=1, regularization=0.2, iterations=100)
      >>> terms = wkd_terms(teacher, student, jnp.array([0]), cfg, params=1 - jnp.eye(3))
      >>> print(f"{terms['target'][0]:.3f} {terms['transport'][0]:.3f}")  # .731 - .269 has to be moved
      0.271 0.462

    References:
      Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
      NeurIPS 2024, WKD-L; agrees with the published code to 1e-9 (tests/losses/golden_2026_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    numerics.check_class_count("wkd", student, 2)
    student, target = numerics.with_labels(labels, student, where)
    of_teacher, of_student = (numerics.log_softmax(z, 1.0) for z in (teacher, student))
    label_term = -jnp.exp(numerics.pick(of_teacher, target)) * numerics.pick(of_student, target)
    cost = _checked_cost(params, student)
    kernel = jnp.exp(-cost / cfg.regularization)
    dot = lambda a, b: jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    # The label's class has no mass on either side and receives none, so the cost keeps all classes.
    log_mass = (numerics.log_ratio(z, ~target, cfg.temperature) for z in (student, teacher))
    from_student, to_teacher = (jnp.exp(jnp.where(target, -jnp.inf, x)) for x in log_mass)

    def sinkhorn(scales: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        v = to_teacher / (dot(scales[0], kernel) + _TINY)
        return (from_student / (dot(v, kernel.T) + _TINY), v), None

    start = jnp.where(target, 0.0, jnp.full_like(student, 1 / (student.shape[-1] - 1)))
    (u, v), _ = jax.lax.scan(sinkhorn, (start, start), length=cfg.iterations)
    moved = jnp.sum(u * dot(v, (kernel * cost).T), axis=-1)
    return {"target": label_term, "transport": cfg.gamma * moved}


def _checked_cost(cost: jax.Array | None, logits: jax.Array) -> jax.Array:
    """Returns the cost, clipped and offset as in the published code, in the dtype of the logits."""
    classes = logits.shape[-1]
    if cost is None:
        raise ValueError(
            f"wkd needs params, the cost [{classes}, {classes}] between classes. Make it with "
            "ldrld_jax.losses.wkd_cost from the teacher's last layer or features."
        )
    if jnp.shape(cost) != (classes, classes):
        raise ValueError(f"wkd needs params of shape ({classes}, {classes}), a cost per pair, got {jnp.shape(cost)}.")
    return jnp.maximum(jax.lax.stop_gradient(jnp.asarray(cost)).astype(logits.dtype), 0.0) + _TINY

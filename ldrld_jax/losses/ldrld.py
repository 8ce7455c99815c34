"""Local Dense Relational Logit Distillation (ICCV 2025)."""

import dataclasses
import functools
import operator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.losses.common import MethodConfig, Positive, mean_over_rows, prepare_logits


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LDRLDConfig(MethodConfig):
    """How LDRLD compares two rows of logits; the defaults are the official ResNet32x4 -> ResNet8x4 run's.

    Attributes:
      depth: d, how many of the largest classes are compared pair by pair; 2 <= d <= C.
      temperature: T > 0 of every softmax; every term is multiplied by T^2.
      alpha: weight of the local part (pairs and integrity).
      beta: weight of the remainder.
      rank_by: whose logits choose and rank the d classes; the paper takes the student's.
      irw_epsilon: eps > 0 of the inverse rank weight, 1 / (|i - j| + eps).
      erd_scale: delta of the exponential rank decay, delta exp(-lambda (i + j)).
      erd_decay: lambda of the same.
      use_irw: False sets the inverse rank weight to 1.
      use_erd: False sets the exponential rank decay to 1, delta with it.
      pair_reduction: "mean" divides the local part by d(d-1)/2 + 1, as the official code does;
        "sum" is the paper's formula.
      use_integrity: False drops the local softmax over the d classes; the divisor stays.
      use_remainder: False drops the term over the other C - d classes.

    Raises:
      ValueError: if a field is out of its range.

    Example:
      >>> LDRLDConfig(depth=5, beta=1).beta
      1.0
    """

    depth: int = 7
    temperature: Positive = 4.0
    alpha: float = 10.5
    beta: float = 7.0
    rank_by: Literal["student", "teacher"] = "student"
    irw_epsilon: Positive = 1.5
    erd_scale: float = 2.0
    erd_decay: float = 0.05
    use_irw: bool = True
    use_erd: bool = True
    pair_reduction: Literal["mean", "sum"] = "mean"
    use_integrity: bool = True
    use_remainder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 2:
            raise ValueError(f"depth must be at least 2, got {self.depth}. Raise loss.ldrld.depth.")


class LDRLDTerms(NamedTuple):
    """LDRLD's three parts per example, `[...]`, each already times T^2 and before alpha and beta."""

    pairs: jax.Array
    integrity: jax.Array
    remainder: jax.Array


def rank_weights(cfg: LDRLDConfig) -> jax.Array:
    r"""The adaptive decay weight of every pair of ranks.

    .. math:: w(i, j) = \frac{1}{|i - j| + \epsilon} \cdot \delta e^{-\lambda (i + j)}, \quad 1 \le i < j \le d

    Args:
      cfg: depth, irw_epsilon, erd_scale, erd_decay and the two switches.

    Returns:
      `[d, d]` in the default float dtype; entry `[i - 1, j - 1]` is w(i, j), 0 on and below the diagonal.

    Example:
      >>> w = rank_weights(LDRLDConfig(depth=7))
      >>> print(f"{w[0, 1]:.4f} {w[5, 6]:.4f} {w.sum():.4f}")
      0.6886 0.4176 7.7237

    References:
      Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025, arXiv 2507.15911.
    """
    return jnp.asarray(_rank_weights(cfg), jnp.result_type(float))


def _rank_weights(cfg: LDRLDConfig) -> np.ndarray:
    rank = np.arange(1.0, cfg.depth + 1)
    i, j = rank[:, None], rank[None, :]
    irw = 1 / (np.abs(i - j) + cfg.irw_epsilon) if cfg.use_irw else 1.0
    erd = cfg.erd_scale * np.exp(-cfg.erd_decay * (i + j)) if cfg.use_erd else 1.0
    return np.triu(irw * erd * np.ones((cfg.depth, cfg.depth)), k=1)


def _top(logits: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """The largest of `logits` `[C]`: indices `[d]`, descending, and a mask `[C]` over them.

    Of tied logits the lower index comes first.

    Repeated argmax rather than `lax.top_k`: top_k gathers a batch-sharded array onto every device,
    and on CPU it may turn into a full sort.
    """
    taken = jnp.zeros(logits.shape, bool)
    indices = []
    for _ in range(depth):
        indices.append(jnp.argmax(jnp.where(taken, -jnp.inf, logits)))
        taken = taken | (jnp.arange(logits.size) == indices[-1])
    return jnp.stack(indices), taken


def _kl(teacher: jax.Array, student: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over the classes `[C]` that `where` keeps."""
    log_p = jax.nn.log_softmax(teacher, where=where)
    log_q = jax.nn.log_softmax(student, where=where)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), where=where)


def _pair_kl(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """KL of the two-way softmaxes over a pair with the scaled logit differences `teacher` and `student`.

    A two-way softmax is a Bernoulli distribution whose logit is the difference, hence log_sigmoid.
    """
    p = jax.nn.sigmoid(teacher)
    first = jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student)
    second = jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student)
    return p * first + (1 - p) * second


def _example_terms(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> LDRLDTerms:
    """The three parts for one example, logits `[C]`."""
    ranking = teacher if cfg.rank_by == "teacher" else jax.lax.stop_gradient(student)
    top, taken = _top(ranking, cfg.depth)
    teacher, student = teacher / cfg.temperature, student / cfg.temperature

    i, j = np.triu_indices(cfg.depth, k=1)
    weights = jnp.asarray(_rank_weights(cfg)[i, j], student.dtype)
    pair_kls = _pair_kl(teacher[top[i]] - teacher[top[j]], student[top[i]] - student[top[j]])

    terms = LDRLDTerms(
        pairs=jnp.sum(weights * pair_kls),
        integrity=_kl(teacher[top], student[top]),
        # Over one class or none the KL is 0; log_softmax of nothing would be NaN.
        remainder=_kl(teacher, student, where=~taken) if student.size - cfg.depth > 1 else jnp.zeros((), student.dtype),
    )
    return jax.tree.map(lambda term: cfg.temperature**2 * term, terms)


def ldrld_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: LDRLDConfig, *, where: jax.Array | None = None
) -> LDRLDTerms:
    r"""LDRLD's three parts, per example, before they are weighted and averaged.

    With pi(1..d) the d largest classes of the student, R their complement and
    :math:`KL_S = KL(\sigma(z^t_S / T) \,\|\, \sigma(z^s_S / T))`:

    .. math::
        \text{pairs} = T^2 \sum_{i<j} w(i,j) KL_{\{\pi(i), \pi(j)\}}, \quad
        \text{integrity} = T^2 KL_{\pi(1..d)}, \quad
        \text{remainder} = T^2 KL_R

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape. No gradient flows through the choice of classes.
      cfg: an `LDRLDConfig`; alpha, beta, pair_reduction, use_integrity and use_remainder play no part here.
      where: `[...]` bool; rows left out give 0 and may hold NaN.

    Returns:
      `LDRLDTerms` of `[...]` arrays, float32 (float64 for float64 logits), in nats times T^2.

    Raises:
      ValueError: if the shapes differ, a dtype is not floating, or depth > C.

    Example:
      >>> teacher, student = jnp.array([[3.0, 1.0, 0.0, -2.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
      >>> terms = ldrld_terms(teacher, student, LDRLDConfig(depth=2))
      >>> [f"{float(term[0]):.4f}" for term in terms]
      ['0.7441', '1.0806', '0.4950']

    References:
      Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025, arXiv 2507.15911;
      agrees with the official code to 1e-12 (tests/losses/ldrld_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    classes = student.shape[-1]
    if cfg.depth > classes:
        raise ValueError(
            f"depth must be between 2 and the number of classes ({classes}), got {cfg.depth}. Lower loss.ldrld.depth."
        )
    rows = [z.reshape(-1, classes) for z in (teacher, student)]
    terms = jax.vmap(lambda t, s: _example_terms(t, s, cfg))(*rows)
    return jax.tree.map(lambda term: term.reshape(student.shape[:-1]), terms)


def ldrld_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> dict[str, jax.Array]:
    """The summands of `ldrld_loss` by name: the parts that are switched on, weighted and averaged.

    Arguments and errors as in `ldrld_loss`.

    Returns:
      A dict with "pairs" and, where they are switched on, "integrity" and "remainder": scalars.
    """
    terms = ldrld_terms(teacher_logits, student_logits, cfg, where=where)
    mean = lambda term: mean_over_rows(term, where=where, weights=weights, axis_name=axis_name)  # noqa: E731
    pairs, integrity = cfg.depth * (cfg.depth - 1) // 2, terms.integrity
    local_weight = cfg.alpha / (pairs + 1) if cfg.pair_reduction == "mean" else cfg.alpha
    if cfg.depth == 2 and cfg.pair_reduction == "mean":
        # The official code tells pairs from the full set by its size, so at d = 2 the full set is
        # weighted as the one pair it is. The golden case with d = 2 holds this.
        integrity = integrity * float(_rank_weights(cfg)[0, 1])
    parts = {"pairs": local_weight * mean(terms.pairs)}
    if cfg.use_integrity:
        parts["integrity"] = local_weight * mean(integrity)
    if cfg.use_remainder:
        parts["remainder"] = cfg.beta * mean(terms.remainder)
    return parts


def ldrld_loss(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> jax.Array:
    r"""The LDRLD distillation loss; the cross-entropy with the labels is the caller's to add.

    .. math:: \mathrm{mean}\Big(\alpha \frac{\text{pairs} + \text{integrity}}{n} + \beta\, \text{remainder}\Big),
              \quad n = \tfrac{d(d-1)}{2} + 1

    with the terms of `ldrld_terms`; n = 1 for `pair_reduction="sum"`. At d = 2 under "mean" the
    integrity term carries w(1, 2), as in the official code.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: an `LDRLDConfig`.
      where: `[...]` bool; the mean is over the rows it keeps, the others may hold NaN.
      weights: `[...]`, not negative; the mean is sum(w l) / sum(w).
      axis_name: inside `pmap` or `shard_map`, the mapped axes that the mean runs over as well;
        without it the mean is local.

    Returns:
      A scalar, float32 (float64 for float64 logits), in nats times T^2; 0 if nothing is kept.

    Raises:
      ValueError: if the shapes differ, a dtype is not floating, or depth > C.

    Example:
      >>> z = jnp.array([[3.0, 1.0, 0.0, -2.0]])
      >>> float(ldrld_loss(z, z, LDRLDConfig(depth=3)))
      0.0

    References:
      Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025, arXiv 2507.15911;
      agrees with the official code to 1e-12 (tests/losses/ldrld_test.py).
    """
    parts = ldrld_parts(teacher_logits, student_logits, cfg, where=where, weights=weights, axis_name=axis_name)
    return functools.reduce(operator.add, parts.values())

"""Losses that treat the label's class apart from the others: dkd, nkd, wsld, rld.

Each is the bare term, without cross-entropy, warm-up or outer weight. Losses with two separately logged
summands return a dict of per-example arrays from `*_terms`; these include their weights, and the sum of
their means is the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ldrld_jax.losses.baselines import standardize_logits
from ldrld_jax.losses.common import MethodConfig, Positive, prepare_logits
from ldrld_jax.losses.divergence import bernoulli_kl
from ldrld_jax.losses.entropy import entropy_weight, log_of_max
from ldrld_jax.losses.numerics import (
    check_class_count,
    divergence,
    expectation,
    kl,
    label_mask,
    log_ratio,
    log_softmax,
    pick,
    softmax,
    with_labels,
)
from ldrld_jax.losses.top import top_mask


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class DKDConfig(MethodConfig):
    """Decoupled distillation.

    Attributes:
      alpha: weight of the target part.
      beta: weight of the non-target part; the authors use 8, 6 or 2, depending on the pair (configs/cifar100.py).
      temperature: T > 0 of both parts.
      standardize: whether to standardise both sides' logits first.
      entropy_weighting: whether to multiply each example by its entropy weight (EA-KD).
      entropy_temperature: t > 0 of the entropies in the entropy weight.
      entropy_bound: > 0, the divisor H_ub of the student's entropy in the entropy weight; None for log C. The
        published CIFAR-100 code uses 100.
      top_k: the number of the teacher's largest classes, the label counted among them, that the non-target
        part compares after removing the label (DeepKD); 0 for all classes.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: Positive = 4.0
    standardize: bool = False
    entropy_weighting: bool = False
    entropy_temperature: Positive = 3.0
    entropy_bound: Positive | None = None
    top_k: int = 0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class NKDConfig(MethodConfig):
    """Normalised distillation.

    Attributes:
      temperature: T > 0 of the non-target part, which is multiplied by T^2.
      gamma: weight of the non-target part.
    """

    temperature: Positive = 3.0
    gamma: float = 3.5


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class WSLDConfig(MethodConfig):
    """Weighted soft labels.

    Attributes:
      temperature: T > 0 of the soft labels; the loss is multiplied by T^2.
      alpha: weight of the term.
    """

    temperature: Positive = 4.0
    alpha: float = 2.25


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RLDConfig(MethodConfig):
    """Refined logit distillation.

    Attributes:
      alpha: weight of the confidence part.
      beta: weight of the masked part.
      alpha_temperature: T_a > 0 of the confidence part.
      temperature: T > 0 of the masked part.
    """

    alpha: float = 1.0
    beta: float = 8.0
    alpha_temperature: Positive = 1.0
    temperature: Positive = 4.0


def dkd_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    labels: jax.Array,
    cfg: DKDConfig,
    *,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""Computes the two parts of decoupled knowledge distillation, per example.

    .. math:: \alpha T^2 \, \mathrm{KL}(b_t \| b_s) + \beta T^2 \, \mathrm{KL}(q_t \| q_s), \quad
              b = [p_y, 1 - p_y], \quad q = \sigma(z_{c \ne y} / T)

    with p the softmax at T. The first part asks whether the class is the label, the second which of the
    other classes it is.

    With `top_k` (DeepKD), q is over the teacher's K largest classes without y. Ties go to the lower class.
    If K = 1 and y is the largest, no class is left and the part is 0. This is flag 1 of the published code; its
    default, flag 0, multiplies the second part's mean by a mean over the batch, and is left out.

    With `entropy_weighting` (EA-DKD), each example is multiplied by :math:`(H_t + H_t H_s / H_{ub}) / 2`, which
    carries no gradient. H are the entropies of the softmaxes at the entropy temperature, of the standardised logits
    under `standardize`.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      labels: `[...]` integer classes.
      cfg: a `DKDConfig`.
      where: `[...]` bool; rows where it is False give 0 and may hold NaN and any label.

    Returns:
      "target" and "non_target": `[...]`, float32 (float64 for float64 logits), in nats times T^2
      and their weights.

    Raises:
      ValueError: if C < 3, top_k > C, the shapes differ, a dtype is not floating or the labels are not
        integers below C.

    Example:
      >>> teacher, student = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[5.0, 1.0, 0.0]])
      >>> terms = dkd_terms(teacher, student, jnp.array([0]), DKDConfig(beta=8.0))
      >>> print(f"{terms['target'][0]:.3f} {terms['non_target'][0]:.3f}")
      1.115 0.000

    References:
      Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, eq. 7;
      agrees with mdistiller's DKD to 1e-10 (tests/losses/baselines_test.py). "DeepKD: A Deeply Decoupled
      and Denoised Knowledge Distillation Trainer", arXiv 2505.15133 (its loss, not its optimizer).
      "EA-KD: Entropy-based Adaptive Knowledge Distillation", ICCV 2025.
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    check_class_count("dkd", student, 3)
    if cfg.top_k > student.shape[-1]:
        raise ValueError(
            f"top_k must be between 0 and the number of classes ({student.shape[-1]}), got {cfg.top_k}. "
            "Lower loss.dkd.top_k."
        )
    if cfg.standardize:
        teacher, student = standardize_logits(teacher), standardize_logits(student)
    scale: float | jax.Array = cfg.temperature**2
    if cfg.entropy_weighting:
        scale *= entropy_weight(teacher, student, cfg.entropy_temperature, cfg.entropy_bound, log_of_max)
    student, target = with_labels(labels, student, where)
    log_p, log_q = (log_ratio(z, ~target, cfg.temperature) for z in (teacher, student))
    if cfg.top_k:
        keep = top_mask(teacher, cfg.top_k) & ~target
        non_target = kl(teacher, student, cfg.temperature, keep)
    else:
        non_target = divergence(log_p, log_q, ~target)
    return {
        "target": cfg.alpha * scale * _binary_kl(pick(log_p, target), pick(log_q, target)),
        "non_target": cfg.beta * scale * non_target,
    }


def nkd_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    labels: jax.Array,
    cfg: NKDConfig,
    *,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""Computes the two parts of normalised knowledge distillation, per example.

    .. math:: -p_{t,y} \log p_{s,y} - \gamma T^2 \sum_{c \ne y} q_{t,c} \log q_{s,c}, \quad
              q = \sigma(z_{c \ne y} / T)

    with p the softmax at temperature 1. These are cross-entropies, so equal logits do not give 0. The
    label is excluded from q, as in the authors' present code; copies that keep it compute another loss.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      labels: `[...]` integer classes.
      cfg: an `NKDConfig`.
      where: `[...]` bool; rows where it is False give a constant and may hold NaN and any label.

    Returns:
      "target" and "non_target": `[...]`, float32 (float64 for float64 logits), in nats, the latter
      times its weight and T^2.

    Raises:
      ValueError: if C < 3, the shapes differ, a dtype is not floating or the labels are not integers below C.

    Example:
      >>> terms = nkd_terms(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([0]), NKDConfig(temperature=1, gamma=1))
      >>> print(f"{terms['target'][0]:.3f} {terms['non_target'][0]:.3f}")  # log(3) / 3 and log(2)
      0.366 0.693

    References:
      Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
      Normalized Loss and Customized Soft Labels", ICCV 2023;
      agrees with the published code to 1e-10 (tests/losses/baselines_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    check_class_count("nkd", student, 3)
    student, target = with_labels(labels, student, where)
    teacher_odds, student_odds = (pick(log_ratio(z, ~target), target) for z in (teacher, student))
    log_p, log_q = (log_ratio(z, ~target, cfg.temperature) for z in (teacher, student))
    return {
        "target": -jax.nn.sigmoid(teacher_odds) * jax.nn.log_sigmoid(student_odds),
        "non_target": -cfg.gamma * cfg.temperature**2 * expectation(log_p, log_q, ~target),
    }


def wsld_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    labels: jax.Array,
    cfg: WSLDConfig,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    r"""Computes weighted soft labels, per example: more distillation where the student is worse than the teacher.

    .. math:: \alpha T^2 \Big(1 - \exp\Big(-\frac{\mathrm{CE}_s}{\mathrm{CE}_t + 10^{-7}}\Big)\Big) H, \quad
              H = -\sum_c p_{t,c} \log p_{s,c}

    with p the softmax at T, CE the cross-entropy with the label at temperature 1, and no gradient
    through the bracket.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      labels: `[...]` integer classes.
      cfg: a `WSLDConfig`.
      where: `[...]` bool; rows where it is False give a constant and may hold NaN and any label.

    Returns:
      `[...]`, float32 (float64 for float64 logits), in nats times T^2 and alpha.

    Raises:
      ValueError: if C < 2, the shapes differ, a dtype is not floating or the labels are not integers below C.

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> value = wsld_terms(z, z, jnp.array([0]), WSLDConfig(temperature=1, alpha=1))[0]
      >>> print(f"{value:.3f}")  # (1 - 1/e) log(2)
      0.438

    References:
      Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
      Perspective", ICLR 2021; agrees with the published code to 1e-10 (tests/losses/baselines_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    check_class_count("wsld", student, 2)
    student, target = with_labels(labels, student, where)
    # Log-odds, because the cross-entropy of a sure teacher is far below the rounding of log(1).
    teacher_ce, student_ce = (-jax.nn.log_sigmoid(pick(log_ratio(z, ~target), target)) for z in (teacher, student))
    bracket = jax.lax.stop_gradient(-jnp.expm1(-student_ce / (teacher_ce + 1e-7)))
    p, log_q = softmax(teacher, cfg.temperature), log_softmax(student, cfg.temperature)
    return -cfg.alpha * cfg.temperature**2 * bracket * jnp.sum(p * log_q, axis=-1)


def rld_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    labels: jax.Array,
    cfg: RLDConfig,
    *,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    r"""Computes the two parts of refined logit distillation, per example, for a teacher that may be wrong.

    .. math:: \alpha T_a^2 \, \mathrm{KL}\big([m, 1 - m] \,\|\, [p_{s,y}, 1 - p_{s,y}]\big)
              + \beta T^2 \, \mathrm{KL}_K, \quad K = \{c : z^t_c < z^t_y\}

    The student's probability of the label learns m, the teacher's largest probability, both at T_a.
    KL_K compares the softmaxes at T over K, the classes that the teacher ranks below the label. Classes
    tied with the label are not in K; if K is empty, the second part is 0.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      labels: `[...]` integer classes.
      cfg: an `RLDConfig`.
      where: `[...]` bool; rows where it is False give a constant and may hold NaN and any label.

    Returns:
      "confidence" and "masked": `[...]`, float32 (float64 for float64 logits), in nats times T^2
      and their weights.

    Raises:
      ValueError: if C < 2, the shapes differ, a dtype is not floating or the labels are not integers below C.

    Example:
      >>> teacher, student = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[1.0, 2.0, 0.0]])
      >>> terms = rld_terms(teacher, student, jnp.array([1]), RLDConfig())  # the teacher is wrong, the student as sure
      >>> print(f"{terms['confidence'][0]:.3f} {terms['masked'][0]:.3f}")
      0.000 0.000

    References:
      Sun et al., "Knowledge Distillation with Refined Logits", ICCV 2025;
      agrees with the published code to 1e-10 (tests/losses/baselines_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    check_class_count("rld", student, 2)
    student, target = with_labels(labels, student, where)
    best = label_mask(jnp.argmax(teacher, axis=-1), teacher)
    confidence = pick(log_ratio(teacher, ~best, cfg.alpha_temperature), best)
    student_odds = pick(log_ratio(student, ~target, cfg.alpha_temperature), target)
    # XLA may compute logits anew for each use and round them differently: the label must not be below itself.
    # A label out of range has no class of its own; all classes are then kept, so that the student's NaN stays.
    own = jnp.where(jnp.any(target, axis=-1), pick(teacher, target), jnp.inf)
    below = ~target & (teacher < own[..., None])
    masked = kl(teacher, student, cfg.temperature, below)
    return {
        "confidence": cfg.alpha * cfg.alpha_temperature**2 * _binary_kl(confidence, student_odds),
        "masked": cfg.beta * cfg.temperature**2 * masked,
    }


def _binary_kl(teacher_odds: jax.Array, student_odds: jax.Array) -> jax.Array:
    """Computes `bernoulli_kl` of log-odds, cut off where their difference would overflow."""
    limit = jnp.finfo(student_odds.dtype).max / 2
    return bernoulli_kl(*(jnp.clip(odds, -limit, limit) for odds in (teacher_odds, student_odds)))

"""Losses that compare the largest of many classes: bild and topk_tail, designed for tokens.

Each is the bare term per token, without cross-entropy, warm-up or outer weight. Logits are `[..., V]`,
for text `[batch, length, V]`, and `where` excludes prompt and padding.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ldrld_jax.losses import numerics
from ldrld_jax.losses.common import Between, MethodConfig, Positive, prepare_logits
from ldrld_jax.losses.top import take, top_classes, top_mask


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiLDConfig(MethodConfig):
    """Distillation of the differences between the largest logits.

    Attributes:
      top_k: K >= 2, the number of largest logits that are compared with each other; for 2 the loss is 0.
      temperature: T > 0 of the softmaxes over differences; the loss is not multiplied by T^2.

    Raises:
      ValueError: if top_k is below 2.
    """

    top_k: Annotated[int, Between(2)] = 8
    temperature: Positive = 3.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKTailConfig(MethodConfig):
    """Distillation of the largest probabilities and a bucket for the rest.

    Attributes:
      top_k: K >= 1, the number of classes that are compared one by one; if it covers all, there is no bucket.
      temperature: T > 0 of both sides; the loss is not multiplied by T^2.
      beta: between 0, KL(teacher || student), and 1, KL(student || teacher).
      tail: True puts the other classes into a bucket; False renormalises the K probabilities.

    Raises:
      ValueError: if top_k is below 1, or beta above 1.
    """

    top_k: Annotated[int, Between(1)] = 1
    temperature: Positive = 1.0
    beta: Annotated[float, Between(0, 1)] = 1.0
    tail: bool = True


def bild_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: BiLDConfig, *, where: jax.Array | None = None
) -> dict[str, jax.Array]:
    r"""Computes the bi-directional logits difference loss, per token.

    .. math:: \mathrm{KL}\big(\sigma(\Delta^t / T) \,\|\, \sigma(\Delta^s / T)\big), \quad
              \Delta = (z_{\pi(i)} - z_{\pi(j)})_{i<j \le K}

    once with pi(1..K) the K largest classes of the teacher, in descending order, and once with those of
    the student; the loss is the sum of the two. Ties go to the lower class, which decides the sign of a
    difference. No gradient flows through the selection.

    Args:
      teacher_logits: `[..., V]`, any float dtype; no gradient flows into it.
      student_logits: `[..., V]`, the same shape.
      cfg: a `BiLDConfig`.
      where: `[...]` bool; tokens where it is False give a constant and may hold NaN.

    Returns:
      "teacher_led" and "student_led": `[...]`, float32 (float64 for float64 logits), in nats.

    Raises:
      ValueError: if V < K, the shapes differ or a dtype is not floating.

    Example:
      >>> teacher, student = jnp.array([[3.0, 1.0, 0.0, -2.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
      >>> terms = bild_terms(teacher, student, BiLDConfig(top_k=3, temperature=1.0))
      >>> print(f"{terms['teacher_led'][0]:.3f} {terms['student_led'][0]:.3f}")
      0.916 1.034

    References:
      "BiLD: Bi-directional Logits Difference Loss for Large Language Model Distillation", COLING 2025;
      agrees with the published code to 1e-9 (tests/losses/golden_2026_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    classes = student.shape[-1]
    if cfg.top_k > classes:
        raise ValueError(
            f"top_k must be between 2 and the number of classes ({classes}), got {cfg.top_k}. Lower loss.bild.top_k."
        )
    rows = [z.reshape(-1, classes) for z in (teacher, student)]
    earlier = jnp.triu(jnp.ones((cfg.top_k, cfg.top_k), bool), k=1)
    limit = jnp.finfo(student.dtype).max  # infinite differences would subtract to NaN

    def led_by(leader: jax.Array) -> jax.Array:
        top = jax.vmap(lambda z: top_classes(z, cfg.top_k))(jax.lax.stop_gradient(leader))
        chosen = (jax.vmap(take)(z, top) for z in rows)
        # All K^2 differences and a mask, to avoid a second gather.
        of_teacher, of_student = (
            jnp.clip(z[:, :, None] - z[:, None, :], -limit, limit).reshape(-1, cfg.top_k**2) for z in chosen
        )
        keep = jnp.broadcast_to(earlier.reshape(1, -1), of_student.shape)
        return numerics.kl(of_teacher, of_student, cfg.temperature, keep).reshape(student.shape[:-1])

    return {"teacher_led": led_by(rows[0]), "student_led": led_by(rows[1])}


def topk_tail_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: TopKTailConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Computes a divergence over the K largest probabilities and the mass of all others, per token.

    .. math:: \beta \, \mathrm{KL}(p_t \| m) + (1 - \beta) \, \mathrm{KL}(p_s \| m), \quad
              m = \beta p_t + (1 - \beta) p_s

    over the classes that are among the K largest of either side, and one bucket that holds the rest.
    beta = 0 gives KL(p_t || p_s) over the teacher's K largest, beta = 1 gives KL(p_s || p_t) over the
    student's. The values at both ends are special cases: the formula's limits there are 0. For K >= V the
    divergence is that of the whole softmaxes.

    The bucket is the exact log-sum-exp of the rest; published code clips it if the K classes hold
    nearly all the mass (TRL at 1e-7, Megatron at 1e-8).

    Args:
      teacher_logits: `[..., V]`, any float dtype; no gradient flows into it.
      student_logits: `[..., V]`, the same shape.
      cfg: a `TopKTailConfig`.
      where: `[...]` bool; tokens where it is False give 0 and may hold NaN.

    Returns:
      `[...]`, float32 (float64 for float64 logits), in nats. Ties go to the lower class.

    Raises:
      ValueError: if the shapes differ or a dtype is not floating.

    Example:
      >>> teacher, student = jnp.array([[3.0, 1.0, 0.0, -2.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
      >>> for beta in (0, 0.5, 1):
      ...     print(f"{topk_tail_terms(teacher, student, TopKTailConfig(top_k=1, beta=beta))[0]:.3f}")
      0.853
      0.205
      0.706

    References:
      The loss `iw_opd` of TRL 1.16, equal to `topk_kl_div` of Megatron-LM; agrees with it to 1e-9
      (tests/losses/golden_2026_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    depth = min(cfg.top_k, student.shape[-1])
    leaders = {0.0: (teacher,), 1.0: (student,)}.get(cfg.beta, (teacher, student))
    keep = jnp.any(jnp.stack([top_mask(jax.lax.stop_gradient(z), depth) for z in leaders]), axis=0)
    tail = cfg.tail and depth < student.shape[-1]
    p, q = (_Buckets.of(z, keep, cfg.temperature, tail=tail) for z in (teacher, student))
    if cfg.beta == 0:
        return p.divergence_from(q, keep)
    if cfg.beta == 1:
        return q.divergence_from(p, keep)
    mixture = p.mixed_with(q, cfg.beta)
    return cfg.beta * p.divergence_from(mixture, keep) + (1 - cfg.beta) * q.divergence_from(mixture, keep)


def topk_tail_top_needed(cfg: TopKTailConfig) -> int | None:
    """Returns K, or None where the bucket has another temperature than the stored log-sum-exp of the rest."""
    return None if cfg.tail and cfg.temperature != 1 else cfg.top_k


@dataclasses.dataclass(frozen=True)
class _Buckets:
    """Log-probabilities `[..., V]` of the kept classes, and `[..., 1]` of all others together, or None."""

    classes: jax.Array
    rest: jax.Array | None

    @classmethod
    def of(cls, logits: jax.Array, keep: jax.Array, temperature: float | jax.Array, *, tail: bool) -> "_Buckets":
        if not tail:
            return cls(numerics.log_ratio(logits, keep, temperature), None)
        classes = numerics.log_softmax(logits, temperature)
        # A union may hold all classes. Then any finite number works, because `divergence_from` ignores it.
        domain = ~keep | jnp.all(keep, axis=-1, keepdims=True)
        others = jnp.where(domain, classes, -jnp.inf)
        return cls(classes, jax.nn.logsumexp(others, axis=-1, keepdims=True))

    def mixed_with(self, other: "_Buckets", share: float) -> "_Buckets":
        """Returns the mixture of `share` of these and `1 - share` of the other, 0 < share < 1."""
        mix = lambda a, b: jnp.logaddexp(a + jnp.log(share), b + jnp.log(1 - share))  # noqa: E731
        rest = None if self.rest is None or other.rest is None else mix(self.rest, other.rest)
        return _Buckets(mix(self.classes, other.classes), rest)

    def divergence_from(self, other: "_Buckets", keep: jax.Array) -> jax.Array:
        """Computes KL(self || other), `[...]`."""
        total = numerics.divergence(self.classes, other.classes, keep)
        if self.rest is None or other.rest is None:
            return total
        return total + numerics.divergence(self.rest, other.rest, ~jnp.all(keep, axis=-1, keepdims=True))

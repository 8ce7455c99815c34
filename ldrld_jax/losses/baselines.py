"""The other logit-distillation losses, each the bare term: no cross-entropy, no warm-up, no outer weight."""

import dataclasses

import jax
import jax.numpy as jnp

from ldrld_jax.losses.common import MethodConfig, Positive, prepare_logits


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KDConfig(MethodConfig):
    """Hinton's distillation: temperature T > 0, and whether both sides' logits are standardised first."""

    temperature: Positive = 4.0
    standardize: bool = False


def standardize_logits(logits: jax.Array) -> jax.Array:
    r"""Logit standardisation: zero mean and unit deviation per example, `[..., C]` to `[..., C]`.

    .. math:: z \leftarrow (z - \bar z) / (\mathrm{std}(z) + 10^{-7})

    The deviation is the sample one (ddof = 1); equal logits give 0 with gradient 0.

    Example:
      >>> standardize_logits(jnp.array([[1.0, 2.0, 3.0]])).round(3).tolist()
      [[-1.0, 0.0, 1.0]]

    References:
      Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / max(logits.shape[-1] - 1, 1)
    spread = variance > 0
    # sqrt has an infinite slope at 0: take it of 1 there, and multiply by 0 instead.
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, jnp.ones_like(variance))), jnp.zeros_like(variance))
    return centred / (std + 1e-7)


def kd_terms(
    teacher_logits: jax.Array, student_logits: jax.Array, cfg: KDConfig, *, where: jax.Array | None = None
) -> jax.Array:
    r"""Hinton's distillation loss, per example.

    .. math:: T^2 \, \mathrm{KL}\big(\sigma(z^t / T) \,\|\, \sigma(z^s / T)\big)

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape.
      cfg: a `KDConfig`.
      where: `[...]` bool; rows left out give 0 and may hold NaN.

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
      agrees with mdistiller's KD to 1e-12 (tests/losses/baselines_test.py).
    """
    teacher, student = prepare_logits(teacher_logits, student_logits, where)
    if cfg.standardize:
        teacher, student = standardize_logits(teacher), standardize_logits(student)
    log_p = jax.nn.log_softmax(teacher / cfg.temperature)
    log_q = jax.nn.log_softmax(student / cfg.temperature)
    return cfg.temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

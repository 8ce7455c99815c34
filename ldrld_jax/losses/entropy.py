"""Entropy-based adaptive weights for kd and dkd: examples on which the teacher is unsure count more."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldrld_jax.losses.numerics import softmax

GUARD = 1e-10
"""Keeps the argument of a logarithm away from 0, as in the published code."""


def log_of_sum(p: jax.Array) -> jax.Array:
    """Computes log(p + 1e-10), as the published code of kd does."""
    return jnp.log(p + GUARD)


def log_of_max(p: jax.Array) -> jax.Array:
    """Computes log(max(p, 1e-10)), as the published code of dkd does."""
    return jnp.log(jnp.maximum(p, GUARD))


def entropy_weight(
    teacher: jax.Array,
    student: jax.Array,
    temperature: float,
    bound: float | None,
    log: Callable[[jax.Array], jax.Array] = log_of_sum,
) -> jax.Array:
    r"""Computes the weight of each example from the entropies of both sides.

    .. math:: w = \tfrac12 \big(H_t + H_t H_s / H_{ub}\big), \quad H = -\sum_c p_c \log p_c, \quad p = \sigma(z / t)

    The weights are not normalised, so they also scale the loss, by up to log C.

    Args:
      teacher: `[..., C]` logits from `prepare_logits`.
      student: `[..., C]` logits from `prepare_logits`.
      temperature: t > 0 of both entropies.
      bound: H_ub > 0; None for log C, the largest possible entropy.
      log: the guarded logarithm.

    Returns:
      `[...]`, without gradient.

    Example:
      >>> print(f"{entropy_weight(jnp.zeros((1, 4)), jnp.zeros((1, 4)), 3.0, None)[0]:.4f}")  # log(4)
      1.3863

    References:
      "EA-KD: Entropy-based Adaptive Knowledge Distillation", ICCV 2025;
      agrees with the published code to 1e-9 (tests/losses/golden_2026_test.py).
    """
    bound = math.log(student.shape[-1]) if bound is None else bound
    probabilities = (softmax(jax.lax.stop_gradient(z), temperature) for z in (teacher, student))
    of_teacher, of_student = (-jnp.sum(p * log(p), axis=-1) for p in probabilities)
    return (of_teacher + of_teacher * of_student / bound) / 2

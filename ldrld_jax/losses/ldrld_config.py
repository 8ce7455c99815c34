"""LDRLD's config, its rank weights, and the per-example terms."""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.losses.common import Between, MethodConfig, Positive


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LDRLDConfig(MethodConfig):
    """Settings of LDRLD; the defaults are those of the official ResNet32x4 -> ResNet8x4 run.

    Attributes:
      depth: d, the number of largest classes that are compared pair by pair; 2 <= d <= C.
      temperature: T > 0 of every softmax; every term is multiplied by T^2.
      alpha: weight of the local part (pairs and integrity).
      beta: weight of the remainder.
      rank_by: the side whose logits select and rank the d classes, "student" as in the paper or "teacher".
      irw_epsilon: eps > 0 of the inverse rank weight, `1 / (|i - j| + eps)`.
      erd_scale: delta of the exponential rank decay, delta exp(-lambda (i + j)).
      erd_decay: lambda of the exponential rank decay.
      use_irw: False sets the inverse rank weight to 1.
      use_erd: False sets the exponential rank decay, including delta, to 1.
      pair_reduction: "mean" divides the local part by d(d-1)/2 + 1, as the official code does;
        "sum" is the paper's formula.
      use_integrity: False drops the local softmax over the d classes; the divisor stays the same.
      use_remainder: False drops the term over the other C - d classes.

    Raises:
      ValueError: if a field is out of its range.

    Example:
      >>> LDRLDConfig(depth=5, beta=1).beta
      1.0
    """

    depth: Annotated[int, Between(2)] = 7
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


class LDRLDTerms(NamedTuple):
    """The three parts of LDRLD per example, `[...]`, times T^2 but without alpha and beta."""

    pairs: jax.Array
    integrity: jax.Array
    remainder: jax.Array


def rank_weights(cfg: LDRLDConfig) -> jax.Array:
    r"""Computes the adaptive decay weight of every pair of ranks.

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
    return jnp.asarray(host_rank_weights(cfg), jnp.result_type(float))


def host_rank_weights(cfg: LDRLDConfig) -> np.ndarray:
    """Computes `rank_weights` in float64, without initialising a device."""
    rank = np.arange(1.0, cfg.depth + 1)
    i, j = rank[:, None], rank[None, :]
    irw = 1 / (np.abs(i - j) + cfg.irw_epsilon) if cfg.use_irw else 1.0
    erd = cfg.erd_scale * np.exp(-cfg.erd_decay * (i + j)) if cfg.use_erd else 1.0
    return np.triu(irw * erd * np.ones((cfg.depth, cfg.depth)), k=1)

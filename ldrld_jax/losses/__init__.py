"""Distillation losses: pure functions of logits, and the table that names them."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax

from ldrld_jax.losses.baselines import (
    CTKDConfig,
    KDConfig,
    TTMConfig,
    WTTMConfig,
    ctkd_gradient_scale,
    ctkd_init,
    ctkd_temperature,
    ctkd_terms,
    kd_terms,
    standardize_logits,
    ttm_terms,
    wttm_terms,
)
from ldrld_jax.losses.common import MethodConfig, mean_over_rows, prepare_logits
from ldrld_jax.losses.correlation import DISTConfig, MLKDConfig, dist_parts, mlkd_parts
from ldrld_jax.losses.decoupled import (
    DKDConfig,
    NKDConfig,
    RLDConfig,
    WSLDConfig,
    dkd_terms,
    nkd_terms,
    rld_terms,
    wsld_terms,
)
from ldrld_jax.losses.ldrld import LDRLDConfig, LDRLDTerms, ldrld_loss, ldrld_parts, ldrld_terms, rank_weights

__all__ = [
    "METHODS",
    "CTKDConfig",
    "DISTConfig",
    "DKDConfig",
    "KDConfig",
    "LDRLDConfig",
    "LDRLDTerms",
    "MLKDConfig",
    "Method",
    "MethodConfig",
    "NKDConfig",
    "RLDConfig",
    "TTMConfig",
    "WSLDConfig",
    "WTTMConfig",
    "ctkd_gradient_scale",
    "ctkd_init",
    "ctkd_temperature",
    "ctkd_terms",
    "dist_parts",
    "dkd_terms",
    "kd_terms",
    "ldrld_loss",
    "ldrld_parts",
    "ldrld_terms",
    "mean_parts",
    "mlkd_parts",
    "nkd_terms",
    "rank_weights",
    "rld_terms",
    "standardize_logits",
    "standardized",
    "ttm_terms",
    "without_labels",
    "wsld_terms",
    "wttm_terms",
]


@dataclasses.dataclass(frozen=True)
class Method:
    """A distillation loss as the trainer sees it.

    Attributes:
      config: its config class, a frozen dataclass whose fields all have defaults.
      parts: `parts(teacher_logits, student_logits, labels, cfg, *, params=None, where=None, weights=None)`
        gives the summands of the loss by name, scalars, so that each can be logged; a loss of one
        part calls it "".
      init: `init(cfg)` gives the parameters that the loss learns, a pytree; None if it learns none.
      gradient_scale: `gradient_scale(epoch)` is what the gradient of these parameters is multiplied
        by before it is applied, a scalar; None leaves it as it is.
      decomposes: the loss of a batch is the mean of the losses of its parts; not if it compares examples.
    """

    config: type[MethodConfig]
    parts: Callable[..., dict[str, jax.Array]]
    init: Callable[[Any], Any] | None = None
    gradient_scale: Callable[[Any], jax.Array] | None = None
    decomposes: bool = True

    def views(self, cfg: MethodConfig) -> int:
        """How many augmentations of every image the loss compares; for 2 the logits are `[2, ..., C]`."""
        return getattr(cfg, "views", 1)

    def loss(
        self,
        teacher_logits: jax.Array,
        student_logits: jax.Array,
        labels: jax.Array,
        cfg: MethodConfig,
        *,
        params: Any = None,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """The bare distillation term, a scalar: the sum of the parts.

        Args:
          teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
          student_logits: `[..., C]`, the same shape.
          labels: `[...]` integer classes; methods that compare logits alone ignore them.
          cfg: an instance of `config`.
          params: what `init(cfg)` gives, for a method that has it; None stands for just that.
          where: `[...]` bool; the mean is over the rows it keeps, the others may hold anything.
          weights: `[...]`, not negative; the mean is sum(w l) / sum(w).
        """
        parts = self.parts(teacher_logits, student_logits, labels, cfg, params=params, where=where, weights=weights)
        return functools.reduce(operator.add, parts.values())


def mean_parts(terms: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
    """The `parts` of a loss that is a mean over examples.

    Args:
      terms: `terms(teacher_logits, student_logits, labels, cfg, *, where=None)` gives an array
        `[...]` of losses per example, or a dict of several that add up. It is given `params=` too
        if there are any.

    Example:
      >>> import jax.numpy as jnp
      >>> def squares(teacher_logits, student_logits, labels, cfg, *, where=None):
      ...     teacher, student = prepare_logits(teacher_logits, student_logits, where)
      ...     return jnp.sum((teacher - student) ** 2, axis=-1)
      >>> method = Method(config=MethodConfig, parts=mean_parts(squares))
      >>> float(method.loss(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int), MethodConfig()))
      3.0
    """

    def parts(teacher_logits, student_logits, labels, cfg, *, params=None, where=None, weights=None):
        learnt = {} if params is None else {"params": params}
        values = terms(teacher_logits, student_logits, labels, cfg, where=where, **learnt)
        values = values if isinstance(values, dict) else {"": values}
        return {name: mean_over_rows(value, where=where, weights=weights) for name, value in values.items()}

    return parts


def without_labels(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(teacher_logits, student_logits, cfg, ...)` with a place for labels, which it ignores."""

    def labelled(teacher_logits, student_logits, labels, cfg, *, params=None, **rows):
        del labels
        learnt = {} if params is None else {"params": params}
        return function(teacher_logits, student_logits, cfg, **rows, **learnt)

    return labelled


def standardized(method: Method) -> Method:
    """The same method on standardised logits: `standardize_logits` on both sides, then the method.

    It composes with every method, whatever leading axes, mask and weights. For kd and dkd it is what
    their `standardize` field does.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student, label = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[0.0, 1.0, 2.0]]), jnp.array([0])
      >>> method, cfg = standardized(METHODS["nkd"]), NKDConfig(temperature=2.0)
      >>> shifted, loss = method.loss(teacher, 5 * student + 1, label, cfg), method.loss(teacher, student, label, cfg)
      >>> print(f"{shifted - loss:.3f}")
      0.000
    """

    def parts(teacher_logits, student_logits, labels, cfg, *, where=None, **rest):
        # Masked before the transform, through whose gradient a NaN would pass.
        teacher, student = prepare_logits(teacher_logits, student_logits, where)
        return method.parts(standardize_logits(teacher), standardize_logits(student), labels, cfg, where=where, **rest)

    return dataclasses.replace(method, parts=parts)


METHODS: dict[str, Method] = {
    "kd": Method(KDConfig, mean_parts(without_labels(kd_terms))),
    "dkd": Method(DKDConfig, mean_parts(dkd_terms)),
    "nkd": Method(NKDConfig, mean_parts(nkd_terms)),
    "wsld": Method(WSLDConfig, mean_parts(wsld_terms)),
    "dist": Method(DISTConfig, without_labels(dist_parts), decomposes=False),
    "ttm": Method(TTMConfig, mean_parts(without_labels(ttm_terms))),
    "wttm": Method(WTTMConfig, mean_parts(without_labels(wttm_terms))),
    "rld": Method(RLDConfig, mean_parts(rld_terms)),
    "ldrld": Method(LDRLDConfig, without_labels(ldrld_parts)),
    "mlkd": Method(MLKDConfig, without_labels(mlkd_parts), decomposes=False),
    "ctkd": Method(CTKDConfig, mean_parts(without_labels(ctkd_terms)), ctkd_init, ctkd_gradient_scale),
}

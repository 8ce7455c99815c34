"""Distillation losses: pure functions of logits, and the table that names them."""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax

from ldrld_jax.losses.baselines import KDConfig, kd_terms
from ldrld_jax.losses.common import MethodConfig, mean_over_rows
from ldrld_jax.losses.ldrld import LDRLDConfig, LDRLDTerms, ldrld_loss, ldrld_parts, ldrld_terms, rank_weights

__all__ = [
    "METHODS",
    "KDConfig",
    "LDRLDConfig",
    "LDRLDTerms",
    "Method",
    "MethodConfig",
    "kd_terms",
    "ldrld_loss",
    "ldrld_parts",
    "ldrld_terms",
    "rank_weights",
]


@dataclasses.dataclass(frozen=True)
class Method:
    """A distillation loss as the trainer sees it.

    Attributes:
      config: its config class, a frozen dataclass whose fields all have defaults.
      parts: `parts(teacher_logits, student_logits, labels, cfg, *, where=None, weights=None)` gives
        the summands of the loss by name, scalars, so that each can be logged; a loss of one part
        calls it "".
    """

    config: type[MethodConfig]
    parts: Callable[..., dict[str, jax.Array]]

    def loss(
        self,
        teacher_logits: jax.Array,
        student_logits: jax.Array,
        labels: jax.Array,
        cfg: MethodConfig,
        *,
        where: jax.Array | None = None,
        weights: jax.Array | None = None,
    ) -> jax.Array:
        """The bare distillation term, a scalar: the sum of the parts.

        Args:
          teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
          student_logits: `[..., C]`, the same shape.
          labels: `[...]` integer classes; methods that compare logits alone ignore them.
          cfg: an instance of `config`.
          where: `[...]` bool; the mean is over the rows it keeps, the others may hold anything.
          weights: `[...]`, not negative; the mean is sum(w l) / sum(w).
        """
        parts = self.parts(teacher_logits, student_logits, labels, cfg, where=where, weights=weights)
        return functools.reduce(operator.add, parts.values())


def _one_part(terms: Callable) -> Callable[..., dict[str, jax.Array]]:
    """The parts of a loss that is the mean of per-example `terms(teacher, student, cfg, where=)`."""

    def parts(teacher_logits, student_logits, labels, cfg, *, where=None, weights=None):
        del labels
        values = terms(teacher_logits, student_logits, cfg, where=where)
        return {"": mean_over_rows(values, where=where, weights=weights)}

    return parts


def _ldrld_parts(teacher_logits, student_logits, labels, cfg, *, where=None, weights=None):
    del labels
    return ldrld_parts(teacher_logits, student_logits, cfg, where=where, weights=weights)


METHODS: dict[str, Method] = {
    "kd": Method(KDConfig, _one_part(kd_terms)),
    "ldrld": Method(LDRLDConfig, _ldrld_parts),
}

"""Distillation losses: pure functions of logits, and the table that names them."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax

from ldrld_jax.losses.alphabeta import ABKDConfig, abkd_terms
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
from ldrld_jax.losses.batch import LumiNetConfig, SKDConfig, luminet_parts, skd_parts
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
from ldrld_jax.losses.divergence import AxisName
from ldrld_jax.losses.ldrld import ldrld_loss, ldrld_parts, ldrld_terms
from ldrld_jax.losses.ldrld_config import LDRLDConfig, LDRLDTerms, rank_weights
from ldrld_jax.losses.own import own_parts
from ldrld_jax.losses.tokens import BiLDConfig, TopKTailConfig, bild_terms, topk_tail_terms, topk_tail_top_needed
from ldrld_jax.losses.transport import WKDConfig, wkd_cost, wkd_terms
from ldrld_jax.losses.two_views import CRLDConfig, SLDConfig, crld_parts, sld_parts, sld_student_swap

__all__ = [
    "METHODS",
    "ABKDConfig",
    "BiLDConfig",
    "CRLDConfig",
    "CTKDConfig",
    "DISTConfig",
    "DKDConfig",
    "KDConfig",
    "LDRLDConfig",
    "LDRLDTerms",
    "LumiNetConfig",
    "MLKDConfig",
    "Method",
    "MethodConfig",
    "NKDConfig",
    "RLDConfig",
    "SKDConfig",
    "SLDConfig",
    "TTMConfig",
    "TopKTailConfig",
    "WKDConfig",
    "WSLDConfig",
    "WTTMConfig",
    "abkd_terms",
    "as_method",
    "bild_terms",
    "crld_parts",
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
    "luminet_parts",
    "mean_parts",
    "mlkd_parts",
    "nkd_terms",
    "rank_weights",
    "rld_terms",
    "skd_parts",
    "sld_parts",
    "sld_student_swap",
    "standardize_logits",
    "standardized",
    "topk_tail_terms",
    "ttm_terms",
    "without_labels",
    "wkd_cost",
    "wkd_terms",
    "wsld_terms",
    "wttm_terms",
]


@dataclasses.dataclass(frozen=True)
class Method:
    """A distillation loss as the trainer uses it.

    Attributes:
      config: the config class, a frozen dataclass whose fields all have defaults.
      parts: `parts(teacher_logits, student_logits, labels, cfg, *, params=None, where=None, weights=None)`
        returns the summands of the loss, a dict of scalars by name, so that each can be logged. A loss
        with a single part names it "".
      init: `init(cfg)` returns the parameters that the loss learns, a pytree; None if it learns none.
      gradient_scale: `gradient_scale(epoch)` returns the scalar that multiplies the gradient of the learnt
        parameters before the update; None leaves the gradient unchanged.
      decomposes: True if the loss of a batch is the mean of the losses of its parts; False if it compares examples.
      at_epoch: `at_epoch(cfg, epoch)` returns parameters that are not learnt but depend on the epoch, a
        scalar counted from 1; None if there are none.
      from_teacher: `from_teacher(rows)` returns parameters that are not learnt, computed from the `[C, d]`
        weights of the teacher's last layer; None if there are none.
      ce_weight: the authors' weight of the cross-entropy.
      kd_weight: the authors' weight of the distillation term.
      kd_warmup_epochs: the number of epochs over which the authors ramp the term up linearly; 0 for none.
      top_needed: `top_needed(cfg)` returns K if the loss needs only the teacher's logits at the K largest classes of
        either side and, at most, the log-sum-exp of the others; None if it needs every logit. Without this function,
        every logit is assumed to be needed. See docs/logit_store.md.
      fixed: the fields of `config` that decide what is computed, so that no schedule may change them by epoch.
    """

    config: type[MethodConfig]
    parts: Callable[..., dict[str, jax.Array]]
    init: Callable[[Any], Any] | None = None
    gradient_scale: Callable[[Any], jax.Array] | None = None
    decomposes: bool = True
    at_epoch: Callable[[Any, Any], Any] | None = None
    from_teacher: Callable[[jax.Array], Any] | None = None
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    kd_warmup_epochs: int = 0
    top_needed: Callable[[Any], int | None] | None = None
    fixed: tuple[str, ...] = ()

    def views(self, cfg: MethodConfig) -> int:
        """Returns the number of augmentations of each image that the loss compares; for 2, logits are `[2, ..., C]`."""
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
        axis_name: AxisName = None,
    ) -> jax.Array:
        """Computes the bare distillation term, a scalar: the sum of the parts.

        A row with a logit that is not finite makes the term and the row's gradient NaN; for -inf in ldrld see
        `ldrld_terms`.

        Args:
          teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
          student_logits: `[..., C]`, the same shape.
          labels: `[...]` integer classes, ignored by methods that compare logits alone.
          cfg: an instance of `config`.
          params: the result of `init`, `at_epoch` or `from_teacher`, for a method that has one. None means
            `init(cfg)` for ctkd, an enabled swap for sld, and is an error for wkd.
          where: `[...]` bool; the mean is over the rows where it is True, the other rows may hold anything.
          weights: `[...]`, finite and not negative; the mean is sum(w l) / sum(w).
          axis_name: inside `pmap` or `shard_map`, the mapped axes over which the batch is split; without
            it the loss covers the local rows only. It is not needed under `jit` over a mesh.

        Raises:
          ValueError: if `cfg` is of another method, or the method refuses its logits, labels, mask or weights.
        """
        if not isinstance(cfg, self.config):
            raise ValueError(f"cfg must be a {self.config.__name__}, got {type(cfg).__name__}.")
        rows: dict[str, Any] = dict(params=params, where=where, weights=weights)
        if axis_name is not None:
            rows["axis_name"] = axis_name
        parts = self.parts(teacher_logits, student_logits, labels, cfg, **rows)
        return functools.reduce(operator.add, parts.values())


def mean_parts(terms: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
    """Returns the `parts` function of a loss that is a mean over examples.

    Args:
      terms: `terms(teacher_logits, student_logits, labels, cfg, *, where=None)` returns the losses per
        example, `[...]`, or a dict of several such arrays that add up. It also receives `params=` if
        there are any.

    Example:
      >>> import jax.numpy as jnp
      >>> def squares(teacher_logits, student_logits, labels, cfg, *, where=None):
      ...     teacher, student = prepare_logits(teacher_logits, student_logits, where)
      ...     return jnp.sum((teacher - student) ** 2, axis=-1)
      >>> method = Method(config=MethodConfig, parts=mean_parts(squares))
      >>> float(method.loss(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int), MethodConfig()))
      3.0
    """

    def parts(teacher_logits, student_logits, labels, cfg, *, params=None, where=None, **rows):
        given = {} if params is None else {"params": params}
        values = terms(teacher_logits, student_logits, labels, cfg, where=where, **given)
        values = values if isinstance(values, dict) else {"": values}
        return {name: mean_over_rows(value, where=where, **rows) for name, value in values.items()}

    return parts


def without_labels(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function(teacher_logits, student_logits, cfg, ...)` to accept labels, which it ignores."""

    def labelled(teacher_logits, student_logits, labels, cfg, *, params=None, **rows):
        del labels
        learnt = {} if params is None else {"params": params}
        return function(teacher_logits, student_logits, cfg, **rows, **learnt)

    return labelled


def as_method(loss: Any) -> Method:
    """Returns a user's loss as a method: a `Method` as it is, or a function as `own.own_parts` describes it.

    Example:
      >>> import jax.numpy as jnp
      >>> method = as_method(lambda teacher_logits, student_logits, labels: jnp.mean(teacher_logits - student_logits))
      >>> float(method.loss(jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.zeros(2, int), method.config()))
      1.0
    """
    # A scalar of a batch may compare its examples.
    return loss if isinstance(loss, Method) else Method(MethodConfig, own_parts(loss), decomposes=False)


def standardized(method: Method) -> Method:
    """Returns the method applied to standardised logits: `standardize_logits` on both sides first.

    It works with every method and with any leading axes, mask and weights. For kd and dkd it is
    equivalent to their `standardize` field, except for kd with `entropy_weighting`: kd's field weights by the entropies
    of the logits as they are, as EA-KD with logit standardisation is published, and this function by those of the
    standardised ones.

    Example:
      >>> import jax.numpy as jnp
      >>> teacher, student, label = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[0.0, 1.0, 2.0]]), jnp.array([0])
      >>> method, cfg = standardized(METHODS["nkd"]), NKDConfig(temperature=2.0)
      >>> shifted, loss = method.loss(teacher, 5 * student + 1, label, cfg), method.loss(teacher, student, label, cfg)
      >>> print(f"{shifted - loss:.3f}")
      0.000
    """

    def parts(teacher_logits, student_logits, labels, cfg, *, where=None, **rest):
        # Mask before the transform: a NaN would pass through its gradient.
        teacher, student = prepare_logits(teacher_logits, student_logits, where)
        return method.parts(standardize_logits(teacher), standardize_logits(student), labels, cfg, where=where, **rest)

    return dataclasses.replace(method, parts=parts, top_needed=None)  # mean and deviation are of all logits


METHODS: dict[str, Method] = {
    "kd": Method(KDConfig, mean_parts(without_labels(kd_terms)), ce_weight=0.1, kd_weight=0.9),
    "dkd": Method(DKDConfig, mean_parts(dkd_terms), kd_warmup_epochs=20),
    "nkd": Method(NKDConfig, mean_parts(nkd_terms)),
    "wsld": Method(WSLDConfig, mean_parts(wsld_terms)),
    "dist": Method(DISTConfig, without_labels(dist_parts), decomposes=False, kd_weight=2.0),
    "ttm": Method(TTMConfig, mean_parts(without_labels(ttm_terms)), kd_weight=45.0),
    "wttm": Method(WTTMConfig, mean_parts(without_labels(wttm_terms)), kd_weight=4.0),
    "rld": Method(RLDConfig, mean_parts(rld_terms), kd_warmup_epochs=20),
    "ldrld": Method(
        LDRLDConfig, without_labels(ldrld_parts), top_needed=lambda cfg: None if cfg.use_remainder else cfg.depth
    ),
    "mlkd": Method(MLKDConfig, without_labels(mlkd_parts), decomposes=False),
    "ctkd": Method(CTKDConfig, mean_parts(without_labels(ctkd_terms)), ctkd_init, ctkd_gradient_scale),
    "abkd": Method(ABKDConfig, mean_parts(without_labels(abkd_terms)), kd_weight=32.0, fixed=("alpha", "beta")),
    "skd": Method(SKDConfig, without_labels(skd_parts), decomposes=False, ce_weight=0.1, kd_weight=0.9),
    "wkd": Method(WKDConfig, mean_parts(wkd_terms), from_teacher=wkd_cost),
    "luminet": Method(
        LumiNetConfig, without_labels(luminet_parts), decomposes=False, ce_weight=2.0, kd_warmup_epochs=20
    ),
    # The cross-entropy is the mean over both views; the published code adds them up.
    "crld": Method(CRLDConfig, without_labels(crld_parts), ce_weight=2.0),
    "sld": Method(SLDConfig, sld_parts, at_epoch=sld_student_swap, ce_weight=0.2, kd_weight=0.9),
    "bild": Method(BiLDConfig, mean_parts(without_labels(bild_terms)), ce_weight=0.0, top_needed=lambda cfg: cfg.top_k),
    "topk_tail": Method(
        TopKTailConfig, mean_parts(without_labels(topk_tail_terms)), top_needed=topk_tail_top_needed, fixed=("beta",)
    ),
}

"""The training objective: the weighted sum of the cross-entropy and the distillation terms."""

import dataclasses
import functools
import itertools
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError, one_line
from ldrld_jax.losses import METHODS, Method, standardized
from ldrld_jax.losses.common import mean_over_rows
from ldrld_jax.losses.schedule import Schedule, with_values
from ldrld_jax.metrics import MEASURED, at_labels, at_least_float32

Tree = Any


class Term(NamedTuple):
    """A distillation term: a method, its config, and the term's weight."""

    method: Method
    cfg: Any
    weight: float = 1.0

    @property
    def views(self) -> int:
        """The number of augmentations of each image that the method compares."""
        return self.method.views(self.cfg)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weighted sum of the cross-entropy and the distillation terms.

    ce_weight * cross-entropy + kd_weight * warm-up * sum(loss_weight * term)

    Attributes:
      methods: the distillation terms, by name.
      ce_weight, kd_weight: see the formula.
      kd_warmup_epochs: the distillation terms grow linearly over these epochs.
      label_smoothing: of the cross-entropy, 0 <= s < 1.
      schedules: by epoch, of kd_weight and of the fields of the methods' configs, in place of the numbers there.
    """

    methods: Mapping[str, Term]
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    kd_warmup_epochs: int = 0
    label_smoothing: float = 0.0
    schedules: Mapping[str, Schedule] = dataclasses.field(default_factory=dict)

    @property
    def views(self) -> int:
        """The number of augmentations of each image that the methods compare."""
        return max((term.views for term in self.methods.values()), default=1)

    @property
    def needs_last_layer(self) -> bool:
        """True if a method takes the weights of the teacher's last layer."""
        return any(term.method.from_teacher is not None for term in self.methods.values())

    @property
    def top_needed(self) -> dict[str, int | None]:
        """The number of the teacher's largest logits that each method needs, see `Method.top_needed`."""
        return {name: self._top_needed(term) for name, term in self.methods.items()}

    def _top_needed(self, term: Term) -> int | None:
        if term.method.top_needed is None:
            return None
        fields = {field.name for field in dataclasses.fields(term.cfg)} - set(term.method.fixed)
        values = {name: [value for _, value in s.points] for name, s in self.schedules.items() if name in fields}
        each = itertools.product(*values.values())  # the config at each point of its schedules
        needed = [
            term.method.top_needed(dataclasses.replace(term.cfg, **dict(zip(values, point, strict=True))))
            for point in each
        ]
        known = [k for k in needed if k is not None]
        return max(known) if len(known) == len(needed) else None

    def init(self) -> dict[str, Tree]:
        """Returns the initial values of the parameters that methods learn, by method."""
        return {name: term.method.init(term.cfg) for name, term in self.methods.items() if term.method.init is not None}

    def __call__(
        self,
        teacher_logits: jax.Array | None,
        student_logits: jax.Array,
        labels: jax.Array,
        *,
        epoch: jax.Array,
        where: jax.Array | None = None,
        second: tuple[jax.Array, jax.Array] | None = None,
        method_params: Mapping[str, Tree] = MappingProxyType({}),
        last_layer: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a scalar, and its terms by name before the objective weights them.

        A term of several parts is there as a whole, `ldrld`, and by part, `ldrld/pairs`. The cross-entropy is
        `ce_term`: smoothed and blended, it is not the `ce` of an evaluation.

        Args:
          teacher_logits: `[n, ..., C]`; None without methods.
          student_logits: `[n, ..., C]`.
          labels: `[n, ...]`.
          epoch: from 1.
          where: `[n, ...]` bool; rows left out count in nothing.
          second: for blended images, the labels `[n]` of the other image and its share, a scalar. The
            cross-entropy is blended with the same share; the methods use `labels` alone.
          method_params: the parameters that methods learn, by method.
          last_layer: `[C, d]`, the weights of the teacher's last layer, if a method needs them.

        With several `views`, each run of `views` consecutive rows shows one image.
        """
        ce = functools.partial(cross_entropy, student_logits, smoothing=self.label_smoothing, where=where)
        terms = {"ce_term": ce(labels)}
        if second is not None:
            other, share = second
            terms["ce_term"] = (1 - share) * terms["ce_term"] + share * ce(other)
        loss = self.ce_weight * terms["ce_term"]
        values = {name: schedule(epoch) for name, schedule in self.schedules.items()}
        terms |= {f"schedule/{name}": value for name, value in values.items()}
        scale = jnp.asarray(values.get("kd_weight", self.kd_weight), loss.dtype)
        if self.kd_warmup_epochs:
            scale = scale * jnp.minimum(epoch.astype(loss.dtype) / self.kd_warmup_epochs, 1.0)
        for name, term in self.methods.items():
            method, cfg, weight = term
            # Most methods take a view as an image of its own; one that compares views has them first.
            rows = [teacher_logits, student_logits, labels, where]
            if term.views > 1:
                rows = [
                    None if x is None else jnp.moveaxis(x.reshape(-1, self.views, *x.shape[1:]), 1, 0) for x in rows
                ]
            params = method_params.get(name)
            if method.at_epoch is not None:
                params = method.at_epoch(cfg, epoch)
            elif method.from_teacher is not None and last_layer is not None:
                params = method.from_teacher(last_layer)
            changing = {key: value for key, value in values.items() if key not in method.fixed}
            parts = method.parts(*rows[:3], with_values(cfg, changing), params=params, where=rows[3])
            terms |= {f"{name}/{part}": value for part, value in parts.items() if part}
            terms[name] = sum(parts.values(), start=jnp.zeros((), loss.dtype))
            loss = loss + scale * weight * terms[name]
        return loss, terms


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0, where: jax.Array | None = None
) -> jax.Array:
    r"""Returns the mean cross-entropy in nats, with labels smoothed as in PyTorch.

    .. math:: -(1 - s) \log p_y - \frac{s}{C} \sum_c \log p_c

    Args:
      logits: `[..., C]`, any float dtype; computed in float32 at least.
      labels: `[...]` integers; one out of range that `where` keeps makes the mean NaN.
      smoothing: s, 0 <= s < 1.
      where: `[...]` bool; the mean is taken over the rows it keeps.

    Example:
      >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))), 4)
      1.3863
    """
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    own = at_labels(log_p, labels)
    if not smoothing:  # a class that is ruled out by a logit of -inf has no part
        return mean_over_rows(-own, where=where)
    return mean_over_rows(-(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1), where=where)


def make_objective(config: ConfigDict, given: Mapping[str, Method] = MappingProxyType({})) -> Objective:
    """Makes the objective of a resolved config.

    Args:
      config: resolved.
      given: methods that are objects, by the name that the config has for them.
    """
    weights = {key: config[key] for key in ("ce_weight", "kd_weight", "kd_warmup_epochs", "label_smoothing")}
    methods = dict[str, Term]()
    for name in config_lib.method_names(config, given):
        method = config_lib.method_of(name, given)
        if name in METHODS:
            cfg, weight = config_lib.method_config(config, name), config.loss_weight[name]
        else:
            cfg, weight = method.config(), method.kd_weight if "+" in config.method else 1.0
        shown = name.strip("<>").rpartition(":")[2]
        shown = _free_name(f"own_{shown}" if shown in MEASURED else shown, methods)
        methods[shown] = Term(standardized(method) if config.standardize else method, cfg, weight)
    return Objective(methods, **weights, schedules=_schedules(config, methods))


def _free_name(name: str, taken: Container[str]) -> str:
    """Returns the name, with _2, _3, ... if it is taken."""
    numbered = (f"{name}_{i}" for i in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


def _schedules(config: ConfigDict, methods: Mapping[str, Term]) -> dict[str, Schedule]:
    """Returns the schedules of a resolved config.

    Raises:
      UserError: if one is of no method of the run, or has a value that is out of range.
    """
    schedules = {}
    for name, text in config.loss_schedule.items():
        if text is None:
            continue
        key = f"loss_schedule.{name}"
        try:
            schedules[name] = Schedule.parse(text)
            having = [term for term in methods.values() if hasattr(term.cfg, name) and name not in term.method.fixed]
            for term, (_, value) in itertools.product(having, schedules[name].points):
                dataclasses.replace(term.cfg, **{name: value})
            if name == "kd_weight" and (lowest := min(value for _, value in schedules[name].points)) < 0:
                raise ValueError(f"must not be negative, got {lowest:g}.")
        except ValueError as error:
            raise UserError(f"{key}: {error}") from error
        if not (methods if name == "kd_weight" else having):
            raise UserError(
                f"{key} is set, and method={config.method} has no {name} that may change by epoch. Remove it."
            )
    return schedules


def check_objective(
    objective: Objective, classes: int, *, label_shape: tuple[int, ...] = (), padded: bool = False
) -> None:
    """Raises a UserError if the objective refuses logits of `classes` classes, for example for a larger depth.

    Args:
      objective: of the run.
      classes: C.
      label_shape: of an example's labels, see `Source`.
      padded: whether batches have padding, which a user's own loss may not know to leave out.
    """
    rows = 2 * objective.views, *label_shape
    logits, labels = jax.ShapeDtypeStruct((*rows, classes), jnp.float32), jax.ShapeDtypeStruct(rows, jnp.int32)
    try:
        jax.eval_shape(
            lambda z, y: objective(
                z,
                z,
                y,
                epoch=jnp.ones((), jnp.int32),
                where=jnp.ones(y.shape, bool) if padded else None,
                last_layer=jnp.eye(classes),
                method_params=objective.init(),
            ),
            logits,
            labels,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except Exception as error:
        if all(name in METHODS for name in objective.methods):
            raise
        raise UserError(f"method={'+'.join(objective.methods)} fails: {one_line(error)}") from error

"""Schedules: numbers of a loss that change by epoch."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp

Form = Literal["linear", "cosine", "steps"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    r"""Number that changes by epoch, between points.

    .. math:: v(e) = v_0 + \sum_k (v_{k+1} - v_k) \, f\Big(\frac{e - e_k}{e_{k+1} - e_k}\Big)

    Here the argument of f is clipped to 0..1, and f(t) is t for "linear", (1 - cos(pi t)) / 2 for "cosine" and the
    floor of t for "steps". So v is constant before the first point and after the last one.

    Attributes:
      form: see above.
      points: `(epoch, value)`, two at least, in the order of the epochs, which are counted from 1.

    Raises:
      ValueError: if there are fewer points, or the epochs do not increase.

    Example:
      >>> schedule = Schedule.parse("cosine:1@150:0@240")
      >>> [round(float(schedule(epoch)), 3) for epoch in (1, 150, 195, 240, 300)]
      [1.0, 1.0, 0.5, 0.0, 0.0]
      >>> [float(Schedule.parse("steps:4@1:2@3")(epoch)) for epoch in (1, 2, 3)]
      [4.0, 4.0, 2.0]
    """

    form: Form
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        epochs = [epoch for epoch, _ in self.points]
        if self.form not in get_args(Form) or len(epochs) < 2 or epochs != sorted(set(epochs)) or epochs[0] < 1:
            raise ValueError(
                "a schedule needs a form and two points or more, in the order of the epochs from 1 on, got "
                f"{self.form!r} with {self.points}."
            )
        if not all(math.isfinite(value) for _, value in self.points):
            raise ValueError(f"the values of a schedule must be finite, got {self.form!r} with {self.points}.")

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Reads `FORM:VALUE@EPOCH:VALUE@EPOCH...`, such as "linear:1@1:10.5@20".

        Raises:
          ValueError: if the text is no schedule.
        """
        form, *points = text.split(":")
        try:
            pairs = [point.split("@") for point in points]
            return cls(cast(Form, form), tuple((int(epoch), float(value)) for value, epoch in pairs))
        except ValueError as error:
            raise ValueError(
                f"must be a schedule by epoch, such as linear:1@1:10.5@20, cosine:1@150:0@240 or steps:4@1:2@100, got "
                f"{text!r}."
            ) from error

    def __call__(self, epoch: int | jax.Array) -> jax.Array:
        """Computes the number at an epoch, a scalar counted from 1, in the default float dtype."""
        epoch = jnp.asarray(epoch, jnp.result_type(float))
        value = jnp.asarray(self.points[0][1], epoch.dtype)
        shape = {"linear": lambda t: t, "cosine": lambda t: (1 - jnp.cos(jnp.pi * t)) / 2, "steps": jnp.floor}[
            self.form
        ]
        for (start, before), (end, after) in zip(self.points, self.points[1:], strict=False):
            value = value + (after - before) * shape(jnp.clip((epoch - start) / (end - start), 0, 1))
        return value


def with_values(cfg: Any, values: Mapping[str, jax.Array]) -> Any:
    """Returns a method's config with traced scalars in place of those of its fields that `values` names.

    Such a config is for one call of the method's `parts` inside a trace: it cannot be hashed or passed to `jax.jit`.
    """
    fields = {field.name for field in dataclasses.fields(cfg)}
    if not (chosen := {name: value for name, value in values.items() if name in fields}):
        return cfg
    changed = copy.copy(cfg)
    for name, value in chosen.items():
        object.__setattr__(changed, name, value)  # skips the range check, which cannot take a traced number
    return changed

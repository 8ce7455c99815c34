"""The learning rate schedule and the optimizer of a config's `optim` block."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ldrld_jax.code import is_code, load_object
from ldrld_jax.errors import UserError, given_in_python, unknown
from ldrld_jax.identity import is_object

_OPTIONS = "momentum", "nesterov", "weight_decay"  # keys that an optimizer gets if it takes them


def make_schedule(optim: ConfigDict, *, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    r"""Returns the learning rate as a function of the step, counted from 0; float32, or float64 under x64.

    `step` multiplies by `decay_rate` after each of `decay_epochs`; `cosine` falls to 0 over
    `epochs`; `constant` stays. The warm-up multiplies this, W = `warmup_epochs`:

    - `official`, the published LDRLD code's: with e = 1, 2, .. the epoch, e / W while e < W, constant
      within the epoch. That code never reaches the full rate: (W - 1) / W stays until the first decay,
      after which the rate is exact. W = 1 is no warm-up;
    - `linear`: (step + 1) / (W * steps_per_epoch), up to 1;
    - `none`.

    Example:
      >>> from ldrld_jax.config import default
      >>> rate = make_schedule(default().optim, steps_per_epoch=10, epochs=240)
      >>> [round(float(rate(step)), 5) for step in (0, 1499, 1500, 2100)]
      [0.05, 0.05, 0.005, 5e-05]
    """
    boundaries = jnp.asarray(optim.decay_epochs, jnp.int32)
    total, warmup_steps = epochs * steps_per_epoch, optim.warmup_epochs * steps_per_epoch
    number = lambda x: jnp.asarray(x, jnp.result_type(float))  # noqa: E731

    def decays(step: jax.Array) -> jax.Array:
        return jnp.sum(step // steps_per_epoch >= boundaries)

    def decay(step: jax.Array) -> jax.Array:
        if optim.schedule == "constant":
            return number(1)
        if optim.schedule == "cosine":  # (1 + cos(pi x)) / 2 without its cancellation near x = 1
            return jnp.sin(number(jnp.pi / 2) * (number(jnp.maximum(total - step, 0)) / total)) ** 2
        return number(optim.decay_rate) ** number(decays(step))

    def warmup(step: jax.Array) -> jax.Array:
        if optim.warmup == "none" or (optim.warmup == "official" and optim.warmup_epochs == 1):
            return number(1)
        if optim.warmup == "linear":
            return jnp.minimum(number(step + 1) / warmup_steps, 1)
        epoch = number(step // steps_per_epoch + 1)
        before_decay = jnp.minimum(epoch, optim.warmup_epochs - 1) / optim.warmup_epochs
        return jnp.where((decays(step) > 0) & (optim.schedule == "step"), number(1), before_decay)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        return number(optim.learning_rate) * decay(step) * warmup(step)

    return schedule


def make_optimizer(optim: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of a config: SGD with momentum in PyTorch's form, AdamW, another of optax's, or a user's.

    SGD adds the weight decay of all parameters to the gradient before the momentum; AdamW decays
    the parameters themselves. `clip_norm` bounds the norm of all gradients together, before any of them.

    Another function of optax, or a user's `module:function`, is called with the schedule as its learning rate, and
    with those of `momentum`, `nesterov` and `weight_decay` that it takes.

    Raises:
      UserError: if there is no such function, or it returns no optimizer.
    """
    clip = [] if optim.clip_norm is None else [optax.clip_by_global_norm(optim.clip_norm)]
    if optim.name == "sgd":
        return optax.chain(
            *clip,
            optax.add_decayed_weights(optim.weight_decay),
            optax.trace(decay=optim.momentum, nesterov=optim.nesterov),
            optax.scale_by_learning_rate(schedule),
        )
    if optim.name == "adamw":
        adamw = optax.adamw(schedule, b1=optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.nesterov)
        return optax.chain(*clip, adamw)
    return optax.chain(*clip, _other(optim, schedule))


def unread(optim: ConfigDict) -> list[str]:
    """Returns those of momentum, nesterov and weight_decay that an optimizer by its name does not take.

    Example:
      >>> from ldrld_jax.config import load
      >>> unread(load("configs/digits.py", ["optim.name=adam"]).optim)
      ['momentum', 'weight_decay']
    """
    if optim.name in ("sgd", "adamw") or is_object(optim.name):
        return []
    takes = _parameters(_maker(optim.name))
    return [key for key in _OPTIONS if key not in takes]


def _maker(name: str) -> Callable[..., optax.GradientTransformation]:
    """Returns the function of optax, or the user's, that makes an optimizer."""
    if is_code(name):
        return load_object(name)
    if "learning_rate" in _parameters(getattr(optax, name, None)):
        return getattr(optax, name)
    known = [name for name in dir(optax) if name[0] != "_" and "learning_rate" in _parameters(getattr(optax, name))]
    raise unknown("optim.name", name, known)


def _other(optim: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    if is_object(optim.name):
        raise given_in_python(f"the optimizer {optim.name}")
    make = _maker(optim.name)
    options = {key: optim[key] for key in _OPTIONS if key in _parameters(make)}
    try:
        made = make(learning_rate=schedule, **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optim.name={optim.name} cannot be called with a learning rate alone: {error}. Give module:function of "
            "your own that sets the rest."
        ) from error
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"optim.name={optim.name} returns {type(made).__name__}, not an optax.GradientTransformation. Return an "
            "optimizer of optax."
        )
    return made


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a function that are not bound yet: `nadam` is `adam` with its nesterov."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    if not bound and not inspect.isfunction(function):
        return {}
    return {key: value for key, value in inspect.signature(function).parameters.items() if key not in bound}


def first_decay_epoch(optim: ConfigDict) -> float:
    """Returns the epoch up to which the learning rate is independent of the number of epochs; may be inf."""
    if is_object(optim.name):  # given as an object, with a schedule of its own
        return 0
    decays = {"cosine": [0], "step": optim.decay_epochs, "constant": []}[optim.schedule]
    return min(decays, default=math.inf)

"""Converts models to pure functions over plain dicts; the only file that splits and merges NNX modules.

For deep thin nets, tracing plain dicts costs a fraction of the host time of `nnx.jit` or `nnx.State`,
and everything outside (optimizer, checkpoints, shardings) stays plain JAX.
"""

import contextlib
import contextvars
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from ldrld_jax.errors import UserError

Tree = dict[str, Any]
# apply(params, batch_stats, images, *, train, where=None, key=None) -> (logits, batch_stats)
Apply = Callable[..., tuple[jax.Array, Tree]]


def purify(model: nnx.Module) -> tuple[Apply, Tree, Tree]:
    """Returns `(apply, params, batch_stats)` of a model: a pure function and nested dicts with string keys.

    `apply(params, batch_stats, images, train=..., where=..., key=...)` returns the logits and the batch
    statistics after the pass, which are unchanged unless `train` is True. `batch_stats` holds every
    variable that is no `nnx.Param`, except for random streams: those are derived from `key` in each call.

    The model is switched by `train()` and `eval()`. It is called with `train` and `where` if it takes them. Each
    `nnx.BatchNorm` inside it, or class derived from that, leaves out the examples that `where` `[N]` masks.

    Example:
      >>> from ldrld_jax.models import create_model
      >>> apply, params, stats = purify(create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0)))
      >>> logits, _ = apply(params, stats, jax.numpy.zeros((2, 8, 8, 1)), train=False)
      >>> logits.shape, params["layer1"]["0"]["conv1"]["kernel"].shape
      ((2, 10), (3, 3, 16, 16))
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    if any(isinstance(module, nnx.BatchNorm) for module in modules):
        model = nnx.clone(model)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm):
                module.__class__ = _masked_class(type(module))
    switches = [getattr(type(model), name) is not getattr(nnx.Module, name) for name in ("train", "eval")]
    named = (hasattr(module, name) for module in modules for name in ("deterministic", "use_running_average"))
    switched = any(switches) or any(named)  # a model with nothing to switch is traced faster without
    takes = call_options(type(model).__call__, parts=list(_calls(modules)))
    graph, params_state, other_state, streams = _split(model)

    def apply(params, batch_stats, images, *, train, where=None, key=None):
        live = nnx.merge(graph, *map(_own_keys, (params, batch_stats), keys), _streams(streams, key))
        if switched:
            live.train() if train else live.eval()
        with _masked(where if train else None):
            logits = live(images, **takes(train=train, where=where))
        return logits, _str_keys(nnx.to_pure_dict(nnx.state(live, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))))

    params, batch_stats = (_str_keys(nnx.to_pure_dict(state)) for state in (params_state, other_state))
    keys = _keys(params_state), _keys(other_state)
    return apply, params, batch_stats


def _calls(modules: Sequence[nnx.Module]) -> Iterator[Callable[..., Any]]:
    """Yields the functions by which modules, and Linen's inside them, are called."""
    for module in modules:
        if callable(module):
            yield type(module).__call__
        if isinstance(module, nnx.bridge.ToNNX):
            yield type(module.to_nnx__module).__call__


def is_random(model: nnx.Module) -> bool:
    """Returns whether a model draws random numbers in training, as one with `nnx.Dropout` does."""
    return bool(jax.tree.leaves(nnx.state(model, nnx.RngState)))


def rebuilder(model: nnx.Module) -> Callable[[Tree, Tree], nnx.Module]:
    """Returns a function of params and batch statistics that returns a copy of a model with these: purify's inverse.

    The model may be abstract (`nnx.eval_shape`). The function does not hold its variables.

    Example:
      >>> from ldrld_jax.models import create_model
      >>> model = create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0))
      >>> _, params, stats = purify(model)
      >>> rebuilder(model)(params, stats)(jax.numpy.zeros((2, 8, 8, 1)), train=False).shape
      (2, 10)
    """
    graph, *states, streams = _split(model)
    keys = [_keys(state) for state in states]
    return lambda params, batch_stats: nnx.merge(graph, *map(_own_keys, (params, batch_stats), keys), streams)


def _split(model: nnx.Module) -> Any:
    """Splits a model into its graph, its parameters, its random streams (last) and all other variables."""
    return nnx.split(model, nnx.Param, nnx.Not(nnx.RngState), nnx.RngState)


def path_name(path: Any) -> str:
    """Returns the name of a tree's leaf from its path, such as `conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_finite(params: Tree, batch_stats: Tree, origin: str) -> None:
    """Raises a UserError that names the first array of some weights with a number that is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats}):
        bad = int(np.sum(~np.isfinite(np.asarray(leaf).astype(np.float64))))
        if bad:
            raise UserError(
                f"{origin} holds weights that are not finite: {bad} of {leaf.size} numbers of {path_name(path)}. Use "
                "other weights."
            )


def call_options(
    function: Callable[..., Any], parts: Sequence[Callable[..., Any]] = ()
) -> Callable[..., dict[str, Any]]:
    """Returns `options(train=, where=, key=)`: the keyword arguments among them that a model's function takes.

    A model that takes `training` or `is_training` gets `train`, and one that takes `deterministic` its opposite. One
    that takes `**options` and names no mode passes them on, and gets the mode by the name that its parts have for it.

    Args:
      function: called with the options.
      parts: the functions to which `**options` may be passed on; if empty, the mode is passed as `train`.

    Example:
      >>> call_options(lambda x, *, deterministic: x)(train=True, where=None)
      {'deterministic': False}
      >>> call_options(lambda x, **options: x, parts=[lambda x, training: x])(train=True)
      {'training': True}
    """
    takes = _named(function)
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds and not takes & {*_MODES, "deterministic"}:
        # Not by "deterministic": Flax's own layers have it, and train() and eval() switch them.
        names = set().union(*map(_named, parts)) if parts else {"train"}
        takes |= {name for name in _MODES if name in names}

    def options(*, train: bool, where: jax.Array | None = None, key: jax.Array | None = None) -> dict[str, Any]:
        known = dict.fromkeys(_MODES, train) | {"deterministic": not train, "where": where, "key": key}
        return {name: value for name, value in known.items() if name in takes}

    return options


_MODES = "train", "training", "is_training"


def _named(function: Callable[..., Any]) -> set[str]:
    """Returns the names of a function's parameters, without that of its `**options`."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


_where: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("where", default=None)


@contextlib.contextmanager
def _masked(where: jax.Array | None) -> Iterator[None]:
    """Makes batch normalisations of Flax's own leave out the examples that `where` masks."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


def example_mask(x: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the mask `[N]` of the examples in the shape of `x` `[N, ...]`.

    If no example is left, none is masked: the moments of nothing are not finite, and nothing depends on them.

    Raises:
      UserError: if `x` has another number of rows, and which are padding cannot be told.
    """
    if x.shape[0] != where.shape[0]:
        raise UserError(
            f"a batch normalisation sees {x.shape[0]} rows of a batch of {where.shape[0]} examples, so that padding "
            "cannot be left out. Set data.remainder=drop with a batch_size that the devices divide."
        )
    return (where | ~jnp.any(where)).reshape(-1, *(1,) * (x.ndim - 1))


class _MaskedBatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` that leaves out the examples that the surrounding call masks."""

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        where = _where.get()
        if mask is None and where is not None:
            mask = example_mask(x, where)
        return super().__call__(x, use_running_average, mask=mask)


@functools.cache  # JAX keeps each class of modules that there ever was
def _masked_class(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """Returns a class of normalisations, Flax's own or a user's, derived from `_MaskedBatchNorm` as well.

    A user's class comes first: what it calls as `super().__call__` is then the masked one.
    """
    if issubclass(_MaskedBatchNorm, kind):
        return _MaskedBatchNorm
    return types.new_class(kind.__name__, (kind, _MaskedBatchNorm))


def _streams(streams: Any, key: jax.Array | None) -> Any:
    """Returns a model's random streams, each at its start from a key of its own."""
    key = jax.random.key(0) if key is None else key
    number = 0

    def renewed(leaf: Any) -> Any:
        nonlocal number
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        number += 1
        own = jax.random.fold_in(key, number)
        return jax.random.split(own, leaf.shape) if leaf.shape else own  # nnx.split_rngs gives each layer a key

    return jax.tree.map(renewed, streams)


def last_matrix_path(params: Tree, classes: int) -> tuple[str, ...]:
    """Returns the path of a network's last matrix, the only one with a column for each class.

    Raises:
      UserError: if there is no such matrix, or several.

    Example:
      >>> last_matrix_path({"conv": {"kernel": np.zeros((3, 3, 1, 4))}, "fc": {"kernel": np.zeros((4, 10))}}, 10)
      ('fc', 'kernel')
    """
    matrices = [path for path, x in flatten_dict(params).items() if len(x.shape) == 2 and x.shape[1] == classes]
    if len(matrices) != 1:
        raise UserError(
            f"the last layer must be the only matrix of {classes} columns, and the network has {len(matrices)}. Choose "
            "another model, method or checkpoint."
        )
    return matrices[0]


def _str_keys(tree: Any) -> Any:
    """Converts integer keys, NNX's list positions, to the strings that checkpoints and paths require."""
    return {str(key): _str_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _own_keys(tree: Any, keys: Any) -> Any:
    """Converts the strings back to a model's own keys, `_keys`: a position in a list is a number, a name may be "1"."""
    if not isinstance(tree, dict):
        return tree
    names = {str(key): key for key in keys or ()}
    if others := tree.keys() - names.keys():
        raise UserError(
            f"the model has no variables {', '.join(map(repr, sorted(others)))}. Give it those of its kind."
        )
    return {names[key]: _own_keys(value, keys[names[key]]) for key, value in tree.items()}


def _keys(state: Any) -> Any:
    """Returns the keys of a part of a model, as nested dicts without its arrays."""
    return jax.tree.map(lambda _: None, nnx.to_pure_dict(state))

"""Models of any library as pure functions: NNX and Linen modules, and functions of their own variables."""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ldrld_jax.errors import UserError
from ldrld_jax.models.layers import group_batch_norms
from ldrld_jax.models.purify import (
    Apply,
    Tree,
    call_options,
    example_mask,
    is_random,
    path_name,
    purify,
    rebuilder,
)


@dataclasses.dataclass(frozen=True)
class Pure:
    """A model as a pure function, with its variables in nested dicts with string keys.

    Attributes:
      apply: see `purify`.
      params: what is trained.
      batch_stats: the other variables, which a forward pass in training may change.
      random: whether training draws random numbers, for which `apply` takes a key.
      own: `own(params, batch_stats)` returns the model with these variables as its own library has it.
    """

    apply: Apply
    params: Tree
    batch_stats: Tree
    random: bool
    own: Callable[[Tree, Tree], Any]


def pure(model: Any, *, batch_norm_groups: int = 1) -> Pure:
    """Returns a model as a pure function.

    Args:
      model: one of

        - an `nnx.Module`; called with `train` and `where` if it takes them, and switched by `train()` and `eval()`;
        - `(module, variables)` of Flax Linen, `variables` as `module.init` returned them;
        - `(apply, variables)` with any function `apply(variables, images, train=...)`, whose variables are any
          pytree; its floating-point arrays are trained. `apply` gets `where` and `key` if it takes them.

        A model that takes `training`, `is_training` or `deterministic` gets those in place of `train`; one that takes
        `**options` and none of these gets what the modules inside it take, or `train` if it shows none.
      batch_norm_groups: see `BatchNorm.groups`; only this package's batch normalisation has groups.

    Raises:
      UserError: if it is none of these, or has variables that no run can keep.

    Example:
      >>> apply = lambda variables, images, train: images.reshape(images.shape[0], -1) @ variables["w"]
      >>> model = pure((apply, {"w": jnp.ones((4, 3))}))
      >>> model.apply(model.params, model.batch_stats, jnp.ones((5, 2, 2, 1)), train=True)[0].shape
      (5, 3)
    """
    if isinstance(model, nnx.Module):
        return _of_nnx(model, batch_norm_groups)
    pair = isinstance(model, tuple) and len(model) == 2
    if pair and batch_norm_groups > 1:
        raise UserError("batch_norm_group needs an NNX module with this package's BatchNorm. Unset it.")
    if pair and isinstance(model[0], flax.linen.Module):
        return _of_linen(*model)
    if pair and callable(model[0]):
        function = inspect.unwrap(model[0], stop=inspect.ismethod)  # of a jitted one, say
        if isinstance(module := getattr(function, "__self__", None), flax.linen.Module) and function == module.apply:
            raise UserError(
                f"a model is the method apply of the Linen module {type(module).__name__}, which would train all "
                "collections and change none. Give the module itself: (module, variables)."
            )
        return _of_function(*model)
    linen = " with its variables: (module, variables)" if isinstance(model, flax.linen.Module) else ""
    raise UserError(
        f"a model must be an nnx.Module, (Linen module, variables) or (apply, variables), got "
        f"{type(model).__name__}. Give it{linen or ' as one of these'}."
    )


def _of_nnx(model: nnx.Module, groups: int) -> Pure:
    rebuilt, model = rebuilder(model), nnx.clone(model)
    if groups > 1 and any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model)):
        raise UserError("batch_norm_group works with this package's BatchNorm only, not with Flax's. Unset it.")
    group_batch_norms(model, groups)
    apply, params, batch_stats = purify(model)

    def own(params: Tree, batch_stats: Tree) -> nnx.Module:
        module = rebuilt(params, batch_stats)
        module.eval()
        return module

    return Pure(apply, _copied(params), _copied(batch_stats), is_random(model), own)


def _of_linen(module: flax.linen.Module, variables: Any) -> Pure:
    variables = flax.core.unfreeze(flax.core.meta.unbox(variables))
    if "params" not in variables:
        raise UserError(f"the variables of {type(module).__name__} have no 'params'. Give what module.init returned.")
    batch_stats = {name: tree for name, tree in variables.items() if name != "params"}
    takes = call_options(type(module).__call__, parts=list(_calls_inside(module)))

    def apply(params, batch_stats, images, *, train, where=None, key=None):
        key = jax.random.key(0) if key is None else key

        def masked(call, args, kwargs, context):
            norm = isinstance(context.module, flax.linen.BatchNorm) and context.method_name == "__call__"
            # A user's normalisation need not take a mask, and gets one where it calls Flax's.
            masks = norm and "mask" in inspect.signature(context.orig_method).parameters
            if masks and train and where is not None and kwargs.get("mask") is None:
                kwargs = {**kwargs, "mask": example_mask(args[0], where)}
            return call(*args, **kwargs)

        with flax.linen.intercept_methods(masked):
            logits, changed = module.apply(
                {"params": params, **batch_stats},
                images,
                # A stream that is not named falls back to "params".
                rngs={"dropout": key, "params": jax.random.fold_in(key, 1)} if train else None,
                mutable=list(batch_stats) if train else [],
                **takes(train=train, where=where, key=key),
            )
        return logits, flax.core.unfreeze(changed) if train and batch_stats else batch_stats

    def own(params: Tree, batch_stats: Tree) -> flax.linen.Module:
        return module.bind({"params": params, **batch_stats})

    # Whether a module draws shows only when it is run, and a key that nobody asks for costs nothing.
    return Pure(apply, _copied(variables["params"]), _copied(batch_stats), True, own)


def _calls_inside(module: flax.linen.Module) -> Iterator[Callable[..., Any]]:
    """Yields the `__call__` functions of the modules in a module's fields, at any depth."""
    fields = [getattr(module, field.name) for field in dataclasses.fields(module) if field.name != "parent"]
    for part in jax.tree.leaves(fields):
        if isinstance(part, flax.linen.Module):
            yield type(part).__call__
            yield from _calls_inside(part)


def _of_function(function: Callable[..., Any], variables: Any) -> Pure:
    leaves, structure = jax.tree_util.tree_flatten_with_path(variables)
    trained = [hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in leaves]
    names = [path_name(path) or "array" for path, _ in leaves]
    if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
        raise UserError(f"the model has several variables that are named {twice[0]}. Rename the keys that hold a /.")
    takes = call_options(function)
    fixed = [None if own else leaf for own, (_, leaf) in zip(trained, leaves, strict=True)]

    def joined(params: Tree) -> Any:
        flat = [params[name] if own else leaf for name, own, leaf in zip(names, trained, fixed, strict=True)]
        return jax.tree.unflatten(structure, flat)

    def apply(params, batch_stats, images, *, train, where=None, key=None):
        return function(joined(params), images, **takes(train=train, where=where, key=key)), batch_stats

    params = {name: leaf for name, own, (_, leaf) in zip(names, trained, leaves, strict=True) if own}
    if not params:
        raise UserError(
            "the variables of the model hold no array of floating-point numbers, so that nothing is trained."
        )
    own = lambda params, _: functools.partial(function, joined(params))  # noqa: E731
    return Pure(apply, _copied(params), {}, random="key" in takes(train=True), own=own)


def _copied(tree: Tree) -> Tree:
    """Copies arrays to the host: a training state's buffers are given away, and the user's must stay.

    Raises:
      UserError: if one is a key of `jax.random.key`.
    """

    def copied(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise UserError(
                f"{path_name(path)} of the model is a key of jax.random.key, which no checkpoint holds. Draw from "
                "nnx.Rngs or Linen's make_rng, or keep jax.random.key_data(key) in its place."
            )
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.array(leaf)

    return jax.tree_util.tree_map_with_path(copied, tree)

"""Converts NNX modules to pure functions over plain dicts; the only file that splits and merges modules.

For deep thin nets, tracing plain dicts costs a fraction of the host time of `nnx.jit` or `nnx.State`,
and everything outside (optimizer, checkpoints, shardings) stays plain JAX.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from ldrld_jax.errors import UserError

Tree = dict[str, Any]
# apply(params, batch_stats, images, *, train, where=None) -> (logits, batch_stats)
Apply = Callable[..., tuple[jax.Array, Tree]]


def purify(model: nnx.Module) -> tuple[Apply, Tree, Tree]:
    """Returns `(apply, params, batch_stats)` of a model: a pure function and nested dicts with string keys.

    `apply(params, batch_stats, images, train=..., where=...)` returns the logits and the batch statistics
    after the pass, which are unchanged unless `train` is True.

    Example:
      >>> from ldrld_jax.models import create_model
      >>> apply, params, stats = purify(create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0)))
      >>> logits, _ = apply(params, stats, jax.numpy.zeros((2, 8, 8, 1)), train=False)
      >>> logits.shape, params["layer1"]["0"]["conv1"]["kernel"].shape
      ((2, 10), (3, 3, 16, 16))
    """
    graph, *states = nnx.split(model, nnx.Param, nnx.BatchStat)

    def apply(params, batch_stats, images, *, train, where=None):
        live = nnx.merge(graph, _int_keys(params), _int_keys(batch_stats))
        logits = live(images, train=train, where=where)
        return logits, _str_keys(nnx.to_pure_dict(nnx.state(live, nnx.BatchStat)))

    params, batch_stats = (_str_keys(nnx.to_pure_dict(state)) for state in states)
    return apply, params, batch_stats


def with_variables(model: nnx.Module, params: Tree, batch_stats: Tree) -> nnx.Module:
    """Returns a copy of `model`, which may be abstract (`nnx.eval_shape`), with these variables: purify's inverse.

    Example:
      >>> from ldrld_jax.models import create_model
      >>> model = create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0))
      >>> _, params, stats = purify(model)
      >>> with_variables(model, params, stats)(jax.numpy.zeros((2, 8, 8, 1)), train=False).shape
      (2, 10)
    """
    graph, *_ = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.merge(graph, _int_keys(params), _int_keys(batch_stats))


def check_finite(params: Tree, batch_stats: Tree, origin: str) -> None:
    """Raises a UserError that names the first array of some weights with a number that is not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats}):
        bad = int(np.sum(~np.isfinite(np.asarray(leaf).astype(np.float64))))
        if bad:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{origin} holds weights that are not finite: {bad} of {leaf.size} numbers of {name}. Use another "
                "checkpoint."
            )


def last_layer_path(params: Tree, classes: int) -> tuple[str, ...]:
    """Returns the path of a network's last layer, which has its only matrix with a column for each class.

    Raises:
      UserError: if there is no such matrix, or several.

    Example:
      >>> last_layer_path({"conv": {"kernel": np.zeros((3, 3, 1, 4))}, "fc": {"kernel": np.zeros((4, 10))}}, 10)
      ('fc',)
    """
    kernels = [path for path, x in flatten_dict(params).items() if len(x.shape) == 2 and x.shape[1] == classes]
    if len(kernels) != 1:
        raise UserError(
            f"the last layer is wanted, one matrix with {classes} columns, and the network has {len(kernels)}. Choose "
            "another model, method or checkpoint."
        )
    return kernels[0][:-1]


def _str_keys(tree: Any) -> Any:
    """Converts integer keys, NNX's list positions, to the strings that checkpoints and paths require."""
    return {str(key): _str_keys(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(key) if key.isdigit() else key: _int_keys(value) for key, value in tree.items()}

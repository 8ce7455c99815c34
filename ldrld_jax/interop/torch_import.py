"""Reads and writes PyTorch checkpoints: conversion of names and layouts, and reports of mismatches.

A parameter's path equals PyTorch's key except for the last name, so one rule serves every model:
`layer1/0/conv1/kernel` is `layer1.0.conv1.weight`, transposed.
"""

import collections
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ldrld_jax.errors import UserError, listed
from ldrld_jax.interop.torch_files import read_tensors, write_safetensors
from ldrld_jax.models import outline
from ldrld_jax.models.layers import Dtype
from ldrld_jax.models.purify import Tree, check_finite, purify, rebuilder

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_COUNTER = "num_batches_tracked"

logger = logging.getLogger("ldrld_jax")


def load_torch_checkpoint(
    path: Any,
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
) -> nnx.Module:
    """Loads a model with the weights of a PyTorch checkpoint; code in the file is never run.

    Args:
      path: a `.pth` file from `torch.save` (needs the `torch` extra), a `.safetensors` file (needs the `export`
        extra), an `.npz` file, or a tar archive of these. From an archive, the member whose path names the
        model is read (`cifar_teachers/resnet56_vanilla/ckpt.pth` for resnet56), or the one given as
        `path.tar::member`. The format is recognised by content, not by name. Remote paths such as `gs://`
        work, and `hf://OWNER/NAME[@REVISION][/FILE.safetensors]` of the Hugging Face Hub (needs the `hub` extra).
        The tensors may be in nested dicts and have any prefix, such as `module.`, and either PyTorch's
        names and layouts or Flax's. From a file with a student and a teacher, the one that fits is loaded,
        the student if both fit; of other networks that fit, `path::key` chooses one.
      name: a key of `MODELS`.
      num_classes: C, as in the checkpoint's training.
      in_channels: number of channels of the images.
      dtype: dtype of the computation and the logits.
      param_dtype: dtype to which the weights are converted.

    Raises:
      UserError: if the file cannot be read safely, does not fit the model or holds numbers that are not finite;
        the message counts all missing, unexpected and misshapen keys and names the first ones.

    Example:
      >>> model = load_torch_checkpoint("ckpt_epoch_240.pth", "resnet32x4", num_classes=100)  # doctest: +SKIP
      >>> model(images, train=False).shape  # doctest: +SKIP
      (64, 100)
    """
    model = outline(name, num_classes, in_channels, dtype=dtype, param_dtype=param_dtype)
    _, params, batch_stats = purify(model)
    title = f"{name} with {num_classes} classes and {in_channels} channels"
    return rebuilder(model)(*load_variables(path, name, params, batch_stats, title=title))


def load_variables(
    path: Any, name: str, params: Tree, batch_stats: Tree, *, title: str, kept: Tree | None = None
) -> tuple[Tree, Tree]:
    """Reads `(params, batch_stats)` of a model from a checkpoint.

    Args:
      path: see `load_torch_checkpoint`.
      name: of the model.
      params: its nested dicts as returned by `purify`, of arrays or shapes.
      batch_stats: the same for the batch statistics.
      title: of the model, for errors.
      kept: the part of `params` that takes the place of what the file has there; arrays.

    Raises:
      UserError: see `load_torch_checkpoint`.
    """
    expected = _expected(params, batch_stats)
    tensors = _with_torch_names(read_tensors(path, name))
    ours = to_state_dict(kept or {}, {})
    networks = {prefix: network | ours for prefix, network in _networks(tensors, expected).items()}
    misfits = {prefix: _misfits(tensors, expected) for prefix, tensors in networks.items()}
    fitting = [prefix for prefix in networks if not any(misfits[prefix].values())]
    students = [prefix.replace("teacher.", "student.") for prefix in fitting]
    fitting = [p for p, student in zip(fitting, students, strict=True) if student == p or student not in fitting]
    if len(fitting) > 1:
        raise UserError(
            f"{path} holds {len(fitting)} networks that fit {name}, under "
            f"{', '.join(prefix.rstrip('.') or 'no key' for prefix in fitting)}. Choose one as {path}::KEY."
        )
    chosen = fitting[0] if fitting else min(networks, key=lambda prefix: sum(map(len, misfits[prefix].values())))
    if any(misfits[chosen].values()):
        raise UserError(
            f"{path} does not fit {title}: {_report(misfits[chosen])}. Give the model and the number of classes that "
            "it was trained with; student.checkpoint_head=skip starts a student from all but the last layer."
        )
    if chosen:
        left = len(tensors) - len(networks[chosen])
        logger.warning("%s: read what is under %r%s.", path, chosen[:-1], f"; {left} others are left" * (left > 0))
    loaded = from_state_dict(networks[chosen], params, batch_stats)
    check_finite(*loaded, str(path))
    return loaded


def save_torch_checkpoint(path: Any, params: Tree, batch_stats: Tree) -> None:
    """Writes the variables as a PyTorch state_dict in safetensors format, under the published keys.

    In PyTorch, `safetensors.torch.load_file` returns the dict for `load_state_dict`. Loading the file
    here with the same `param_dtype` restores the same bits. BatchNorm's counters are 0, because
    batches are not counted here; PyTorch reads them only if its momentum is None.

    Args:
      path: path of the file; `.safetensors` by convention.
      params: nested dicts as returned by `purify`.
      batch_stats: nested dicts as returned by `purify`.

    Example:
      >>> import pathlib, tempfile
      >>> from safetensors.numpy import load_file
      >>> path = pathlib.Path(tempfile.mkdtemp(), "student.safetensors")
      >>> save_torch_checkpoint(path, {"fc": {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}}, {})
      >>> load_file(path)["fc.weight"].shape
      (10, 64)
    """
    write_safetensors(path, to_state_dict(params, batch_stats))


def to_state_dict(params: Tree, batch_stats: Tree) -> dict[str, np.ndarray]:
    """Converts variables to PyTorch's keys and layouts (kernels `[out, in, height, width]`).

    Example:
      >>> state = to_state_dict({"conv1": {"kernel": jnp.zeros((3, 3, 8, 16))}}, {"bn1": {"var": jnp.ones(16)}})
      >>> {key: value.shape for key, value in state.items()}
      {'conv1.weight': (16, 8, 3, 3), 'bn1.running_var': (16,), 'bn1.num_batches_tracked': ()}
    """
    state, flat = {}, _flat(params, batch_stats)
    count = collections.Counter(map(_torch_key, flat))
    for path, value in flat.items():
        key = _torch_key(path)
        if count[key] > 1:  # only in a user's model, such as one with a kernel and a scale in one module
            key = ".".join(path)
        state[key] = np.asarray(_to_torch_layout(path, np.asarray(value)), order="C")
        if path[-1] == "var":
            state[key.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return state


def from_state_dict(state: Mapping[str, Any], params: Tree, batch_stats: Tree) -> tuple[Tree, Tree]:
    """Converts a fitting state_dict to `(params, batch_stats)` with the structure and dtypes of the given ones.

    Args:
      state: numpy arrays under PyTorch's keys, without prefixes.
      params: nested dicts of arrays or shapes as returned by `purify`; only shapes and dtypes are read.
      batch_stats: the same for the batch statistics.
    """

    def fill(tree: Tree) -> Tree:
        flat = {
            path: jnp.asarray(_from_torch_layout(path, state[_torch_key(path)]), like.dtype)
            for path, like in flatten_dict(tree).items()
        }
        return unflatten_dict(flat)

    return fill(params), fill(batch_stats)


def _flat(params: Tree, batch_stats: Tree) -> dict[tuple[str, ...], Any]:
    return flatten_dict(params) | flatten_dict(batch_stats)


def _torch_key(path: tuple[str, ...]) -> str:
    return ".".join((*path[:-1], _TORCH_NAMES.get(path[-1], path[-1])))


def _to_torch_layout(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """Moves the axes of a kernel, of a linear layer or of a convolution in any number of dimensions."""
    if path[-1] != "kernel" or value.ndim < 2:
        return value
    *space, inputs, outputs = range(value.ndim)
    return value.transpose(outputs, inputs, *space)


def _from_torch_layout(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel" or value.ndim < 2:
        return value
    outputs, inputs, *space = range(value.ndim)
    return value.transpose(*space, inputs, outputs)


def _with_torch_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts names and layouts of Flax, `params/conv1/kernel`, to PyTorch's; returns others unchanged."""
    paths = {key: tuple(re.split("[./]", key)) for key in tensors}
    if not any(path[-1] == "kernel" for path in paths.values()):
        return dict(tensors)
    renamed = {}
    for key, path in paths.items():
        path = tuple(part for part in path if part not in ("params", "batch_stats"))
        renamed[_torch_key(path)] = _to_torch_layout(path, tensors[key])
    return renamed


def _networks(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Groups tensors by prefix, each group by the names in it; "" is the file as it is.

    A prefix is all that stands before the name of one of the model's tensors. A group leaves out those within
    it that fit the model themselves.
    """
    starts = {""}
    for key in tensors:
        ends = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        starts |= {key[:end] for end in ends if key[end:] in expected}
    left, networks = dict(tensors), {}
    for start in sorted(starts, key=len, reverse=True):
        network = {key[len(start) :]: value for key, value in left.items() if key.startswith(start)}
        networks[start] = network
        if not any(_misfits(network, expected).values()):
            left = {key: value for key, value in left.items() if not key.startswith(start)}
    return dict(sorted(networks.items()))


def _expected(params: Tree, batch_stats: Tree) -> dict[str, tuple[int, ...]]:
    """Returns the shape that each key should have in PyTorch's layout."""
    return {
        _torch_key(path): jax.eval_shape(lambda x, path=path: _to_torch_layout(path, x), like).shape
        for path, like in _flat(params, batch_stats).items()
    }


def _misfits(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    misfits: dict[str, list[str]] = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected and not key.endswith(_COUNTER)],
        "of another shape or type": [],
    }
    for key in expected.keys() & tensors.keys():
        value = tensors[key]
        if value.shape != expected[key] or not jnp.issubdtype(value.dtype, jnp.floating):
            misfits["of another shape or type"].append(
                f"{key} is {value.dtype}{list(value.shape)}, the model's is {list(expected[key])}"
            )
    return misfits


def _report(misfits: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, keys in misfits.items():
        if keys:
            parts.append(f"{len(keys)} {kind} ({listed(keys, 4)})")
    return "; ".join(parts)

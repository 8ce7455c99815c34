"""Structure of a module besides its arrays: two modules with equal arrays may compute different things."""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
from typing import Any

import flax.linen
import jax
import numpy as np
from flax import nnx

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_FLAXS = "padding", "layers"  # attributes of Flax's classes that are compared whatever they hold


def structure(model: Any) -> str | None:
    """Returns a digest of the classes of a module's parts and of their non-array attributes.

    For Flax's own classes it uses numbers, such as heads and strides, padding, and the functions in lists of layers,
    because other attributes change between Flax versions. It does not see the code of a class.

    Args:
      model: see `models.pure.pure`.

    Returns:
      32 hexadecimal digits; None for a model that is no module.

    Example:
      >>> make = lambda heads: nnx.MultiHeadAttention(heads, 8, decode=False, rngs=nnx.Rngs(0))
      >>> structure(make(2)) == structure(make(2)), structure(make(2)) == structure(make(4))
      (True, False)
    """
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        parts = {"/".join(map(str, path)): _of_nnx(module) for path, module in nnx.iter_modules(model)}
    elif isinstance(model, tuple) and model and isinstance(model[0], flax.linen.Module):
        parts = {"": _of_linen(model[0])}
    else:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _of_nnx(module: nnx.Module) -> dict[str, Any]:
    kept = lambda name: not (name.startswith("_pytree__") or _is_cached(module, name))  # noqa: E731
    return _attributes(module, {name: value for name, value in vars(module).items() if kept(name)})


def _of_linen(module: flax.linen.Module) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return _attributes(module, {name: getattr(module, name) for name in fields})


def _is_cached(module: Any, name: str) -> bool:
    """Returns whether an attribute is a property's, kept since its first use."""
    return isinstance(inspect.getattr_static(type(module), name, None), functools.cached_property)


def _attributes(module: Any, values: dict[str, Any]) -> dict[str, Any]:
    kind = type(module)
    users = not kind.__module__.startswith("flax.")
    shown = {
        name: _shown(value, whole=users or name in _FLAXS or name.isdigit())  # nnx.List has its elements by number
        for name, value in values.items()
    }
    return {"class": kind.__qualname__, **{name: value for name, value in shown.items() if value is not None}}


def _shown(value: Any, *, whole: bool) -> Any:
    """Returns an attribute as JSON; None for arrays and for parts of NNX, and unless `whole` for all but numbers."""
    if isinstance(value, bool | str | None):
        return repr(value) if whole else None
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, flax.linen.Module):
        return _of_linen(value)
    if isinstance(value, tuple | list):
        return [_shown(each, whole=whole) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_shown(each, whole=whole), sort_keys=True) for each in value)
    if isinstance(value, dict):
        return {str(key): _shown(each, whole=whole) for key, each in value.items()}
    arrays = jax.Array | np.ndarray | nnx.Variable
    if not whole or isinstance(value, nnx.Pytree) or any(isinstance(x, arrays) for x in jax.tree.leaves(value)):
        return None
    return getattr(value, "__qualname__", None) or _ADDRESS.sub("", repr(value))

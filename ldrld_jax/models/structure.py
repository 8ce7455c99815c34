"""Structure of a module besides its arrays: two modules with equal arrays may compute different things."""

import dataclasses
import hashlib
import json
import re
from typing import Any

import flax.linen
import jax
import numpy as np
from flax import nnx

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def structure(model: Any) -> str | None:
    """Returns a digest of the classes of a module's parts and of their attributes that are no arrays.

    Of Flax's own classes it takes the numbers alone (of heads, of strides), since other attributes come and go with
    Flax's version. It does not see the code of the classes.

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
    named = {name: value for name, value in vars(module).items() if not name.startswith("_pytree__")}
    return _attributes(module, named)


def _of_linen(module: flax.linen.Module) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    return _attributes(module, {name: getattr(module, name) for name in fields})


def _attributes(module: Any, values: dict[str, Any]) -> dict[str, Any]:
    kind = type(module)
    shown = {name: _shown(value, theirs=kind.__module__.startswith("flax.")) for name, value in values.items()}
    return {"class": kind.__qualname__, **{name: value for name, value in shown.items() if value is not None}}


def _shown(value: Any, *, theirs: bool) -> Any:
    """Returns an attribute as JSON; None for arrays, for modules of NNX, and for what Flax's version may change."""
    if isinstance(value, bool | str | None):
        return None if theirs else repr(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, flax.linen.Module):
        return _of_linen(value)
    if isinstance(value, tuple | list):
        return [_shown(each, theirs=theirs) for each in value]
    if isinstance(value, dict):
        return {str(key): _shown(each, theirs=theirs) for key, each in value.items()}
    if theirs or isinstance(value, jax.Array | np.ndarray | nnx.Variable | nnx.Module | nnx.State):
        return None
    return getattr(value, "__qualname__", None) or _ADDRESS.sub("", repr(value))

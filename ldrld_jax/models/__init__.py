"""Flax NNX models under the names of the published model zoo."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ldrld_jax.code import call, is_code, load_object
from ldrld_jax.errors import UserError, unknown
from ldrld_jax.models.layers import Dtype
from ldrld_jax.models.mobilenet_v1 import MOBILENETS_V1
from ldrld_jax.models.mobilenet_v2 import MOBILENETS_V2
from ldrld_jax.models.resnet import CIFAR_RESNETS, IMAGENET_RESNETS, SMALL_IMAGE_RESNETS
from ldrld_jax.models.shufflenet_v1 import SHUFFLENETS_V1
from ldrld_jax.models.shufflenet_v2 import SHUFFLENETS_V2
from ldrld_jax.models.vgg import VGGS
from ldrld_jax.models.vit import VISION_TRANSFORMERS
from ldrld_jax.models.wrn import WIDE_RESNETS

MODELS: dict[str, Callable[..., nnx.Module]] = {
    **CIFAR_RESNETS,
    **SMALL_IMAGE_RESNETS,
    **WIDE_RESNETS,
    **VGGS,
    **MOBILENETS_V2,
    **SHUFFLENETS_V1,
    **SHUFFLENETS_V2,
    **IMAGENET_RESNETS,
    **MOBILENETS_V1,
    **VISION_TRANSFORMERS,
}


def create_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    *,
    rngs: nnx.Rngs,
    dtype: Dtype = jnp.float32,
    param_dtype: Dtype = jnp.float32,
) -> nnx.Module:
    """Creates a freshly initialised model; `model(x, train=False)` returns logits `[N, num_classes]`.

    `x` is `[N, height, width, in_channels]`, normalised like the training data. `train` is required
    because a forgotten mode is the most common silent error with BatchNorm.

    Args:
      name: a key of `MODELS`, or `module:function` of a user's own code.
      num_classes: C >= 1.
      in_channels: number of channels of the images.
      rngs: its "params" stream initialises the parameters.
      dtype: dtype of the computation and the logits.
      param_dtype: dtype of the parameters; BatchNorm's statistics are float32 at least.

    Raises:
      UserError: if no model has this name, or a user's function cannot be imported or returns no module.

    Example:
      >>> model = create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1)), train=False).shape
      (2, 10)
    """
    options = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    if is_code(name):
        model = own_model(name, num_classes, in_channels, **options)
        if not isinstance(model, nnx.Module):
            raise UserError(f"{name} returns {type(model).__name__}, and an nnx.Module is needed here. Wrap it in one.")
        return model
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name](num_classes, in_channels, **options)


def outline(name: str, num_classes: int, in_channels: int = 3, **options: Any) -> nnx.Module:
    """Creates a model of `MODELS` with shapes in place of its weights, without computing anything.

    Args:
      name, num_classes, in_channels, options: see `create_model`; there are no `rngs`.

    Raises:
      UserError: if no model has this name.

    Example:
      >>> outline("resnet8", 10).fc.kernel.shape
      (64, 10)
    """

    def create() -> nnx.Module:
        rngs = nnx.Rngs(0)
        rngs.default.__class__ = _OneKey
        return create_model(name, num_classes, in_channels, rngs=rngs, **options)

    return nnx.eval_shape(create)


class _OneKey(nnx.RngStream):
    """A stream of one key, which is as good as many for shapes: counting keys takes half the time of an outline."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def own_model(name: str, num_classes: int, in_channels: int, **options: Any) -> Any:
    """Returns the model that a user's function `module:function` makes, of any kind that `pure.pure` takes.

    Args:
      name: of the function; it is called with those of the following arguments that it takes.
      num_classes, in_channels, options: see `create_model`.

    Raises:
      UserError: if the function cannot be imported.
    """
    takes = inspect.signature(load_object(name)).parameters
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    known = {"num_classes": num_classes, "in_channels": in_channels, **options}
    return call(name, **{key: value for key, value in known.items() if every or key in takes})

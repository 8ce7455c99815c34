"""Flax NNX models under the names of the published model zoo."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from ldrld_jax.errors import unknown
from ldrld_jax.models.cifar_resnet import CIFAR_RESNETS
from ldrld_jax.models.imagenet_resnet import IMAGENET_RESNETS
from ldrld_jax.models.layers import Dtype
from ldrld_jax.models.mobilenet_v1 import MOBILENETS_V1
from ldrld_jax.models.mobilenet_v2 import MOBILENETS_V2
from ldrld_jax.models.shufflenet_v1 import SHUFFLENETS_V1
from ldrld_jax.models.shufflenet_v2 import SHUFFLENETS_V2
from ldrld_jax.models.small_image_resnet import SMALL_IMAGE_RESNETS
from ldrld_jax.models.vgg import VGGS
from ldrld_jax.models.vit import VISION_TRANSFORMERS
from ldrld_jax.models.wrn import WIDE_RESNETS

__all__ = ["MODELS", "create_model"]

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
      name: a key of `MODELS`.
      num_classes: C >= 1.
      in_channels: number of channels of the images.
      rngs: its "params" stream initialises the parameters.
      dtype: dtype of the computation and the logits.
      param_dtype: dtype of the parameters; BatchNorm's statistics are float32 at least.

    Raises:
      UserError: if no model has this name.

    Example:
      >>> model = create_model("resnet8", 10, in_channels=1, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 8, 8, 1)), train=False).shape
      (2, 10)
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name](num_classes, in_channels, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

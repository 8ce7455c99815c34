"""MobileNetV1 for ImageNet, the usual student of ResNet-50."""

from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import (
    BatchNorm,
    Mode,
    Sequential,
    global_average_pool,
    linear,
    torch_conv,
)

# Width and stride of the thirteen depthwise-separable pairs.
_PAIRS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class MobileNetV1(nnx.Module):
    """Thirteen depthwise-separable pairs after a 3x3 stem; reduces any height and width to 1/32.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
      Applications", 2017, table 1; the keys, which start with `model.`, are those of the distillation papers.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        layers = [Sequential(torch_conv(in_channels, 32, 3, stride=2, **common), BatchNorm(32, **common), nnx.relu)]
        features = 32
        for width, stride in _PAIRS:
            layers.append(
                Sequential(
                    torch_conv(features, features, 3, stride=stride, groups=features, **common),
                    BatchNorm(features, **common),
                    nnx.relu,
                    torch_conv(features, width, 1, **common),
                    BatchNorm(width, **common),
                    nnx.relu,
                )
            )
            features = width
        self.model = Sequential(*layers)
        self.fc = linear(features, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        return self.fc(global_average_pool(self.model(x, Mode(train, where))))


MOBILENETS_V1 = {"imagenet_mobilenetv1": MobileNetV1}

"""The half-width MobileNetV2 for CIFAR of RepDistiller and mdistiller."""

from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.initializers import normal
from ldrld_jax.models.layers import BatchNorm, Mode, Sequential, conv, global_average_pool, linear


class InvertedResidual(nnx.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution; adds the input if the shape does not change."""

    def __init__(self, in_features: int, features: int, *, expansion: int, stride: int, **common: Any):
        hidden = expansion * in_features
        self.conv = Sequential(
            conv(in_features, hidden, 1, **common),
            BatchNorm(hidden, **common),
            nnx.relu,
            conv(hidden, hidden, 3, stride=stride, groups=hidden, **common),
            BatchNorm(hidden, **common),
            nnx.relu,
            conv(hidden, features, 1, **common),
            BatchNorm(features, **common),
        )
        self.residual = stride == 1 and in_features == features

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = self.conv(x, mode)
        return x + y if self.residual else y


# Expansion, half-size width, number of blocks, stride of the first block.
_STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class MobileNetV2(nnx.Module):
    """Seven stages of inverted residuals; reduces any height and width to 1/16. The head of 1280 is not halved.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018; RepDistiller's
      version, with ReLU, and with an expansion in the first stage, too.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.conv1 = Sequential(conv(in_channels, 16, 3, stride=2, **common), BatchNorm(16, **common), nnx.relu)
        features, stages = 16, []
        for expansion, width, count, stride in _STAGES:
            first = InvertedResidual(features, width, expansion=expansion, stride=stride, **common)
            rest = (InvertedResidual(width, width, expansion=expansion, stride=1, **common) for _ in range(count - 1))
            stages.append(Sequential(first, *rest))
            features = width
        self.blocks = Sequential(*stages)
        self.conv2 = Sequential(conv(features, 1280, 1, **common), BatchNorm(1280, **common), nnx.relu)
        self.classifier = nnx.List(
            [
                linear(
                    1280,
                    num_classes,
                    kernel_init=normal(0.01),
                    bias_init=nnx.initializers.zeros,
                    **common,
                )
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        for part in (self.conv1, self.blocks, self.conv2):
            x = part(x, mode)
        return self.classifier[0](global_average_pool(x))


MOBILENETS_V2 = {"MobileNetV2": MobileNetV2}

"""ShuffleNetV1 for CIFAR with three groups, of RepDistiller and mdistiller."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ldrld_jax.models.layers import (
    BatchNorm,
    Mode,
    average_pool,
    global_average_pool,
    linear,
    shuffle_channels,
    stage,
    torch_conv,
)

_GROUPS = 3
_STEM = 24


class ShuffleUnit(nnx.Module):
    """Grouped 1x1 convolution, shuffle, 3x3 depthwise and grouped 1x1 convolution, joined to the input.

    A unit of stride 2 appends the pooled input to the branch; other units add the input.
    """

    def __init__(self, in_features: int, features: int, *, stride: int, **common: Any):
        branch = features - in_features if stride == 2 else features
        hidden = branch // 4
        # The stem has too few channels for groups, and without groups there is nothing to shuffle.
        self.groups = 1 if in_features == _STEM else _GROUPS
        self.stride = stride
        self.conv1 = torch_conv(in_features, hidden, 1, groups=self.groups, **common)
        self.bn1 = BatchNorm(hidden, **common)
        self.conv2 = torch_conv(hidden, hidden, 3, stride=stride, groups=hidden, **common)
        self.bn2 = BatchNorm(hidden, **common)
        self.conv3 = torch_conv(hidden, branch, 1, groups=_GROUPS, **common)
        self.bn3 = BatchNorm(branch, **common)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), mode))
        y = shuffle_channels(y, self.groups)
        y = nnx.relu(self.bn2(self.conv2(y), mode))
        y = self.bn3(self.conv3(y), mode)
        if self.stride == 1:
            return nnx.relu(y + x)
        return nnx.relu(jnp.concatenate([y, average_pool(x, 3, stride=2, padding=1)], axis=-1))


class ShuffleNetV1(nnx.Module):
    """Three stages of 4, 8 and 4 units after a 1x1 stem; reduces any height and width to 1/8.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Zhang, Zhou, Lin, Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for
      Mobile Devices", 2018; RepDistiller's version, with a ReLU after the depthwise convolution.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.conv1 = torch_conv(in_channels, _STEM, 1, **common)
        self.bn1 = BatchNorm(_STEM, **common)
        self.layer1 = stage(ShuffleUnit, _STEM, 240, 4, stride=2, **common)
        self.layer2 = stage(ShuffleUnit, 240, 480, 8, stride=2, **common)
        self.layer3 = stage(ShuffleUnit, 480, 960, 4, stride=2, **common)
        self.linear = linear(960, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x, mode)
        return self.linear(global_average_pool(x))


SHUFFLENETS_V1 = {"ShuffleV1": ShuffleNetV1}

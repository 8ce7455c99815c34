"""ShuffleNetV2 for CIFAR at width 1, of RepDistiller and mdistiller."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ldrld_jax.models.layers import (
    BatchNorm,
    Mode,
    Sequential,
    global_average_pool,
    linear,
    shuffle_channels,
    torch_conv,
)


class ShuffleUnit(nnx.Module):
    """A unit that passes half of the channels, convolves the others (1x1, 3x3 depthwise, 1x1) and shuffles both."""

    def __init__(self, features: int, **common: Any):
        half = features // 2
        self.conv1 = torch_conv(half, half, 1, **common)
        self.bn1 = BatchNorm(half, **common)
        self.conv2 = torch_conv(half, half, 3, groups=half, **common)
        self.bn2 = BatchNorm(half, **common)
        self.conv3 = torch_conv(half, half, 1, **common)
        self.bn3 = BatchNorm(half, **common)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        passing, y = jnp.split(x, 2, axis=-1)
        y = nnx.relu(self.bn1(self.conv1(y), mode))
        y = self.bn2(self.conv2(y), mode)
        y = nnx.relu(self.bn3(self.conv3(y), mode))
        return shuffle_channels(jnp.concatenate([passing, y], axis=-1), 2)


class DownUnit(nnx.Module):
    """Two branches at stride 2 over all channels: 3x3 depthwise, 1x1; and 1x1, 3x3 depthwise, 1x1."""

    def __init__(self, in_features: int, features: int, **common: Any):
        half = features // 2
        self.conv1 = torch_conv(in_features, in_features, 3, stride=2, groups=in_features, **common)
        self.bn1 = BatchNorm(in_features, **common)
        self.conv2 = torch_conv(in_features, half, 1, **common)
        self.bn2 = BatchNorm(half, **common)
        self.conv3 = torch_conv(in_features, half, 1, **common)
        self.bn3 = BatchNorm(half, **common)
        self.conv4 = torch_conv(half, half, 3, stride=2, groups=half, **common)
        self.bn4 = BatchNorm(half, **common)
        self.conv5 = torch_conv(half, half, 1, **common)
        self.bn5 = BatchNorm(half, **common)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        left = self.bn1(self.conv1(x), mode)
        left = nnx.relu(self.bn2(self.conv2(left), mode))
        right = nnx.relu(self.bn3(self.conv3(x), mode))
        right = self.bn4(self.conv4(right), mode)
        right = nnx.relu(self.bn5(self.conv5(right), mode))
        return shuffle_channels(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(nnx.Module):
    """Three stages of 4, 8 and 4 units after a 1x1 stem; reduces any height and width to 1/8.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
      Design", 2018; RepDistiller's version.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.conv1 = torch_conv(in_channels, 24, 1, **common)
        self.bn1 = BatchNorm(24, **common)
        self.layer1 = _stage(24, 116, 4, **common)
        self.layer2 = _stage(116, 232, 8, **common)
        self.layer3 = _stage(232, 464, 4, **common)
        self.conv2 = torch_conv(464, 1024, 1, **common)
        self.bn2 = BatchNorm(1024, **common)
        self.linear = linear(1024, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x, mode)
        x = nnx.relu(self.bn2(self.conv2(x), mode))
        return self.linear(global_average_pool(x))


def _stage(in_features: int, features: int, count: int, **common: Any) -> Sequential:
    units = (ShuffleUnit(features, **common) for _ in range(count - 1))
    return Sequential(DownUnit(in_features, features, **common), *units)


SHUFFLENETS_V2 = {"ShuffleV2": ShuffleNetV2}

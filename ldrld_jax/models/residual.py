"""Post-activation residual blocks shared by the ResNet families, with the stride on a 3x3 convolution."""

from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, Sequential, conv


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut: `[N, H, W, in_features]` to `[N, H', W', features]`.

    `shortcut` is the name of the attribute that holds the projection, which differs among published keys.
    """

    expansion = 1

    def __init__(self, in_features: int, features: int, *, stride: int, shortcut: str = "downsample", **common: Any):
        self.conv1 = conv(in_features, features, 3, stride=stride, **common)
        self.bn1 = BatchNorm(features, **common)
        self.conv2 = conv(features, features, 3, **common)
        self.bn2 = BatchNorm(features, **common)
        self.shortcut_name = shortcut
        setattr(self, shortcut, projection(in_features, features, stride=stride, **common))

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), mode))
        y = self.bn2(self.conv2(y), mode)
        return nnx.relu(getattr(self, self.shortcut_name)(x, mode) + y)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the output has four times `features` channels.

    `shortcut` is as in `BasicBlock`.
    """

    expansion = 4

    def __init__(self, in_features: int, features: int, *, stride: int, shortcut: str = "downsample", **common: Any):
        out_features = self.expansion * features
        self.conv1 = conv(in_features, features, 1, **common)
        self.bn1 = BatchNorm(features, **common)
        self.conv2 = conv(features, features, 3, stride=stride, **common)
        self.bn2 = BatchNorm(features, **common)
        self.conv3 = conv(features, out_features, 1, **common)
        self.bn3 = BatchNorm(out_features, **common)
        self.shortcut_name = shortcut
        setattr(self, shortcut, projection(in_features, out_features, stride=stride, **common))

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), mode))
        y = nnx.relu(self.bn2(self.conv2(y), mode))
        y = self.bn3(self.conv3(y), mode)
        return nnx.relu(getattr(self, self.shortcut_name)(x, mode) + y)


def projection(in_features: int, features: int, *, stride: int, **common: Any) -> Sequential:
    """Creates a 1x1 convolution and its norm if the shape changes, otherwise the identity."""
    if stride == 1 and in_features == features:
        return Sequential()
    return Sequential(conv(in_features, features, 1, stride=stride, **common), BatchNorm(features, **common))


def stage(
    block: type[BasicBlock] | type[Bottleneck],
    in_features: int,
    features: int,
    count: int,
    *,
    stride: int,
    **common: Any,
) -> Sequential:
    """Creates `count` blocks of one width; the first may have a stride and change the width."""
    first = block(in_features, features, stride=stride, **common)
    width = block.expansion * features
    return Sequential(first, *(block(width, features, stride=1, **common) for _ in range(count - 1)))

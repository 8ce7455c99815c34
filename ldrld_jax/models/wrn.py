"""The wide ResNets for CIFAR: pre-activation blocks, without dropout."""

import functools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear, stage


class PreActivationBlock(nnx.Module):
    """BN, ReLU and a 3x3 convolution, twice, and a shortcut.

    If the width changes, the shortcut is a bare 1x1 convolution of the activated input;
    otherwise it is the input itself.
    """

    def __init__(self, in_features: int, features: int, *, stride: int, **common: Any):
        self.bn1 = BatchNorm(in_features, **common)
        self.conv1 = conv(in_features, features, 3, stride=stride, **common)
        self.bn2 = BatchNorm(features, **common)
        self.conv2 = conv(features, features, 3, **common)
        self.convShortcut = conv(in_features, features, 1, stride=stride, **common) if in_features != features else None

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        active = nnx.relu(self.bn1(x, mode))
        y = nnx.relu(self.bn2(self.conv1(active), mode))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(y)


class WideResNet(nnx.Module):
    """A wide ResNet of depth 6 n + 4 for small images, any height and width.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      depth: 6 n + 4 with n >= 1.
      widen: the factor k of the stage widths 16, 32, 64.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Zagoruyko, Komodakis, "Wide Residual Networks", 2016.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, *, depth: int, widen: int, **common: Any):
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        blocks = (depth - 4) // 6
        self.conv1 = conv(in_channels, 16, 3, **common)
        self.block1 = nnx.Dict(layer=stage(PreActivationBlock, widths[0], widths[1], blocks, stride=1, **common))
        self.block2 = nnx.Dict(layer=stage(PreActivationBlock, widths[1], widths[2], blocks, stride=2, **common))
        self.block3 = nnx.Dict(layer=stage(PreActivationBlock, widths[2], widths[3], blocks, stride=2, **common))
        self.bn1 = BatchNorm(widths[3], **common)
        self.fc = linear(widths[3], num_classes, bias_init=nnx.initializers.zeros, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block.layer(x, mode)
        return self.fc(global_average_pool(nnx.relu(self.bn1(x, mode))))


WIDE_RESNETS = {
    f"wrn_{depth}_{widen}": functools.partial(WideResNet, depth=depth, widen=widen)
    for depth in (16, 40)
    for widen in (1, 2)
}

"""The CIFAR ResNets of RepDistiller and mdistiller: three stages of two-convolution blocks, post-activation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear
from ldrld_jax.models.residual import BasicBlock, stage


class CifarResNet(nnx.Module):
    """A ResNet of depth 6 n + 2 for small images, any height and width.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      depth: 6 n + 2 with n >= 1.
      widths: channels of the stem and of the three stages.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, section 4.2; the x4
      widths and the names are RepDistiller's.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int,
        widths: tuple[int, int, int, int],
        **common: Any,
    ):
        stem, *stages = widths
        blocks = (depth - 2) // 6
        self.conv1 = conv(in_channels, stem, 3, **common)
        self.bn1 = BatchNorm(stem, **common)
        self.layer1 = stage(BasicBlock, stem, stages[0], blocks, stride=1, **common)
        self.layer2 = stage(BasicBlock, stages[0], stages[1], blocks, stride=2, **common)
        self.layer3 = stage(BasicBlock, stages[1], stages[2], blocks, stride=2, **common)
        self.fc = linear(stages[2], num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x, mode)
        return self.fc(global_average_pool(x))


def _resnet(depth: int, widths: tuple[int, int, int, int]) -> Callable[..., CifarResNet]:
    return functools.partial(CifarResNet, depth=depth, widths=widths)


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

CIFAR_RESNETS = {f"resnet{depth}": _resnet(depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}x4": _resnet(depth, _WIDE) for depth in (8, 32)
}

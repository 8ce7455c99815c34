"""The ResNet-50 for CIFAR of RepDistiller and mdistiller: bottleneck blocks after a stem that keeps the resolution."""

import functools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear
from ldrld_jax.models.residual import Bottleneck, stage

_stage = functools.partial(stage, Bottleneck, shortcut="shortcut")


class CifarResNet50(nnx.Module):
    """Four stages of bottleneck blocks after a 3x3 stem of stride 1, without max-pool; any height and width.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016; RepDistiller's version.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.conv1 = conv(in_channels, 64, 3, **common)
        self.bn1 = BatchNorm(64, **common)
        self.layer1 = _stage(64, 64, 3, stride=1, **common)
        self.layer2 = _stage(256, 128, 4, stride=2, **common)
        self.layer3 = _stage(512, 256, 6, stride=2, **common)
        self.layer4 = _stage(1024, 512, 3, stride=2, **common)
        self.linear = linear(2048, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x, mode)
        return self.linear(global_average_pool(x))


CIFAR_RESNET50 = {"ResNet50": CifarResNet50}

"""RepDistiller's and mdistiller's ResNets of four stages for CIFAR and Tiny-ImageNet; the stem keeps the resolution."""

import functools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear
from ldrld_jax.models.residual import BasicBlock, Bottleneck, stage


class SmallImageResNet(nnx.Module):
    """Four stages after a 3x3 stem of stride 1, without max-pool; reduces any height and width to 1/8.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      block: `BasicBlock` or `Bottleneck`, with the stride on the first 3x3 convolution.
      counts: the number of blocks of each stage.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016; RepDistiller's version. mdistiller
      trains its ResNet18 on Tiny-ImageNet.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        counts: tuple[int, int, int, int],
        **common: Any,
    ):
        width = block.expansion
        self.conv1 = conv(in_channels, 64, 3, **common)
        self.bn1 = BatchNorm(64, **common)
        self.layer1 = stage(block, 64, 64, counts[0], stride=1, shortcut="shortcut", **common)
        self.layer2 = stage(block, 64 * width, 128, counts[1], stride=2, shortcut="shortcut", **common)
        self.layer3 = stage(block, 128 * width, 256, counts[2], stride=2, shortcut="shortcut", **common)
        self.layer4 = stage(block, 256 * width, 512, counts[3], stride=2, shortcut="shortcut", **common)
        self.linear = linear(512 * width, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x, mode)
        return self.linear(global_average_pool(x))


SMALL_IMAGE_RESNETS = {
    "ResNet18": functools.partial(SmallImageResNet, block=BasicBlock, counts=(2, 2, 2, 2)),
    "ResNet34": functools.partial(SmallImageResNet, block=BasicBlock, counts=(3, 4, 6, 3)),
    "ResNet50": functools.partial(SmallImageResNet, block=Bottleneck, counts=(3, 4, 6, 3)),
}

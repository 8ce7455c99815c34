"""The ImageNet ResNets as in torchvision."""

import functools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear, max_pool
from ldrld_jax.models.residual import BasicBlock, Bottleneck, stage


class ImageNetResNet(nnx.Module):
    """Four stages after a 7x7 stem of stride 2 and a max-pool; any height and width of at least 32.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      block: `BasicBlock` or `Bottleneck`, with the stride on the 3x3 convolution.
      counts: the number of blocks of each stage.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, table 1; keys and
      layout are torchvision's.
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
        self.conv1 = conv(in_channels, 64, 7, stride=2, **common)
        self.bn1 = BatchNorm(64, **common)
        self.layer1 = stage(block, 64, 64, counts[0], stride=1, **common)
        self.layer2 = stage(block, 64 * width, 128, counts[1], stride=2, **common)
        self.layer3 = stage(block, 128 * width, 256, counts[2], stride=2, **common)
        self.layer4 = stage(block, 256 * width, 512, counts[3], stride=2, **common)
        self.fc = linear(512 * width, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        x = max_pool(x, 3, stride=2, padding=1)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x, mode)
        return self.fc(global_average_pool(x))


IMAGENET_RESNETS = {
    "imagenet_resnet18": functools.partial(ImageNetResNet, block=BasicBlock, counts=(2, 2, 2, 2)),
    "imagenet_resnet34": functools.partial(ImageNetResNet, block=BasicBlock, counts=(3, 4, 6, 3)),
    "imagenet_resnet50": functools.partial(ImageNetResNet, block=Bottleneck, counts=(3, 4, 6, 3)),
    "imagenet_resnet101": functools.partial(ImageNetResNet, block=Bottleneck, counts=(3, 4, 23, 3)),
}

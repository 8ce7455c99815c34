"""The VGG nets for CIFAR, with BatchNorm and a single linear layer."""

import functools
import itertools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.initializers import normal
from ldrld_jax.models.layers import BatchNorm, Mode, Sequential, conv, global_average_pool, linear, max_pool


class VGG(nnx.Module):
    """Five blocks of 3x3 convolutions, halving after the first three; any height and width of at least 8.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      counts: the number of convolutions of each block; the blocks' widths are 64, 128, 256, 512, 512.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015;
      RepDistiller's version.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, *, counts: tuple[int, int, int, int, int], **common: Any
    ):
        self.block0 = _block(in_channels, 64, counts[0], **common)
        self.block1 = _block(64, 128, counts[1], **common)
        self.block2 = _block(128, 256, counts[2], **common)
        self.block3 = _block(256, 512, counts[3], **common)
        self.block4 = _block(512, 512, counts[4], **common)
        self.classifier = linear(
            512,
            num_classes,
            kernel_init=normal(0.01),
            bias_init=nnx.initializers.zeros,
            **common,
        )

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        high = x.shape[1] == 64  # the published code halves a fourth time, but only for Tiny-ImageNet's size
        for block in (self.block0, self.block1, self.block2):
            x = max_pool(block(x, mode), 2, stride=2)
        x = self.block3(x, mode)
        x = max_pool(x, 2, stride=2) if high else x
        return self.classifier(global_average_pool(self.block4(x, mode)))


def _block(in_features: int, features: int, count: int, **common: Any) -> Sequential:
    widths = [in_features] + [features] * count
    layers: list[Any] = []
    for before, after in itertools.pairwise(widths):
        layers += [conv(before, after, 3, use_bias=True, **common), BatchNorm(after, **common), nnx.relu]
    return Sequential(*layers)


VGGS = {
    f"vgg{3 + sum(counts)}": functools.partial(VGG, counts=counts)
    for counts in ((1, 1, 1, 1, 1), (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4))
}

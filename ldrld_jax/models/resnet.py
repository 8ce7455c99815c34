"""The ResNets: RepDistiller's and mdistiller's for CIFAR and Tiny-ImageNet, and torchvision's for ImageNet."""

import functools
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, Sequential, conv, global_average_pool, linear, max_pool, stage


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut: `[N, H, W, in_features]` to `[N, H', W', features]`.

    `shortcut` is the name of the attribute that holds the projection, which differs among published keys.
    """

    expansion = 1

    def __init__(self, in_features: int, features: int, *, stride: int, shortcut: str, **common: Any):
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

    def __init__(self, in_features: int, features: int, *, stride: int, shortcut: str, **common: Any):
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


class ResNet(nnx.Module):
    """Stages of post-activation blocks after a stem, for any height and width; each stage but the first halves both.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      counts: the number of blocks of each stage.
      widths: channels of the stem, and of each stage before the block's expansion.
      block: `BasicBlock` or `Bottleneck`, with the stride on the first 3x3 convolution.
      imagenet: True for a 7x7 stem of stride 2 and a max-pool, for sizes of at least 32; False for a 3x3 stem that
        keeps the resolution.
      shortcut, head: names of a block's projection and of the last layer, which differ among published keys.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016: section 4.2 for CIFAR, table 1 for
      ImageNet.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        counts: tuple[int, ...],
        widths: tuple[int, ...] = (64, 64, 128, 256, 512),
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        imagenet: bool = False,
        shortcut: str = "downsample",
        head: str = "fc",
        **common: Any,
    ):
        self.counts, self.imagenet, self.head_name = counts, imagenet, head
        features = widths[0]
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = conv(in_channels, features, kernel, stride=stride, **common)
        self.bn1 = BatchNorm(features, **common)
        for i, (width, count) in enumerate(zip(widths[1:], counts, strict=True), start=1):
            layers = stage(block, features, width, count, stride=1 if i == 1 else 2, shortcut=shortcut, **common)
            setattr(self, f"layer{i}", layers)
            features = block.expansion * width
        setattr(self, head, linear(features, num_classes, **common))

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        if self.imagenet:
            x = max_pool(x, 3, stride=2, padding=1)
        for i in range(1, len(self.counts) + 1):
            x = getattr(self, f"layer{i}")(x, mode)
        return getattr(self, self.head_name)(global_average_pool(x))


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)  # the latter are RepDistiller's x4
_DEPTHS: dict[int, dict[str, Any]] = {
    18: dict(block=BasicBlock, counts=(2, 2, 2, 2)),
    34: dict(block=BasicBlock, counts=(3, 4, 6, 3)),
    50: dict(block=Bottleneck, counts=(3, 4, 6, 3)),
    101: dict(block=Bottleneck, counts=(3, 4, 23, 3)),
}

CIFAR_RESNETS = {
    f"resnet{depth}{suffix}": functools.partial(ResNet, widths=widths, counts=((depth - 2) // 6,) * 3)
    for suffix, widths, depths in (("", _NARROW, (8, 14, 20, 32, 44, 56, 110)), ("x4", _WIDE, (8, 32)))
    for depth in depths
}
# RepDistiller's; mdistiller trains its ResNet18 on Tiny-ImageNet.
SMALL_IMAGE_RESNETS = {
    f"ResNet{depth}": functools.partial(ResNet, **_DEPTHS[depth], shortcut="shortcut", head="linear")
    for depth in (18, 34, 50)
}
IMAGENET_RESNETS = {
    f"imagenet_resnet{depth}": functools.partial(ResNet, **kind, imagenet=True) for depth, kind in _DEPTHS.items()
}

"""The CIFAR ResNets of RepDistiller and mdistiller: three stages of two-convolution blocks, post-activation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Dtype, Mode, conv, global_average_pool, linear


class Block(nnx.Module):
    """Two 3x3 convolutions beside a shortcut, which projects where the shape changes."""

    def __init__(
        self, in_features: int, features: int, stride: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs
    ):
        make_conv = functools.partial(conv, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = functools.partial(BatchNorm, dtype=dtype, param_dtype=param_dtype)
        self.conv1 = make_conv(in_features, features, 3, stride=stride)
        self.bn1 = norm(features)
        self.conv2 = make_conv(features, features, 3)
        self.bn2 = norm(features)
        self.downsample = nnx.List(
            [make_conv(in_features, features, 1, stride=stride), norm(features)]
            if stride != 1 or in_features != features
            else []
        )

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x), mode))
        y = self.bn2(self.conv2(y), mode)
        if self.downsample:
            project, norm = self.downsample
            x = norm(project(x), mode)
        return nnx.relu(x + y)


class CifarResNet(nnx.Module):
    """A ResNet of depth 6 n + 2 for small images, any height and width.

    Args:
      num_classes: C, the number of logits.
      in_channels: channels of the input.
      depth: 6 n + 2 with n >= 1.
      widths: channels of the stem and of the three stages.
      dtype: of the computation; logits come in it.
      param_dtype: of the parameters.
      rngs: the "params" stream initialises.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        depth: int,
        widths: tuple[int, int, int, int],
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        stem, *stages = widths
        self.conv1 = conv(in_channels, stem, 3, **common)
        self.bn1 = BatchNorm(stem, dtype=dtype, param_dtype=param_dtype)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(stem, stages[0], blocks, stride=1, **common)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2, **common)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2, **common)
        self.fc = linear(stages[2], num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` leaves out padding."""
        mode = Mode(train, where)
        x = nnx.relu(self.bn1(self.conv1(x), mode))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x, mode)
        return self.fc(global_average_pool(x))


def _stage(in_features: int, features: int, blocks: int, *, stride: int, **common) -> nnx.List:
    first = Block(in_features, features, stride, **common)
    return nnx.List([first, *(Block(features, features, 1, **common) for _ in range(blocks - 1))])


def _resnet(depth: int, widths: tuple[int, int, int, int]) -> Callable[..., CifarResNet]:
    return functools.partial(CifarResNet, depth=depth, widths=widths)


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)

CIFAR_RESNETS = {f"resnet{depth}": _resnet(depth, _NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)} | {
    f"resnet{depth}x4": _resnet(depth, _WIDE) for depth in (8, 32)
}

"""RepDistiller's MobileNetV2 for CIFAR, of half the width, and mdistiller's for Tiny-ImageNet."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ldrld_jax.models.initializers import normal, torch_default, torch_uniform
from ldrld_jax.models.layers import BatchNorm, Mode, Sequential, conv, global_average_pool, linear, stage


def _inverted(
    convolution: Callable[..., nnx.Conv],
    activation: Callable[[jax.Array], jax.Array],
    in_features: int,
    features: int,
    *,
    expansion: int,
    stride: int,
    **common: Any,
) -> Sequential:
    """Creates the layers of an inverted residual: an expansion, a depthwise and a linear convolution."""
    hidden = expansion * in_features
    return Sequential(
        convolution(in_features, hidden, 1, **common),
        BatchNorm(hidden, **common),
        activation,
        convolution(hidden, hidden, 3, stride=stride, groups=hidden, **common),
        BatchNorm(hidden, **common),
        activation,
        convolution(hidden, features, 1, **common),
        BatchNorm(features, **common),
    )


class InvertedResidual(nnx.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution; adds the input if the shape does not change."""

    def __init__(self, in_features: int, features: int, *, expansion: int, stride: int, **common: Any):
        self.conv = _inverted(conv, nnx.relu, in_features, features, expansion=expansion, stride=stride, **common)
        self.residual = stride == 1 and in_features == features

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = self.conv(x, mode)
        return x + y if self.residual else y


# Expansion, half-size width, number of blocks, stride of the first block.
_STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class MobileNetV2(nnx.Module):
    """Seven stages of inverted residuals; reduces any height and width to 1/16. The head of 1280 is not halved.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018; RepDistiller's
      version, with ReLU, and with an expansion in the first stage, too.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.conv1 = Sequential(conv(in_channels, 16, 3, stride=2, **common), BatchNorm(16, **common), nnx.relu)
        features, stages = 16, []
        for expansion, width, count, stride in _STAGES:
            options = dict(stride=stride, expansion=expansion, **common)
            stages.append(stage(InvertedResidual, features, width, count, **options))
            features = width
        self.blocks = Sequential(*stages)
        self.conv2 = Sequential(conv(features, 1280, 1, **common), BatchNorm(1280, **common), nnx.relu)
        self.classifier = nnx.List(
            [
                linear(
                    1280,
                    num_classes,
                    kernel_init=normal(0.01),
                    bias_init=nnx.initializers.zeros,
                    **common,
                )
            ]
        )

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        for part in (self.conv1, self.blocks, self.conv2):
            x = part(x, mode)
        return self.classifier[0](global_average_pool(x))


class BiasedInvertedResidual(nnx.Module):
    """`InvertedResidual` with ReLU6, and a bias on every convolution, under the keys of the Tiny-ImageNet version."""

    def __init__(self, in_features: int, features: int, *, expansion: int, stride: int, **common: Any):
        layers = dict(expansion=expansion, stride=stride, **common)
        self.residual = _inverted(_biased_conv, nnx.relu6, in_features, features, **layers)
        self.adds = stride == 1 and in_features == features

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        y = self.residual(x, mode)
        return x + y if self.adds else y


# Expansion, width, number of blocks, stride of the first block.
_TINY_IMAGENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 1),
    (6, 320, 1, 1),
)


class TinyImageNetMobileNetV2(nnx.Module):
    """Seven stages of inverted residuals after a 1x1 stem that pads; reduces 64 pixels to 9, any size to about 1/8.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      common: `dtype` of the computation and the logits, `param_dtype` of the parameters, and `rngs`,
        whose "params" stream initialises the parameters.

    References:
      Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018; mdistiller's
      `mobilenetv2_tinyimagenet`, whose last layer is a 1x1 convolution.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, **common: Any):
        self.pre = Sequential(_biased_conv(in_channels, 32, 1, **common), BatchNorm(32, **common), nnx.relu6)
        features = 32
        for i, (expansion, width, count, stride) in enumerate(_TINY_IMAGENET_STAGES, start=1):
            options = dict(stride=stride, expansion=expansion, **common)
            layers = stage(BiasedInvertedResidual, features, width, count, **options)
            setattr(self, f"stage{i}", layers if count > 1 else layers[0])  # as the published keys have it
            features = width
        self.conv1 = Sequential(_biased_conv(features, 1280, 1, **common), BatchNorm(1280, **common), nnx.relu6)
        self.conv2 = _biased_conv(1280, num_classes, 1, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`; `where` `[N]` masks out padding."""
        mode = Mode(train, where)
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        stages = [getattr(self, f"stage{i}") for i in range(1, len(_TINY_IMAGENET_STAGES) + 1)]
        for part in (self.pre, *stages, self.conv1):
            x = part(x, mode)
        return self.conv2(global_average_pool(x)[:, None, None])[:, 0, 0]


def _biased_conv(in_features: int, features: int, kernel: int, *, groups: int = 1, **kwargs: Any) -> nnx.Conv:
    """Creates a convolution with a bias and PyTorch's default initialisation."""
    return conv(
        in_features,
        features,
        kernel,
        groups=groups,
        use_bias=True,
        kernel_init=torch_default,
        bias_init=torch_uniform(kernel**2 * in_features // groups),
        **kwargs,
    )


MOBILENETS_V2 = {"MobileNetV2": MobileNetV2, "tinyimagenet_mobilenetv2": TinyImageNetMobileNetV2}

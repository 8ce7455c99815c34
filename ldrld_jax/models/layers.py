"""Layers shared by the model families, with PyTorch's padding, initialisation and statistics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ldrld_jax.models.convolution import conv_general_dilated
from ldrld_jax.models.initializers import kaiming_normal_fan_out, torch_default, torch_uniform
from ldrld_jax.models.normalisation import EPSILON, Moments, normalise

Dtype = jax.typing.DTypeLike


class Mode(NamedTuple):
    """Mode of a forward pass: `train` uses batch statistics; `where` `[N]` masks out padded examples."""

    train: bool
    where: jax.Array | None = None


def accumulation_dtype(*dtypes: Dtype) -> Dtype:
    """Returns a dtype for sums that bfloat16 cannot hold: float64 if any dtype is float64, otherwise float32."""
    return jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32


def conv(
    in_features: int,
    out_features: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = False,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = kaiming_normal_fan_out,
    bias_init: nnx.Initializer = nnx.initializers.zeros,
) -> nnx.Conv:
    """Creates a square convolution over `[N, H, W, C]`, padded by kernel // 2 on both sides as in PyTorch.

    Flax's "SAME" would pad (0, 1) at stride 2.
    """
    pad = (kernel // 2, kernel // 2)
    return nnx.Conv(
        in_features,
        out_features,
        (kernel, kernel),
        strides=stride,
        padding=(pad, pad),
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        param_dtype=param_dtype,
        conv_general_dilated=conv_general_dilated,
        rngs=rngs,
    )


torch_conv = functools.partial(conv, kernel_init=torch_default)


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: Dtype,
    param_dtype: Dtype,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer = torch_default,
    bias_init: nnx.Initializer | None = None,
) -> nnx.Linear:
    """Creates a linear layer with PyTorch's initialisation, unless other initialisers are given."""
    return nnx.Linear(
        in_features,
        out_features,
        kernel_init=kernel_init,
        bias_init=bias_init or torch_uniform(in_features),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """Batch normalisation as in PyTorch: eps 1e-5, momentum .9, unbiased running variance.

    It replaces `nnx.BatchNorm`, which keeps the biased running variance and promotes dtypes. Statistics
    are float32 at least and computed in two passes, which loses no precision if the mean is large.
    Examples masked out by `mode.where` enter no statistic, so a padded batch trains exactly like the
    batch without its padding. Under jit over a mesh the batch is the global one.

    Attributes:
      groups: number of groups with separate statistics, as if each group was on a device of its own. Example
        i is in group i % groups, whatever the devices. See `group_batch_norms`.
    """

    groups: int = 1

    def __init__(self, features: int, *, dtype: Dtype, param_dtype: Dtype, rngs: nnx.Rngs | None = None):
        del rngs  # not random; accepted so that all layers take the same arguments
        stats_dtype = accumulation_dtype(dtype, param_dtype)
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, stats_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, stats_dtype))
        self.dtype = dtype

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        """Normalises `[N, ..., C]`; the result has the same shape and the module's dtype.

        Raises:
          TypeError: in training, if N is not a multiple of `groups`.
        """
        stats_dtype = self.mean[...].dtype
        shape, x = x.shape, x.astype(stats_dtype)
        scale, bias = (p[...].astype(stats_dtype) for p in (self.scale, self.bias))
        if not mode.train:
            lead = (1,) * (x.ndim - 1)
            factor = (jax.lax.rsqrt(self.var[...] + EPSILON) * scale).reshape(*lead, -1)
            y = (x - self.mean[...].reshape(*lead, -1)) * factor + bias.reshape(*lead, -1)
            return y.astype(self.dtype)
        # [n, groups, ..., C], example i = a * groups + g, so that a device that holds rows holds some of each group.
        x = x.reshape(-1, self.groups, *x.shape[1:])
        y, moments = normalise(x, scale, bias, None if mode.where is None else mode.where.reshape(x.shape[:2]))
        self._average(moments)
        return y.reshape(shape).astype(self.dtype)

    def _average(self, moments: Moments) -> None:
        """Moves the running statistics a tenth of the way to the groups' mean, weighted by their example counts.

        A batch of which every example is masked leaves them as they are.
        """
        mean, var, count = jax.lax.stop_gradient(moments)
        total = jnp.sum(count)
        weight = count / jnp.maximum(total, 1)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        for running, batch in ((self.mean, mean), (self.var, unbiased)):
            average = jnp.sum(weight * batch, axis=tuple(range(batch.ndim - 1)))
            # `running[...] = ` words an error of both tracers only to drop it: two thirds of a deep net's tracing.
            running.set_value(jnp.where(total > 0, 0.9 * running[...] + 0.1 * average, running[...]))


def group_batch_norms(model: nnx.Module, groups: int) -> None:
    """Sets the number of groups with separate statistics in every batch normalisation of a model."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            module.groups = groups


class Sequential(nnx.List):
    """A sequence of layers; the identity if there are none.

    Functions such as `nnx.relu` take a position in the list. Positions are part of every parameter's
    path, so this makes them equal to PyTorch's.
    """

    def __init__(self, *layers: Any):
        super().__init__(layers)

    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        for layer in self:
            modeless = isinstance(layer, nnx.Conv) or not isinstance(layer, nnx.Module)
            x = layer(x) if modeless else layer(x, mode)
        return x


def stage(
    block: Callable[..., nnx.Module], in_features: int, features: int, count: int, *, stride: int, **options: Any
) -> Sequential:
    """Creates `count` blocks of one width; the first may have a stride and change the width.

    Args:
      block: a class of blocks; one with an attribute `expansion` returns so many times `features` channels.
      in_features: channels of the input.
      features: the width of the blocks.
      count: at least 1.
      stride: of the first block.
      options: of every block.
    """
    width = getattr(block, "expansion", 1) * features
    first = block(in_features, features, stride=stride, **options)
    return Sequential(first, *(block(width, features, stride=1, **options) for _ in range(count - 1)))


def global_average_pool(x: jax.Array) -> jax.Array:
    """Averages `[N, H, W, C]` to `[N, C]`; equals the published fixed windows at native size and fits any other."""
    return jnp.mean(x, axis=(1, 2))


def max_pool(x: jax.Array, window: int, *, stride: int, padding: int = 0) -> jax.Array:
    """Pools `[N, H, W, C]` by the maximum over square windows, padded on both sides as in PyTorch."""
    pad = (padding, padding)
    return nnx.max_pool(x, (window, window), strides=(stride, stride), padding=(pad, pad))


def average_pool(x: jax.Array, window: int, *, stride: int, padding: int = 0) -> jax.Array:
    """Pools `[N, H, W, C]` by the mean over square windows; padding counts as zeros, PyTorch's default.

    It replaces `nnx.avg_pool`, which promotes dtypes.
    """
    pad = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    total = jax.lax.reduce_window(
        x, np.zeros((), x.dtype), jax.lax.add, (1, window, window, 1), (1, stride, stride, 1), pad
    )
    return total / window**2


def shuffle_channels(x: jax.Array, groups: int) -> jax.Array:
    """Shuffles the channels of `[N, H, W, C]` among groups: reshapes C to groups x C / groups and transposes."""
    *lead, channels = x.shape
    return x.reshape(*lead, groups, channels // groups).swapaxes(-1, -2).reshape(x.shape)

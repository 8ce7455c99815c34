"""Vision transformers under timm's names."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ldrld_jax.models.initializers import normal, torch_default, torch_uniform
from ldrld_jax.models.layers import Dtype, accumulation_dtype, linear

# timm truncates N(0, .02^2) at +-2, a hundred standard deviations away.
_normal = normal(0.02)
_linear = functools.partial(linear, kernel_init=_normal, bias_init=nnx.initializers.zeros)


class Attention(nnx.Module):
    """Multi-head self-attention over `[N, tokens, width]`; one matrix computes queries, keys and values."""

    def __init__(self, width: int, heads: int, **common: Any):
        self.heads = heads
        self.qkv = _linear(width, 3 * width, **common)
        self.proj = _linear(width, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) * (width // self.heads) ** -0.5
        # The softmax is computed in float32 at least.
        weights = nnx.softmax(scores.astype(accumulation_dtype(x.dtype))).astype(x.dtype)
        return self.proj(jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(x.shape))


class Mlp(nnx.Module):
    """Two linear layers around the exact GELU; its tanh approximation is off by 1.5e-4."""

    def __init__(self, width: int, hidden: int, **common: Any):
        self.fc1 = _linear(width, hidden, **common)
        self.fc2 = _linear(hidden, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class EncoderBlock(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int, **common: Any):
        self.norm1 = _layer_norm(width, **common)
        self.attn = Attention(width, heads, **common)
        self.norm2 = _layer_norm(width, **common)
        self.mlp = Mlp(width, 4 * width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    """Encoder blocks over patches of 16 x 16 and a class token, which yields the logits.

    The position embedding is for images of 224 x 224. For other sizes it is resampled as in timm, bicubic
    and antialiased. Most published weights expect images normalised with mean and standard deviation
    .5, not with ImageNet's.

    Args:
      num_classes: C, the number of logits.
      in_channels: number of channels of the input.
      width: width of the tokens, 64 per head.
      depth: number of blocks.
      dtype: dtype of the computation and the logits.
      param_dtype: dtype of the parameters.
      rngs: its "params" stream initialises the parameters.

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; the small sizes are those of Touvron
      et al., "Training data-efficient image transformers", 2021. Keys and layout are timm's.
    """

    patch = 16
    grid = 14

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int,
        depth: int,
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        tokens = 1 + self.grid**2
        self.dtype = dtype
        self.cls_token = nnx.Param(normal(1e-6)(rngs.params(), (1, 1, width), param_dtype))
        self.pos_embed = nnx.Param(_normal(rngs.params(), (1, tokens, width), param_dtype))
        # A dict yields the published key, patch_embed.proj. The convolution's stride is its kernel size, unpadded.
        self.patch_embed = nnx.Dict(
            proj=nnx.Conv(
                in_channels,
                width,
                (self.patch, self.patch),
                strides=self.patch,
                padding="VALID",
                kernel_init=torch_default,
                bias_init=torch_uniform(in_channels * self.patch**2),
                **common,
            )
        )
        self.blocks = nnx.List(EncoderBlock(width, width // 64, **common) for _ in range(depth))
        self.norm = _layer_norm(width, **common)
        self.head = _linear(width, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        """Computes logits `[N, C]` of normalised images `[N, H, W, channels]`, H and W multiples of 16.

        `train` and `where` have no effect, because there is neither BatchNorm nor dropout.

        Raises:
          ValueError: if the patches do not tile the images.
        """
        del train, where
        n, height, width, _ = x.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"images must have height and width that are multiples of {self.patch}, got {height} x {width}. "
                "Resize them in the data block."
            )
        x = self.patch_embed.proj(x)
        positions = self._positions(x.shape[1], x.shape[2]).astype(self.dtype)
        x = x.reshape(n, -1, x.shape[-1])
        token = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (n, 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + jnp.broadcast_to(positions, (n, *positions.shape[1:]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])

    def _positions(self, height: int, width: int) -> jax.Array:
        """Returns the position embedding resampled to a grid, `[1, 1 + height * width, features]`."""
        positions = self.pos_embed[...]
        if (height, width) == (self.grid, self.grid):
            return positions
        token, patches = positions[:, :1], positions[:, 1:]
        patches = patches.reshape(1, self.grid, self.grid, -1)
        patches = jax.image.resize(patches, (1, height, width, patches.shape[-1]), "bicubic", antialias=True)
        return jnp.concatenate([token, patches.reshape(1, height * width, -1)], axis=1)


def _layer_norm(width: int, **common: Any) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, **common)


VISION_TRANSFORMERS = {
    "vit_tiny_patch16_224": functools.partial(VisionTransformer, width=192, depth=12),
    "vit_small_patch16_224": functools.partial(VisionTransformer, width=384, depth=12),
}

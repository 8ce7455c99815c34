"""Small nets of each kind in bfloat16, and the transformer's own traits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.models.resnet import ResNet
from ldrld_jax.models.vit import VisionTransformer

QUICK = {"xla_backend_optimization_level": 0}
SMALL = {
    "resnet": functools.partial(ResNet, counts=(1, 1, 1), widths=(8, 8, 16, 16)),
    "vit": functools.partial(VisionTransformer, width=128, depth=2),
}


def model(kind, dtype=jnp.float32):
    return SMALL[kind](10, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(params=jax.random.key(0, impl="rbg")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_bfloat16_agrees_with_float32(kind, rng):
    x = jnp.asarray(rng.standard_normal((8, 32, 32, 3)), jnp.float32)

    def logits(dtype):
        forward = jax.jit(lambda x: model(kind, dtype)(x, train=True), compiler_options=QUICK)
        return forward(x.astype(dtype))

    exact, rounded = logits(jnp.float32), logits(jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    assert jnp.abs(rounded.astype(jnp.float32) - exact).max() < 0.1 * jnp.abs(exact).max()


def test_the_transformer_starts_as_timm_starts_it():
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(model("vit"), nnx.Param)), compiler_options=QUICK)()
    for weight in (params["blocks"][1]["attn"]["qkv"]["kernel"], params["head"]["kernel"], params["pos_embed"]):
        np.testing.assert_allclose(weight.std(), 0.02, rtol=0.1)
    assert jnp.abs(params["cls_token"]).max() < 1e-5
    assert jnp.abs(params["patch_embed"]["proj"]["kernel"]).max() <= (3 * 16**2) ** -0.5
    assert not jnp.any(params["blocks"][1]["attn"]["qkv"]["bias"])


def test_the_transformer_says_which_sizes_it_takes():
    with pytest.raises(ValueError, match="multiples of 16, got 40 x 48"):
        jax.eval_shape(lambda x: model("vit")(x, train=False), jax.ShapeDtypeStruct((1, 40, 48, 3), jnp.float32))

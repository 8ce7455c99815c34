"""Our logits against those of the published PyTorch code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.interop.torch_import import from_state_dict, to_state_dict
from ldrld_jax.models import outline
from ldrld_jax.models.purify import purify
from tests.models import torch_zoo

GOLDEN = torch_zoo.logits()
# Relative to the largest logit: these untrained nets reach 1e8.
TOLERANCE = {"float64": 1e-10, "float32": 2e-4}
# timm resamples positions in float32 whatever the weights are.
TOLERANCE_RESAMPLED = {"float64": 1e-8, "float32": 2e-4}

# Nets of few shapes run op by op in less time than XLA takes to compile them, the others compiled without optimisation.
FEW_SHAPES = ("resnet", "wrn", "vgg")


def purified(name: str, dtype: str):
    """The pure function with the prescribed weights."""
    apply, params, batch_stats = purify(outline(name, torch_zoo.num_classes(name), dtype=dtype, param_dtype=dtype))
    return apply, *from_state_dict(torch_zoo.state_dict(name), params, batch_stats)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", torch_zoo.KEYS)
def test_logits_are_pytorchs(name, dtype):
    # Flax's own layers promote float64 implicitly.
    promotion = "strict" if dtype == "float32" else "standard"
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion(promotion):
        apply, params, batch_stats = purified(name, dtype)
        for kind in [kind for model, kind in GOLDEN if model == name]:

            def forward(params, batch_stats, images, train=kind == "train", apply=apply):
                return apply(params, batch_stats, images, train=train)[0]

            if not name.startswith(FEW_SHAPES):
                forward = jax.jit(forward, compiler_options={"xla_backend_optimization_level": 0})
            ours = forward(params, batch_stats, jnp.asarray(torch_zoo.images(name, kind), dtype))
            theirs = GOLDEN[name, kind]
            tolerance = TOLERANCE_RESAMPLED if kind == "eval_96x160" else TOLERANCE
            assert ours.dtype == dtype
            assert np.abs(np.asarray(ours) - theirs).max() <= tolerance[dtype] * np.abs(theirs).max(), kind


@pytest.mark.parametrize("name", torch_zoo.KEYS)
def test_keys_shapes_and_parameter_count_are_the_published_ones(name, x64):
    _, params, batch_stats = purified(name, "float64")
    state = to_state_dict(params, batch_stats)
    assert {key: list(value.shape) for key, value in state.items()} == torch_zoo.KEYS[name]
    for key, value in torch_zoo.state_dict(name).items():
        np.testing.assert_array_equal(state[key], value)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    published = [np.prod(shape) for key, shape in torch_zoo.KEYS[name].items() if not key.endswith(statistics)]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(published)

"""A network with all that a network has, for tests of what is around it: it compiles in a second."""

import jax
from flax import nnx

from ldrld_jax.models.layers import BatchNorm, Mode, conv, global_average_pool, linear


class TinyNet(nnx.Module):
    """Convolution, batch normalisation, pooling, linear head."""

    def __init__(self, num_classes: int, in_channels: int, **common):
        self.conv = conv(in_channels, 16, 3, stride=2, **common)
        self.bn = BatchNorm(16, dtype=common["dtype"], param_dtype=common["param_dtype"])
        self.fc = linear(16, num_classes, **common)

    def __call__(self, x: jax.Array, *, train: bool, where: jax.Array | None = None) -> jax.Array:
        x = nnx.relu(self.bn(self.conv(x), Mode(train, where)))
        return self.fc(global_average_pool(x))

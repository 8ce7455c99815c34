"""The largest logits of an image and the mass of the others, in place of a whole row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ldrld_jax.runtime.mesh import batch_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The K largest logits of rows of `total` logits, and the log-sum-exp of the others.

    Attributes:
      values: `[..., K]`, in descending order.
      classes: `[..., K]`, unsigned integers; ties go to the lower class.
      rest: `[...]` float32, the log-sum-exp of the other `total` - K logits, at temperature 1.
      total: C > K, the number of classes.
    """

    values: Any  # of NumPy or JAX, like the others
    classes: Any
    rest: Any
    total: int = dataclasses.field(metadata={"static": True})

    def dense(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        r"""Returns rows `[..., C]`: the K logits in their places, and in the others the rest spread evenly.

        .. math:: z_c = \mathrm{rest} - \log(C - K)

        The softmax of the row then has the exact mass in every stored class and in the others together.

        Args:
          dtype: of the result, float32 or float64.

        Example:
          >>> rows = jnp.log(jnp.array([[0.1, 0.5, 0.05, 0.35]]))
          >>> p = jax.nn.softmax(top_logits(rows, 1, jnp.float32).dense(jnp.float32))
          >>> [f"{each:.3f}" for each in p[0]]
          ['0.167', '0.500', '0.167', '0.167']
        """
        each = self.rest.astype(dtype) - np.asarray(np.log(self.total - self.values.shape[-1]), dtype)
        rows = jnp.broadcast_to(each[..., None], (*each.shape, self.total))
        # Under vmap, so that no row of a batch that is split over devices is gathered.
        put = jnp.vectorize(lambda row, classes, values: row.at[classes].set(values), signature="(c),(k),(k)->(c)")
        return put(rows, self.classes.astype(jnp.int32), self.values.astype(dtype))


def class_dtype(classes: int) -> np.dtype:
    """Returns the dtype of class indices, of which the largest value stands for a missing one."""
    return np.dtype(np.uint16 if classes < 2**16 else np.uint32)


def top_logits(logits: jax.Array, count: int, dtype: jax.typing.DTypeLike) -> TopLogits:
    """Selects the `count` largest of each row of logits `[..., C]`, rounded to `dtype`; `count` < C.

    The rest is the log-sum-exp of the other logits as rounded to `dtype`, so that rows with and without the
    selection have the same softmax up to the spread of the rest.
    """
    logits = logits.astype(dtype)
    values, classes = jax.lax.top_k(logits, count)
    ruled_out = lambda row, classes: row.at[classes].set(-jnp.inf, unique_indices=True)  # noqa: E731
    others = jnp.vectorize(ruled_out, signature="(c),(k)->(c)")(logits, classes)
    rest = jax.nn.logsumexp(others.astype(jnp.float32), axis=-1)
    total = logits.shape[-1]
    return TopLogits(values, classes.astype(class_dtype(total)), rest, total)


def top_logits_on(mesh: Mesh, logits: jax.Array, count: int, dtype: jax.typing.DTypeLike) -> TopLogits:
    """Computes `top_logits` where the rows lie: a `lax.top_k` outside a `shard_map` would gather them all."""
    spec = batch_sharding(mesh).spec
    select = jax.shard_map(lambda z: top_logits(z, count, dtype), mesh=mesh, in_specs=spec, out_specs=spec)
    return select(logits)

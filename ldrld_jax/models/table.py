"""Computes the cost of every model: its parameters, and the FLOPs of a forward pass at its native size.

`python -m ldrld_jax.models.table` lists all models.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldrld_jax.models import MODELS, outline
from ldrld_jax.models.purify import purify


class ModelSummary(NamedTuple):
    """The cost of one model at its native size.

    Attributes:
      name: key of `MODELS`.
      image_size: height and width: 32 for CIFAR models, 64 for Tiny-ImageNet models, 224 for ImageNet models.
      num_classes: 100, 200 or 1000.
      parameters: the number of trained values, without running statistics.
      flops: FLOPs of the forward pass of one image, two per multiply-add, in convolutions and matrix
        products only. Papers that count multiply-adds, as torchvision does, report half of it.
    """

    name: str
    image_size: int
    num_classes: int
    parameters: int
    flops: int


def summarize(name: str) -> ModelSummary:
    """Counts parameters and FLOPs from shapes, without computing anything.

    Raises:
      UserError: if no model has this name.

    Example:
      >>> summarize("resnet8")
      ModelSummary(name='resnet8', image_size=32, num_classes=100, parameters=83892, flops=25014784)
    """
    natives = {"imagenet": (224, 1000), "vit": (224, 1000), "tinyimagenet": (64, 200)}
    image_size, num_classes = natives.get(name.partition("_")[0], (32, 100))
    apply, params, batch_stats = purify(outline(name, num_classes))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    forward = lambda v, x: apply(*v, x, train=False)[0]  # noqa: E731
    flops, _ = traced(forward, (params, batch_stats), (1, image_size, image_size, 3))
    return ModelSummary(name, image_size, num_classes, parameters, flops)


def traced(
    forward: Callable[[Any, jax.Array], Any],
    variables: Any,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[int, Any]:
    """Counts the FLOPs of `forward(variables, images)` in convolutions and matrix products, two per multiply-add.

    Args:
      forward: a network's forward pass.
      variables: arrays or their shapes.
      shape, dtype: of the images, `[n, height, width, channels]`, or of other inputs.

    Returns:
      The FLOPs, and what `forward` returns as shapes.
    """
    jaxpr, returned = jax.make_jaxpr(forward, return_shape=True)(variables, jax.ShapeDtypeStruct(shape, dtype))
    return _flops(jaxpr), returned


def model_table(names: Iterable[str] = MODELS) -> str:
    """Returns a readable table with a line per model; all models take about ten seconds.

    Example:
      >>> print(model_table(["resnet8", "resnet8x4"]))
      model      image  classes  parameters  forward MFLOPs
      resnet8       32      100      83,892            25.0
      resnet8x4     32      100   1,233,540           354.1
    """
    header = ("model", "image", "classes", "parameters", "forward MFLOPs")
    rows = [header] + [
        (row.name, f"{row.image_size}", f"{row.num_classes}", f"{row.parameters:,}", f"{row.flops / 1e6:,.1f}")
        for row in map(summarize, names)
    ]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * int(np.prod(kernel)) // kernel[out_axis]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        elif equation.primitive.name == "cond":  # a convolution has one version per platform, of which one runs
            total += max(_flops(branch) for branch in equation.params["branches"])
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * _flops(equation.params["jaxpr"])
        else:
            inner = jax.tree.leaves(list(equation.params.values()))
            total += sum(_flops(leaf) for leaf in inner if hasattr(leaf, "eqns"))
    return total


if __name__ == "__main__":
    print(model_table())

"""LDRLD's terms from a kernel that reads the logits once, with derivatives in both modes.

The kernel stores no array of the logits' size. The derivative of a term is elementwise in the logits and a few numbers
per row, so XLA fuses it into its consumer (the cross-entropy's gradient reads the same student logits).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ldrld_jax.losses.common import check_logits, check_rows
from ldrld_jax.losses.divergence import RULED_OUT
from ldrld_jax.losses.ldrld_config import LDRLDConfig, LDRLDTerms
from ldrld_jax.losses.ldrld_kernel import RowSums, local_terms, row_sums_gpu, row_sums_tpu

Kernel = Callable[[jax.Array, jax.Array, LDRLDConfig], RowSums]

_row_sums_p = Primitive("ldrld_row_sums")
"""A primitive, because `lax.platform_dependent` lowers a `pallas_call` of any branch for all platforms of an export."""
_row_sums_p.multiple_results = True
_row_sums_p.def_impl(lambda *rows, cfg: jax.jit(functools.partial(_row_sums_p.bind, cfg=cfg))(*rows))


def _kernel_of_the_platform(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> RowSums:
    """Computes `RowSums` with the kernel of the platform that the program is lowered for, interpreted on a CPU."""
    return RowSums(*_row_sums_p.bind(teacher, student, cfg=cfg))


@_row_sums_p.def_abstract_eval
def _(teacher, student, *, cfg):
    count = student.shape[0]
    outputs = [((3, count), jnp.float32), *[((2, count), jnp.float32)] * 2]
    outputs += [((cfg.depth, count), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    # Inside a shard_map, a type records the axes over which its values differ.
    like = max((teacher, student), key=lambda z: len(z.manual_axis_type.varying))
    sharding = NamedSharding(like.sharding.mesh, P(None, like.sharding.spec[0]))
    return [like.update(shape=shape, dtype=jnp.dtype(dtype), sharding=sharding) for shape, dtype in outputs]


def _batched(rows, axes, *, cfg):
    """Folds a batch axis into the rows of the same kernel."""
    size = next(z.shape[axis] for z, axis in zip(rows, axes, strict=True) if axis is not None)
    rows = [
        jnp.broadcast_to(z[None], (size, *z.shape)) if axis is None else jnp.moveaxis(z, axis, 0)
        for z, axis in zip(rows, axes, strict=True)
    ]
    _, count, classes = rows[0].shape
    outputs = _row_sums_p.bind(*(z.reshape(size * count, classes) for z in rows), cfg=cfg)
    return [z.reshape(-1, size, count) for z in outputs], [1] * len(outputs)


batching.primitive_batchers[_row_sums_p] = _batched


def _some_gpu() -> contextlib.AbstractContextManager:
    """Returns a context in which Triton can lower a kernel on a machine without a GPU.

    From jax 0.12 on, lowering needs a device. Without one, this describes the oldest supported kind; XLA compiles
    the code for the device that it finds at run time.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if jax.default_backend() == "gpu" or (described is not None and described.platform == "gpu"):
        return contextlib.nullcontext()
    oldest = jax.sharding.AbstractDevice(device_kind="NVIDIA A100", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=oldest))


def _register(platform: str, kernel: Kernel, context: Callable = contextlib.nullcontext) -> None:
    lower = mlir.lower_fun(lambda teacher, student, cfg: kernel(teacher, student, cfg))

    def lower_for_each_device(ctx, *rows, cfg):
        mesh = _mesh_to_split(ctx.module_context.axis_context)
        # Neither a kernel nor the shard_map below knows what is around it.
        ctx = ctx.replace(avals_in=[jax.core.ShapedArray(z.shape, z.dtype) for z in ctx.avals_in])
        if mesh is None:
            with context():
                return lower(ctx, *rows, cfg=cfg)
        with jax.sharding.use_abstract_mesh(mesh):
            return mlir.lower_fun(functools.partial(_on_own_rows, mesh=mesh))(ctx, *rows, cfg=cfg)

    mlir.register_lowering(_row_sums_p, lower_for_each_device, platform=platform)


def _mesh_to_split(context: Any) -> AbstractMesh | None:
    """Returns the mesh of a program over several devices; None for one device or inside a shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    # Without `jax.set_mesh` the mesh is not known here, but the number of devices is, and they keep their order.
    sizes = mesh.shape if not mesh.empty else {"devices": getattr(context, "num_devices", 1)}
    if mesh.are_all_axes_manual or math.prod(sizes.values()) == 1:
        return None
    types = (AxisType.Manual if axis in mesh.manual_axes else AxisType.Auto for axis in sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), tuple(types))


def _on_own_rows(teacher: jax.Array, student: jax.Array, *, cfg: LDRLDConfig, mesh: AbstractMesh) -> list[jax.Array]:
    """Runs the kernel with the rows split over all devices, because XLA would gather all rows on each of them.

    Rows that are split over some of the devices stay there. Devices that share the classes of rows exchange them.
    """
    axes = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    kernel = functools.partial(_row_sums_p.bind, cfg=cfg)
    split = jax.shard_map(kernel, mesh=mesh, in_specs=P(axes), out_specs=P(None, axes), axis_names=set(axes))
    count, devices = student.shape[0], math.prod(mesh.shape[axis] for axis in axes)
    outputs = split(*(jnp.pad(z, ((0, -count % devices), (0, 0))) for z in (teacher, student)))
    return [z[:, :count] for z in outputs]


_register("cpu", functools.partial(row_sums_tpu, interpret=True))
_register("cuda", row_sums_gpu, _some_gpu)
_register("tpu", row_sums_tpu)


def ldrld_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    kernel: Kernel = _kernel_of_the_platform,
) -> LDRLDTerms:
    """Computes `ldrld_jax.ldrld_terms` with `implementation="pallas"`, using `kernel`."""
    teacher, student = jnp.asarray(teacher_logits), jnp.asarray(student_logits)
    check_logits(teacher, student)
    if jnp.float64 in (teacher.dtype, student.dtype):
        raise ValueError('implementation="pallas" is for float32 and less, got float64. Use implementation="xla".')
    # bfloat16 stays: the kernel raises it and so reads half as many bytes.
    teacher, student = (z if z.dtype == jnp.bfloat16 else z.astype(jnp.float32) for z in (teacher, student))
    kept = None if where is None else check_rows("where", where, student.shape[:-1]).reshape(-1)
    rows = [z.reshape(-1, z.shape[-1]) for z in (jax.lax.stop_gradient(teacher), student)]
    terms = _compiled_terms(*rows, kept, cfg, kernel) if student.size else jnp.zeros((3, 0), jnp.float32)
    return LDRLDTerms(*(term.reshape(student.shape[:-1]) for term in terms))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _terms(teacher: jax.Array, student: jax.Array, kept: jax.Array | None, cfg: LDRLDConfig, kernel: Kernel):
    """Computes the three terms `[3, N]` of rows `[N, C]`; 0 where `kept` `[N]` is False."""
    return _row_sums(teacher, student, kept, cfg, kernel).terms


@_terms.defjvp
def _(cfg, kernel, primals, tangents):
    sums = _row_sums(*primals, cfg, kernel)
    return sums.terms, _derivative(*primals, sums, tangents[1], cfg)


_compiled_terms = jax.jit(_terms, static_argnums=(3, 4))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _row_sums(
    teacher: jax.Array, student: jax.Array, kept: jax.Array | None, cfg: LDRLDConfig, kernel: Kernel
) -> RowSums:
    """Computes the kernel's outputs for rows `[N, C]`; 0 where `kept` `[N]` is False, whatever the logits there."""
    sums = kernel(teacher, student, cfg)
    if kept is None:
        return sums
    return jax.tree.map(lambda z: jnp.where(kept[None, :], z, jnp.zeros_like(z)), sums)


@_row_sums.defjvp
def _(cfg, kernel, primals, tangents):
    """Differentiates the inputs of `_derivative` with XLA, for second derivatives."""
    sums = _row_sums(*primals, cfg, kernel)
    teacher, student, tangent = _cleaned(*primals, tangents[1])
    at_rank = _at_ranks(sums, student)
    picked = [[jnp.sum(jnp.where(at, z, 0.0), axis=-1)[None, :] for at in at_rank] for z in (teacher, student, tangent)]
    slopes = lambda students: tuple(z[: cfg.depth] for z in local_terms(picked[0], students, cfg)[2:])  # noqa: E731
    _, slopes_tangent = jax.jvp(slopes, (picked[1],), (picked[2],))
    # The maxima count as constants, so the scales change with the sums of exponentials alone.
    q = _rest_softmax(student, sums.maxima[1], sums.scales[1], at_rank, cfg) * (1 / cfg.temperature)
    shrink = -sums.scales[1] * jnp.sum(q * tangent, axis=-1) * (1 / cfg.temperature)
    moved = RowSums(
        terms=_derivative(*primals, sums, tangents[1], cfg),
        maxima=jnp.zeros_like(sums.maxima),
        scales=jnp.stack([jnp.zeros_like(shrink), shrink]),
        classes=np.zeros(sums.classes.shape, jax.dtypes.float0),
        pair_slopes=slopes_tangent[0],
        integrity_slopes=slopes_tangent[1],
    )
    return sums, moved


# Without the checkpoint, reverse mode keeps masks of the logits' size; with it, the logits and `sums`.
@functools.partial(jax.checkpoint, static_argnums=(5,), prevent_cse=False)
def _derivative(
    teacher: jax.Array,
    student: jax.Array,
    kept: jax.Array | None,
    sums: RowSums,
    tangent: jax.Array,
    cfg: LDRLDConfig,
) -> jax.Array:
    """Computes the derivative of the terms along `tangent`, `[3, N]`; linear in it, and elementwise when transposed."""
    teacher, student, tangent = _cleaned(teacher, student, kept, tangent)
    at_rank = _at_ranks(sums, student)
    picked = jnp.stack([jnp.sum(jnp.where(at, tangent, 0.0), axis=-1) for at in at_rank])
    sides = zip((teacher, student), sums.maxima, sums.scales, strict=True)
    p, q = (_rest_softmax(*side, at_rank, cfg) for side in sides)
    local = (jnp.sum(slopes * picked, axis=0) for slopes in (sums.pair_slopes, sums.integrity_slopes))
    return jnp.stack([*local, jnp.sum((q - p) * tangent, axis=-1)])


def _cleaned(teacher: jax.Array, student: jax.Array, kept: jax.Array | None, tangent: jax.Array) -> list[jax.Array]:
    """Returns logits and tangent `[N, C]` in float32, with -inf raised, and 0 in the rows that are not kept."""
    arrays = [jnp.maximum(z.astype(jnp.float32), RULED_OUT) for z in (teacher, student)]
    arrays.append(tangent.astype(jnp.float32))
    return arrays if kept is None else [jnp.where(kept[:, None], z, 0.0) for z in arrays]


def _at_ranks(sums: RowSums, student: jax.Array) -> list[jax.Array]:
    """Marks the class of each rank, d masks `[N, C]`; XLA fuses these comparisons, unlike a scatter."""
    classes = jax.lax.broadcasted_iota(jnp.int32, student.shape, 1)
    return [classes == chosen[:, None] for chosen in sums.classes]


def _rest_softmax(
    logits: jax.Array, maximum: jax.Array, scale: jax.Array, at_rank: list[jax.Array], cfg: LDRLDConfig
) -> jax.Array:
    """Computes T times the softmax of `[N, C]` logits over the classes without a rank, 0 elsewhere."""
    ranked = functools.reduce(jnp.logical_or, at_rank)
    exponent = jnp.where(ranked, RULED_OUT, logits - maximum[:, None]) * (1 / cfg.temperature)
    return jnp.exp(exponent) * scale[:, None]

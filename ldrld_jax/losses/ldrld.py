"""Local Dense Relational Logit Distillation (ICCV 2025)."""

import dataclasses
import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import platform_dependent

from ldrld_jax.losses.common import mean_over_rows, prepare_logits
from ldrld_jax.losses.divergence import RULED_OUT, AxisName, bernoulli_kl_and_slope, masked_kl
from ldrld_jax.losses.ldrld_config import LDRLDConfig, LDRLDTerms, host_rank_weights
from ldrld_jax.losses.top import Top, not_in_top, take, take_own, top_classes

Implementation = Literal["xla", "pallas"] | None

PROVEN_DEVICES: dict[str, str] = {}
"""Devices on which `implementation=None` selects the Pallas kernel: prefix of the device kind -> date and version of
JAX with which the kernel's values were checked there. Empty: it has not run on a device yet (docs/loss_speed.md)."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _pairs(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> jax.Array:
    """Computes the weighted KL over all pairs of ranks, `[N]`, from the logits of the d classes over T, `[d, N]`."""
    return _pairs_and_slopes(teacher, student, cfg)[0]


@_pairs.defjvp
def _(cfg, primals, tangents):
    slopes = _pairs_and_slopes(*primals, cfg)[1]
    return _pairs(*primals, cfg), jnp.sum(slopes * tangents[1], axis=0)


def _pairs_and_slopes(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> tuple[jax.Array, jax.Array]:
    """Computes `_pairs` and its derivative with respect to the student, `[d, N]`.

    The ranks are the first axis because the pairs are then computed row by row; on CPU the last axis takes
    twice as long.
    """
    cpu, default = (functools.partial(compute, cfg=cfg) for compute in (_each_pair, _pairs_of_each_rank))
    return platform_dependent(teacher, student, cpu=cpu, default=default)


def _each_pair(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> tuple[jax.Array, jax.Array]:
    """Computes every pair once."""
    i, j = np.triu_indices(cfg.depth, k=1)
    # z_i - z_j of all pairs as a product with rows of 1 and -1, exact at full precision. Gathering z_i and
    # z_j would hold two more arrays a side (at C = 100 half an array of B x C).
    difference = jnp.asarray(np.eye(cfg.depth)[i] - np.eye(cfg.depth)[j], student.dtype)
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def weighted_pair_kl(teacher_pair, student_pair, weight):
        value, slope = bernoulli_kl_and_slope(teacher_pair, student_pair)
        return weight * value, weight * slope

    weights = jnp.asarray(host_rank_weights(cfg)[i, j], student.dtype)
    value, slope = jax.vmap(weighted_pair_kl)(product(difference, teacher), product(difference, student), weights)
    return jnp.sum(value, axis=0), product(difference.T, slope)


def _pairs_of_each_rank(teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig) -> tuple[jax.Array, jax.Array]:
    """Computes every pair twice, once for each of its ranks, so that a rank's slope is a plain sum.

    XLA for an accelerator fuses sums. The products of `_each_pair` are programs of their own, with every pair
    written to memory before and after them.
    """
    decay = host_rank_weights(cfg)
    weights = jnp.asarray(decay + decay.T, student.dtype)[:, :, None]
    value, slope = bernoulli_kl_and_slope(*(z[:, None] - z[None, :] for z in (teacher, student)))
    of_rank, slopes = (jnp.sum(weights * part, axis=1) for part in (value, slope))
    # Halved before the sum over the ranks; XLA would merge two plain sums into one that cannot share the slopes' loop.
    return jnp.sum(0.5 * of_rank, axis=0), slopes


def _integrity(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Computes the KL over the d classes, `[N]`, from their logits over T relative to the largest, `[d, N]`."""
    every, largest = jnp.ones(teacher.shape[0], bool), jnp.zeros((), teacher.dtype)
    return jax.vmap(lambda t, s: masked_kl(t, s, every, largest, largest, 1.0), in_axes=-1)(teacher, student)


def _remainder(teacher: jax.Array, student: jax.Array, top: Top, cfg: LDRLDConfig, class_axis_name: AxisName):
    """Computes the KL of one row, `[C]`, over the classes that rank after the d largest; `top` holds d + 1."""
    by_teacher = cfg.rank_by == "teacher"
    ranking, other = (teacher, student) if by_teacher else (student, teacher)
    rest = not_in_top(jax.lax.stop_gradient(ranking), jax.tree.map(lambda z: z[: cfg.depth], top), class_axis_name)
    largest = jnp.max(jnp.where(rest, jax.lax.stop_gradient(other), jnp.asarray(RULED_OUT, other.dtype)))
    if class_axis_name is not None:
        largest = jax.lax.pmax(largest, class_axis_name)
    next_ranked = top.values[cfg.depth]
    maxima = (next_ranked, largest) if by_teacher else (largest, next_ranked)
    return masked_kl(teacher, student, rest, *maxima, cfg.temperature, class_axis_name)


def _number_of_classes(logits: jax.Array, class_axis_name: AxisName) -> int:
    """Returns C, the number of classes over all shards."""
    return logits.shape[-1] * (1 if class_axis_name is None else jax.lax.axis_size(class_axis_name))


def _relative(logits: jax.Array, class_axis_name: AxisName) -> jax.Array:
    """Returns logits relative to the largest finite one of their row, since only differences matter."""
    finite = jnp.where(jnp.isfinite(logits), jax.lax.stop_gradient(logits), RULED_OUT)
    largest = jnp.max(finite, axis=-1, keepdims=True)
    return logits - (largest if class_axis_name is None else jax.lax.pmax(largest, class_axis_name))


@functools.partial(jax.jit, static_argnames=("cfg", "class_axis_name"))
def _terms_of_rows(
    teacher: jax.Array, student: jax.Array, cfg: LDRLDConfig, class_axis_name: AxisName = None
) -> LDRLDTerms:
    """Computes the three terms of rows of logits `[N, C]`."""
    classes = _number_of_classes(student, class_axis_name)
    ranking = teacher if cfg.rank_by == "teacher" else jax.lax.stop_gradient(student)
    # One more than d, because entry d + 1 is the largest of the remaining classes.
    top = jax.vmap(lambda z: top_classes(z, min(cfg.depth + 1, classes), class_axis_name))(ranking)

    largest = jax.tree.map(lambda z: z[:, : cfg.depth], top)
    of_teacher, of_student = (take_own, take) if cfg.rank_by == "teacher" else (take, take_own)
    at_top = lambda z, of: jax.vmap(lambda z, top: of(z, top, class_axis_name), out_axes=-1)(z, largest)  # noqa: E731
    # Where a NaN lies in the ranking side's row, the d classes are not known: it need not be among them.
    known = jnp.where(jnp.isnan(top.values[:, 0]), jnp.nan, jnp.ones((), student.dtype))
    # One array of both sides, because each operation on it is then one kernel, whose call costs as much as its work.
    chosen = jnp.stack([at_top(teacher, of_teacher), known[None] * at_top(student, of_student)])
    chosen = jnp.maximum(chosen, RULED_OUT)
    # Only differences matter. Taken before the division by T, they are exact for close logits. They are to the
    # largest, since the first may be ruled out on this side, and nothing is left of differences to -1e30.
    local = chosen - jax.lax.stop_gradient(jnp.max(chosen, axis=1, keepdims=True))
    # Clipped, with the gradient passed through, where the difference of the two sides would overflow.
    lowest = min(cfg.temperature / 4, 1.0) * float(jnp.finfo(local.dtype).min)
    local = (local + jax.lax.stop_gradient(jnp.maximum(local, lowest) - local)) / cfg.temperature
    pairs, integrity = _pairs(*local, cfg), _integrity(*local)
    if classes - cfg.depth > 1:
        remainder = jax.vmap(lambda t, s, top: _remainder(t, s, top, cfg, class_axis_name))(teacher, student, top)
    else:  # The KL over at most one class is 0.
        remainder = jnp.zeros_like(pairs)
    return LDRLDTerms(*(cfg.temperature**2 * term for term in (pairs, integrity, remainder)))


def _takes_kernel(implementation: Implementation, class_axis_name: AxisName) -> bool:
    """Returns whether to use the Pallas kernel; raises a ValueError if it is requested but cannot be used."""
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f'implementation must be None, "xla" or "pallas", got {implementation!r}.')
    if implementation == "pallas" and class_axis_name is not None:
        raise ValueError('implementation="pallas" takes whole rows of classes. Use "xla" with class_axis_name.')
    if implementation is None and class_axis_name is None:
        return any(jax.devices()[0].device_kind.startswith(kind) for kind in PROVEN_DEVICES)
    return implementation == "pallas"


def ldrld_terms(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    class_axis_name: AxisName = None,
    block_rows: int | None = None,
    implementation: Implementation = None,
) -> LDRLDTerms:
    r"""Computes the three parts of LDRLD per example, before weighting and averaging.

    With pi(1..d) the d largest classes of the student, R their complement and
    :math:`KL_S = KL(\sigma(z^t_S / T) \,\|\, \sigma(z^s_S / T))`:

    .. math::
        \text{pairs} = T^2 \sum_{i<j} w(i,j) KL_{\{\pi(i), \pi(j)\}}, \quad
        \text{integrity} = T^2 KL_{\pi(1..d)}, \quad
        \text{remainder} = T^2 KL_R

    The derivatives are closed forms (forward mode, reverse mode and second derivatives work).
    `tests.losses.ldrld_reference` is a readable implementation of the same terms.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it.
      student_logits: `[..., C]`, the same shape. No gradient flows through the choice of classes. Ties go to
        the lower class. A class that is -inf on both sides is ignored. -inf on the student's side alone counts
        as -1e30, which makes the loss as large as the KL with that value.
      cfg: an `LDRLDConfig`; alpha, beta, pair_reduction, use_integrity and use_remainder are not used here.
      where: `[...]` bool; rows where it is False give 0 and may hold NaN.
      class_axis_name: inside `shard_map`, the mapped axes over which the classes are sharded, in equal
        shards (C is then the size of a shard). Each shard sends only d + 1 candidates and a few sums. As with
        every psum, leave `check_vma` on if you differentiate inside the `shard_map`.
      block_rows: the number of rows processed at a time, which bounds temporary memory to blocks of that many
        rows and one array `[..., C]`; None for all rows at once. Do not set it under a batch-sharded `jit`
        unless inside `shard_map`. The Pallas kernel holds no such array and ignores it.
      implementation: "xla", or "pallas" for a kernel that reads the logits once: Mosaic on a TPU, Triton on an NVIDIA
        GPU of compute capability 8.0 or later, interpreted (slowly) on a CPU. The program is lowered with the kernel
        of its platform. Under `jit` on several devices, each runs it on its share of the rows, and logits that are
        split by rows stay where they are; logits that are split by classes are exchanged for whole rows, unlike with
        "xla". None selects the kernel on the devices in `PROVEN_DEVICES` (none so far), and "xla" on others and
        with `class_axis_name`.

    Returns:
      `LDRLDTerms` of `[...]` arrays, float32 (float64 for float64 logits), in nats times T^2.

    Raises:
      ValueError: if the shapes differ, a dtype is not floating, cfg is of another class, depth > C, or block_rows < 1;
        for "pallas" also if a dtype is float64 or `class_axis_name` is given.

    Example:
      >>> teacher, student = jnp.array([[3.0, 1.0, 0.0, -2.0]]), jnp.array([[1.0, 2.0, 0.0, 0.0]])
      >>> terms = ldrld_terms(teacher, student, LDRLDConfig(depth=2))
      >>> [f"{float(term[0]):.4f}" for term in terms]
      ['0.7569', '1.0993', '0.4848']

    References:
      Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025, arXiv 2507.15911;
      agrees with the official code to 1e-12 (tests/losses/ldrld_test.py).
    """
    if not isinstance(cfg, LDRLDConfig):
        raise ValueError(f"cfg must be an LDRLDConfig, got {type(cfg).__name__}. Pass LDRLDConfig(...).")
    fused = _takes_kernel(implementation, class_axis_name)
    teacher, student = prepare_logits(teacher_logits, student_logits, where, infinite=True)
    if isinstance(temperature := cfg.temperature, jax.Array):  # it changes by epoch, and cfg is static below
        terms = ldrld_terms(
            # -inf counts as -1e30 before the division, as it does at a temperature that does not change.
            *(jnp.maximum(_relative(z, class_axis_name), RULED_OUT) / temperature for z in (teacher, student)),
            dataclasses.replace(cfg, temperature=1.0, alpha=1.0, beta=1.0),
            where=where,
            class_axis_name=class_axis_name,
            block_rows=block_rows,
            implementation=implementation,
        )
        return jax.tree.map(lambda term: temperature**2 * term, terms)
    cfg = dataclasses.replace(cfg, alpha=1.0, beta=1.0)  # not used here, and may change by epoch
    classes = _number_of_classes(student, class_axis_name)
    if cfg.depth > classes:
        raise ValueError(
            f"depth must be between 2 and the number of classes ({classes}), got {cfg.depth}. Lower loss.ldrld.depth."
        )
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}.")
    if fused:
        from ldrld_jax.losses import ldrld_fused  # lazy: Pallas is slow to import, and most calls do not need it

        return ldrld_fused.ldrld_terms(teacher_logits, student_logits, cfg, where=where)
    rows = [z.reshape(-1, z.shape[-1]) for z in (teacher, student)]
    if block_rows is None:
        terms = _terms_of_rows(*rows, cfg, class_axis_name)
    else:
        terms = jax.lax.map(
            lambda row: jax.tree.map(jnp.squeeze, _terms_of_rows(*(z[None] for z in row), cfg, class_axis_name)),
            tuple(rows),
            batch_size=block_rows,
        )
    return jax.tree.map(lambda term: term.reshape(student.shape[:-1]), terms)


def ldrld_parts(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    block_rows: int | None = None,
    implementation: Implementation = None,
) -> dict[str, jax.Array]:
    """Computes the summands of `ldrld_loss` by name: the enabled parts, weighted and averaged.

    Arguments and errors are those of `ldrld_loss`.

    Returns:
      A dict of scalars: "pairs" and, if enabled, "integrity" and "remainder".
    """
    terms = ldrld_terms(
        teacher_logits,
        student_logits,
        cfg,
        where=where,
        class_axis_name=class_axis_name,
        block_rows=block_rows,
        implementation=implementation,
    )
    return parts_of_terms(terms, cfg, where=where, weights=weights, axis_name=axis_name)


def parts_of_terms(
    terms: LDRLDTerms,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
) -> dict[str, jax.Array]:
    """Computes `ldrld_parts` from the per-example terms `[...]`; the arguments are those of `ldrld_loss`."""
    mean = functools.partial(mean_over_rows, where=where, weights=weights, axis_name=axis_name)
    pairs, integrity = cfg.depth * (cfg.depth - 1) // 2, terms.integrity
    local_weight = cfg.alpha / (pairs + 1) if cfg.pair_reduction == "mean" else cfg.alpha
    if cfg.depth == 2 and cfg.pair_reduction == "mean":
        # The official code tells pairs from the full set by size, so at d = 2 it weights the full set as
        # the pair that it is. The golden case with d = 2 checks this.
        integrity = integrity * float(host_rank_weights(cfg)[0, 1])
    parts = {"pairs": (local_weight, terms.pairs)}
    if cfg.use_integrity:
        parts["integrity"] = (local_weight, integrity)
    if cfg.use_remainder:
        parts["remainder"] = (cfg.beta, terms.remainder)
    # One reduction of all parts is one kernel on an accelerator, and one transfer between devices.
    means = jax.vmap(mean)(jnp.stack([term for _, term in parts.values()]))
    return {name: weight * means[k] for k, (name, (weight, _)) in enumerate(parts.items())}


def ldrld_loss(
    teacher_logits: jax.Array,
    student_logits: jax.Array,
    cfg: LDRLDConfig,
    *,
    where: jax.Array | None = None,
    weights: jax.Array | None = None,
    axis_name: AxisName = None,
    class_axis_name: AxisName = None,
    block_rows: int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    r"""Computes the LDRLD distillation loss, without the cross-entropy with the labels.

    .. math:: \mathrm{mean}\Big(\alpha \frac{\text{pairs} + \text{integrity}}{n} + \beta\, \text{remainder}\Big),
              \quad n = \tfrac{d(d-1)}{2} + 1

    with the terms of `ldrld_terms`; n = 1 for `pair_reduction="sum"`. At d = 2 under "mean" the
    integrity term carries w(1, 2), as in the official code.

    Args:
      teacher_logits: `[..., C]`, any float dtype; no gradient flows into it. `ldrld_terms` explains -inf.
      student_logits: `[..., C]`, the same shape.
      cfg: an `LDRLDConfig`.
      where: `[...]` bool; the mean is over the rows where it is True, the others may hold NaN.
      weights: `[...]`, finite and not negative; the mean is sum(w l) / sum(w).
      axis_name: inside `pmap` or `shard_map`, the mapped axes that the mean also runs over; without it the
        mean is local.
      class_axis_name: inside `shard_map`, the mapped axes over which the classes are sharded, as in `ldrld_terms`.
      block_rows: the number of rows processed at a time, as in `ldrld_terms`; changes memory, not the loss.
      implementation: None, "xla" or "pallas", as in `ldrld_terms`.

    Returns:
      A scalar, float32 (float64 for float64 logits), in nats times T^2; 0 if no row counts.

    Raises:
      ValueError: if the shapes differ, a dtype is not floating, cfg is of another class, depth > C, or block_rows < 1;
        for "pallas" also if a dtype is float64 or `class_axis_name` is given.

    Example:
      >>> z = jnp.array([[3.0, 1.0, 0.0, -2.0]])
      >>> float(ldrld_loss(z, z, LDRLDConfig(depth=3)))
      0.0

      A tensor-parallel head leaves the classes sharded over "model":

      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> def sharded(teacher, student):
      ...     return ldrld_loss(teacher, student, LDRLDConfig(depth=3), axis_name="data", class_axis_name="model")
      >>> logits = P("data", "model")
      >>> float(jax.shard_map(sharded, mesh=mesh, in_specs=(logits, logits), out_specs=P())(z, z))
      0.0

    References:
      Local Dense Logit Relations for Enhanced Knowledge Distillation, ICCV 2025, arXiv 2507.15911;
      agrees with the official code to 1e-12 (tests/losses/ldrld_test.py).
    """
    parts = ldrld_parts(
        teacher_logits,
        student_logits,
        cfg,
        where=where,
        weights=weights,
        axis_name=axis_name,
        class_axis_name=class_axis_name,
        block_rows=block_rows,
        implementation=implementation,
    )
    return functools.reduce(operator.add, parts.values())

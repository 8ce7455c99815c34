"""Pallas kernels that read each row of logits once and compute LDRLD's terms and the inputs of their derivatives.

The arithmetic is written once, for blocks whose first axis is the classes: a block `[classes, rows]` with rows on the
lanes of a TPU, or a single row `[classes]` on a GPU. A per-row quantity is then `[1, rows]` or `[1]`, and a per-rank
quantity `[ranks, rows]` or `[ranks]`. `losses/ldrld_fused.py` differentiates the kernels and selects one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu

from ldrld_jax.losses.divergence import RULED_OUT, bernoulli_kl_and_slope
from ldrld_jax.losses.ldrld_config import LDRLDConfig, host_rank_weights

Entries = Sequence[jax.Array]
Side = TypeVar("Side", jax.Array, Entries)

TPU_ROWS = 128  # the number of lanes of a TPU
TPU_CLASSES = 1024
GPU_CLASSES = 4096


class RowSums(NamedTuple):
    """All results for N rows of logits, none of the logits' size; float32 except `classes`.

    Attributes:
      terms: `[3, N]`, the three terms times T^2.
      maxima: `[2, N]`, the largest logit among the other C - d classes, of teacher and student.
      scales: `[2, N]`, T / sum exp((z - maximum) / T) over these classes, of teacher and student.
      classes: `[d, N]` int32, the d largest classes in descending order.
      pair_slopes: `[d, N]`, the derivative of `pairs` with respect to the student's logits of the d classes.
      integrity_slopes: `[d, N]`, the derivative of `integrity` with respect to the same logits.
    """

    terms: jax.Array
    maxima: jax.Array
    scales: jax.Array
    classes: jax.Array
    pair_slopes: jax.Array
    integrity_slopes: jax.Array


class _Rest(NamedTuple):
    """Running sums over the classes that are not among the d largest so far; one entry per row.

    Attributes:
      teacher_max: the largest teacher logit.
      student_max: the largest student logit.
      teacher_sum: the sum of exp((t - teacher_max) / T).
      student_sum: the sum of exp((s - student_max) / T).
      difference: the sum of exp((t - teacher_max) / T) ((t - teacher_max) - (s - student_max)).
    """

    teacher_max: jax.Array
    student_max: jax.Array
    teacher_sum: jax.Array
    student_sum: jax.Array
    difference: jax.Array


class _Rows(NamedTuple):
    """State of rows after some blocks of their classes.

    Attributes:
      ranked: the d largest logits of the ranking side, descending; padded with -inf.
      paired: the other side's logits of the same classes.
      places: the indices of the classes, as floats (exact up to 2^24).
      rest: sums over the other classes.
    """

    ranked: tuple[jax.Array, ...]
    paired: tuple[jax.Array, ...]
    places: tuple[jax.Array, ...]
    rest: _Rest


_rowwise_max = functools.partial(jnp.max, axis=0, keepdims=True)
_rowwise_sum = functools.partial(jnp.sum, axis=0, keepdims=True)


def _no_classes(shape: tuple[int, ...], cfg: LDRLDConfig) -> _Rows:
    """Returns the state before the first block."""
    zero = jnp.zeros(shape, jnp.float32)
    nothing = (jnp.full(shape, -jnp.inf, jnp.float32),) * cfg.depth
    lowest = jnp.full(shape, RULED_OUT, jnp.float32)
    return _Rows(nothing, nothing, nothing, _Rest(lowest, lowest, zero, zero, zero))


def _add_to_rest(rest: _Rest, teacher: jax.Array, student: jax.Array, kept: jax.Array, cfg: LDRLDConfig) -> _Rest:
    """Adds the classes in `kept`; the sums are rescaled to the new maxima, so that nothing overflows or cancels."""

    def exponentials(logits, old_max, old_sum):
        new_max = jnp.maximum(old_max, _rowwise_max(jnp.where(kept, logits, RULED_OUT)))
        moved = old_max - new_max
        summands = jnp.exp(jnp.where(kept, logits - new_max, RULED_OUT) * (1 / cfg.temperature))
        shrink = jnp.exp(moved * (1 / cfg.temperature))
        return new_max, moved, shrink, summands, shrink * old_sum + _rowwise_sum(summands)

    teacher_max, teacher_moved, shrink, p, p_sum = exponentials(teacher, rest.teacher_max, rest.teacher_sum)
    student_max, student_moved, _, _, q_sum = exponentials(student, rest.student_max, rest.student_sum)
    before = shrink * (rest.difference + rest.teacher_sum * (teacher_moved - student_moved))
    before = jnp.where(shrink == 0, jnp.zeros_like(before), before)  # else 0 * inf near float32's limit
    # p is 0 where a class is not kept, which alone may be above the maximum.
    shifted = [jnp.minimum(z - z_max, 0.0) for z, z_max in ((teacher, teacher_max), (student, student_max))]
    difference = before + _rowwise_sum(p * (shifted[0] - shifted[1]))
    return _Rest(teacher_max, student_max, p_sum, q_sum, difference)


def _add_block(
    rows: _Rows, teacher: jax.Array, student: jax.Array, first: jax.Array | int, classes: int, cfg: LDRLDConfig
) -> _Rows:
    """Adds the classes from `first` on that are below `classes`; blocks come in ascending order.

    The d largest classes so far are kept in order. The largest class of the block is inserted among them until
    none belongs there. Displaced classes join the rest, so the rest is always a sum and never a difference.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, teacher.shape, 0) + first
    inside = index < classes
    teacher, student = (jnp.where(inside, jnp.maximum(z, RULED_OUT), RULED_OUT) for z in (teacher, student))
    ranking, other = _ranking_first(teacher, student, cfg)
    place_of = index.astype(jnp.float32)
    remaining = jnp.where(inside, ranking, -jnp.inf)

    def found(remaining, value):
        place = jnp.min(jnp.where(remaining == value, place_of, jnp.inf), axis=0, keepdims=True)
        chosen = place_of == place
        return chosen, _rowwise_max(jnp.where(chosen, other, -jnp.inf)), place

    if teacher.shape[0] >= classes:  # A single block: its d largest are the rows' d largest and displace nothing.
        largest = []
        for _ in range(cfg.depth):
            value = _rowwise_max(remaining)
            chosen, paired, place = found(remaining, value)
            largest.append((value, paired, place))
            remaining = jnp.where(chosen, -jnp.inf, remaining)
        ranked, paired, places = zip(*largest, strict=True)
        rows = _Rows(ranked, paired, places, rows.rest)
    else:

        def some_belongs(state):
            _, value, rows, count = state
            # Both compilers support a reduction to a number. `count` also ends the loop for a row with NaN.
            belongs = jnp.max(jnp.where(value > rows.ranked[-1], 1.0, 0.0)) > 0
            return belongs & (count < cfg.depth)

        def put_in_order(state):
            remaining, value, rows, count = state
            chosen, paired, place = found(remaining, value)
            beats = [value > ranked for ranked in rows.ranked]
            displaced = (jnp.maximum(side[-1], RULED_OUT) for side in (rows.ranked, rows.paired))
            displaced = _ranking_first(*displaced, cfg)
            rest = _add_to_rest(rows.rest, *displaced, beats[-1] & (rows.ranked[-1] > -jnp.inf), cfg)
            columns = [_insert(*pair, beats) for pair in zip(rows[:3], (value, paired, place), strict=True)]
            remaining = jnp.where(chosen & beats[-1], -jnp.inf, remaining)
            return remaining, _rowwise_max(remaining), _Rows(*columns, rest), count + 1

        state = remaining, _rowwise_max(remaining), rows, jnp.int32(0)
        remaining, _, rows, _ = jax.lax.while_loop(some_belongs, put_in_order, state)
    # Not `!=`, so that a NaN stays and makes the remainder NaN.
    return rows._replace(rest=_add_to_rest(rows.rest, teacher, student, ~(remaining == -jnp.inf), cfg))


def _ranking_first(teacher: Side, student: Side, cfg: LDRLDConfig) -> tuple[Side, Side]:
    """Swaps the two sides unless the teacher ranks; its own inverse."""
    return (teacher, student) if cfg.rank_by == "teacher" else (student, teacher)


def _insert(column: tuple[jax.Array, ...], new: jax.Array, beats: list[jax.Array]) -> tuple[jax.Array, ...]:
    """Inserts `new` before the first entry that it beats and drops the last entry; no change if it beats none."""
    shifted = [new, *(jnp.where(beats[k], column[k], new) for k in range(len(column) - 1))]
    return tuple(jnp.where(beat, moved, kept) for beat, moved, kept in zip(beats, shifted, column, strict=True))


def _finish(rows: _Rows, classes: int, cfg: LDRLDConfig) -> tuple[jax.Array, ...]:
    """Returns 3 terms, 2 maxima, 2 scales and a 0, `[8, ...]`; classes and both kinds of slopes, `[ranks, ...]`."""
    rest, square = rows.rest, cfg.temperature**2
    local = local_terms(*_ranking_first(rows.ranked, rows.paired, cfg), cfg)
    pairs, integrity, pair_slopes, integrity_slopes = local
    if classes > cfg.depth:
        # The logarithm of one ratio near 1 is more exact than the difference of two logarithms.
        log_ratio = jnp.log(rest.teacher_sum / rest.student_sum)
        remainder = rest.difference / (rest.teacher_sum * cfg.temperature) - log_ratio
        scales = [cfg.temperature / total for total in (rest.teacher_sum, rest.student_sum)]
    else:
        remainder, scales = jnp.zeros_like(pairs), [jnp.zeros_like(pairs)] * 2
    sums = [pairs, integrity, square * remainder, rest.teacher_max, rest.student_max, *scales]
    return _stack([*sums, jnp.zeros_like(pairs)]), _stack(rows.places).astype(jnp.int32), pair_slopes, integrity_slopes


def _stack(entries: Entries) -> jax.Array:
    """Stacks entries `[1, ...]` to a power-of-two length of at least 8, padded with the first entry."""
    shape = (number_of_ranks(len(entries)), *entries[0].shape[1:])
    position = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    stacked = jnp.broadcast_to(entries[0], shape)
    for k, entry in enumerate(entries[1:], 1):
        stacked = jnp.where(position == k, entry, stacked)
    return stacked


def number_of_ranks(depth: int) -> int:
    """Returns a power of two, as Triton requires, of at least 8, the number of sublanes of a TPU."""
    return max(8, pl.next_power_of_2(depth))


def local_terms(teacher: Entries, student: Entries, cfg: LDRLDConfig) -> tuple[jax.Array, ...]:
    """Computes pairs and integrity, `[1, ...]`, and their slopes, `[ranks, ...]`, from the logits of the d classes.

    Args:
      teacher: d entries `[1, ...]` in descending order of the ranking side.
      student: d entries `[1, ...]` of the same classes.
      cfg: depth, temperature and the rank weights.

    Returns:
      pairs, integrity, pair_slopes, integrity_slopes: all times T^2; the slopes are 0 beyond the first d.
    """
    # Only differences matter. Taken before the division by T, they are exact for close logits. They are to the
    # largest, since the first may be ruled out on this side, and nothing is left of differences to -1e30.
    lowest = float(jnp.finfo(jnp.float32).min) / 2  # beyond it the difference of the two sides would be infinite
    teachers, students = (
        [jnp.maximum((z - functools.reduce(jnp.maximum, side)) / cfg.temperature, lowest) for z in side]
        for side in (teacher, student)
    )
    t, s = _stack(teachers), _stack(students)
    rank = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    real = rank < cfg.depth
    weights = host_rank_weights(cfg)
    weights = weights + weights.T  # Each pair occurs twice in the sums.
    pairs, pair_slopes = jnp.zeros_like(s), jnp.zeros_like(s)
    for j in range(cfg.depth):
        weight = jnp.zeros_like(s)
        for k in range(cfg.depth):
            weight = jnp.where(rank == k, float(weights[k, j]), weight)
        entropy, slope = bernoulli_kl_and_slope(t - teachers[j], s - students[j])
        pairs, pair_slopes = pairs + weight * entropy, pair_slopes + weight * slope

    t, s = (jnp.where(real, z - _rowwise_max(jnp.where(real, z, -jnp.inf)), RULED_OUT) for z in (t, s))
    p, q = jnp.exp(t), jnp.exp(s)
    p_sum, q_sum = _rowwise_sum(p), _rowwise_sum(q)
    integrity = _rowwise_sum(p * (t - s)) / p_sum - jnp.log(p_sum / q_sum)
    values = (0.5 * cfg.temperature**2 * _rowwise_sum(pairs), cfg.temperature**2 * integrity)
    # RULED_OUT stands for -inf, which has no slope.
    sloping = real & (_stack(student) > RULED_OUT)
    slopes = (pair_slopes, q / q_sum - p / p_sum)
    return *values, *(jnp.where(sloping, cfg.temperature * slope, 0.0) for slope in slopes)


def row_sums_tpu(
    teacher: jax.Array,
    student: jax.Array,
    cfg: LDRLDConfig,
    *,
    interpret: bool = False,
    block_classes: int = TPU_CLASSES,
) -> RowSums:
    """Computes `RowSums` of rows `[N, C]` with Mosaic.

    128 rows lie on the lanes of a TPU, so a maximum over the classes works on whole registers, and per-row
    quantities fill them. Classes that exceed one block are split into several, with the state in scratch memory.
    """
    count, classes = student.shape
    block = min(block_classes, _round_up(classes, 128))
    blocks = pl.cdiv(classes, block)
    # XLA picks the memory layout of logits with the least padding, often with the rows on the lanes already.
    # A transpose to that layout is free here; a transpose away from it would be a copy.
    rows_on_lanes = _round_up(count, 128) * _round_up(classes, 8) < _round_up(count, 8) * _round_up(classes, 128)
    empty_state = jax.eval_shape(lambda: _no_classes((1, TPU_ROWS), cfg))
    state_size, state_tree = len(jax.tree.leaves(empty_state)), jax.tree.structure(empty_state)

    def kernel(teacher_ref, student_ref, *refs):
        outputs, state_ref = refs[:4], refs[4]
        step = pl.program_id(1)
        sides = [ref[...].astype(jnp.float32) for ref in (teacher_ref, student_ref)]
        if not rows_on_lanes:
            sides = [side.T for side in sides]
        nothing = _no_classes((1, TPU_ROWS), cfg)

        def save(rows):
            for k, entry in enumerate(jax.tree.leaves(rows)):
                state_ref[k : k + 1, :] = entry

        def write(rows):
            for ref, value in zip(outputs, _finish(rows, classes, cfg), strict=True):
                ref[...] = value

        if blocks == 1:
            write(_add_block(nothing, *sides, 0, classes, cfg))
            return
        pl.when(step == 0)(lambda: save(nothing))
        saved = jax.tree.unflatten(state_tree, [state_ref[k : k + 1, :] for k in range(state_size)])
        rows = _add_block(saved, *sides, step * block, classes, cfg)
        save(rows)
        pl.when(step == blocks - 1)(lambda: write(rows))

    if rows_on_lanes:
        teacher, student = teacher.T, student.T
        logits_spec = pl.BlockSpec((block, TPU_ROWS), lambda i, j: (j, i))
    else:
        logits_spec = pl.BlockSpec((TPU_ROWS, block), lambda i, j: (i, j))
    return _call(
        kernel,
        teacher,
        student,
        count,
        cfg,
        interpret=interpret,
        grid=(pl.cdiv(count, TPU_ROWS), blocks),
        in_specs=[logits_spec] * 2,
        out_spec=lambda shape: pl.BlockSpec((shape[0], TPU_ROWS), lambda i, j: (0, i)),
        scratch_shapes=[pltpu.VMEM((_round_up(state_size, 8), TPU_ROWS), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )


def _round_up(size: int, multiple: int) -> int:
    return pl.cdiv(size, multiple) * multiple


def row_sums_gpu(
    teacher: jax.Array,
    student: jax.Array,
    cfg: LDRLDConfig,
    *,
    interpret: bool = False,
    block_classes: int = GPU_CLASSES,
) -> RowSums:
    """Computes `RowSums` of rows `[N, C]` with Triton: one program per row, one warp per 256 classes of a block."""
    count, classes = student.shape
    block = min(block_classes, pl.next_power_of_2(classes))

    def kernel(teacher_ref, student_ref, *outputs):
        row = pl.program_id(0)

        def add(step, rows):
            first = step * block
            inside = jax.lax.iota(jnp.int32, block) + first < classes
            sides = [
                plgpu.load(ref.at[row, pl.ds(first, block)], mask=inside, other=0.0).astype(jnp.float32)
                for ref in (teacher_ref, student_ref)
            ]
            return _add_block(rows, *sides, first, classes, cfg)

        rows = jax.lax.fori_loop(0, pl.cdiv(classes, block), add, _no_classes((1,), cfg))
        for ref, value in zip(outputs, _finish(rows, classes, cfg), strict=True):
            ref[:, row] = value

    whole = pl.BlockSpec(memory_space=pl.ANY)
    return _call(
        kernel,
        teacher,
        student,
        count,
        cfg,
        interpret=interpret,
        grid=(count,),
        in_specs=[whole] * 2,
        out_spec=lambda shape: whole,
        compiler_params=plgpu.CompilerParams(num_warps=min(8, max(1, block // 256))),
    )


def _call(
    kernel: Callable[..., None],
    teacher: jax.Array,
    student: jax.Array,
    count: int,
    cfg: LDRLDConfig,
    *,
    out_spec: Callable[[tuple[int, int]], pl.BlockSpec],
    **keywords,
) -> RowSums:
    """Calls a kernel that writes the outputs of `_finish` for `count` rows."""
    ranks = number_of_ranks(cfg.depth)
    outputs = [((8, count), jnp.float32), ((ranks, count), jnp.int32), *[((ranks, count), jnp.float32)] * 2]
    varies = jax.typeof(student).manual_axis_type  # the axes of a shard_map over which the values differ
    sums, *of_ranks = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(*output, manual_axis_type=varies) for output in outputs],
        out_specs=[out_spec(shape) for shape, _ in outputs],
        name="ldrld_rows",
        **keywords,
    )(teacher, student)
    return RowSums(sums[:3], sums[3:5], sums[5:7], *(z[: cfg.depth] for z in of_ranks))

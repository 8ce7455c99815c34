"""The reader of XLA's text, on texts whose traffic is counted by hand, and on one that XLA wrote."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldrld_jax.aot.hlo import Collective, CompiledText
from ldrld_jax.runtime.mesh import make_mesh

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (param_0: f32[100,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[100,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,8]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,8}
}

%in_place (stack: f32[100,8], update: f32[1,8], at: s32[]) -> f32[100,8] {
  %stack = f32[100,8]{1,0} parameter(0)
  %update = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %nothing = s32[] constant(0)
  ROOT %written = f32[100,8]{1,0} dynamic-update-slice(%stack, %update, %at, %nothing)
}

%body (arg: (s32[], f32[100,8])) -> (s32[], f32[100,8]) {
  %arg = (s32[], f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[100,8]{1,0} get-tuple-element(%arg), index=1
  %all-reduce-start = f32[100,8]{1,0} all-reduce-start(%x), replica_groups={}, to_apply=%add
  %all-reduce-done = f32[100,8]{1,0} all-reduce-done(%all-reduce-start)
  ROOT %next = (s32[], f32[100,8]{1,0}) tuple(%i, %all-reduce-done)
}

%cond (arg.1: (s32[], f32[100,8])) -> pred[] {
  %arg.1 = (s32[], f32[100,8]{1,0}) parameter(0)
  ROOT %done = pred[] constant(false)
}

%flat (whole: f32[100,8]) -> f32[800] {
  %whole = f32[100,8]{1,0} parameter(0)
  ROOT %bits = f32[800]{0} bitcast(%whole)
}

ENTRY %main (x: f32[100,8], at.1: s32[]) -> (f32[800], f32[100,8]) {
  %x.1 = f32[100,8]{1,0} parameter(0), metadata={op_name="a(b)"}
  %at.1 = s32[] parameter(1)
  %slice_fusion = f32[1,8]{1,0} fusion(%x.1, %at.1), kind=kLoop, calls=%fused
  %update_fusion = f32[100,8]{1,0} fusion(%x.1, %slice_fusion, /*index=2*/%at.1), kind=kLoop, calls=%in_place
  %on_chip = f32[100,8]{1,0:T(8,128)S(1)} custom-call(%x.1), custom_call_target="__cudnn$convForward"
  %start = (s32[], f32[100,8]{1,0}) tuple(%at.1, %update_fusion)
  %while = (s32[], f32[100,8]) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %result = f32[100,8]{1,0} get-tuple-element(%while), index=1
  %gather-start = (f32[100,8]{1,0}, f32[400,8]{1,0}) all-gather-start(%result), replica_groups={}, dimensions={0}
  %gather-done = f32[400,8]{1,0} all-gather-done(%gather-start)
  %call = f32[800]{0} call(%result), to_apply=%flat, frontend_attributes={parallel="2"}
  ROOT %out = (f32[800]{0}, f32[100,8]{1,0}) tuple(%call, %result)
}
"""


def test_the_traffic_of_a_program_counts_slices_updates_and_loops():
    array, row, scalar = 100 * 8 * 4, 8 * 4, 4
    sliced = row + scalar + row  # the row that is read, its index, and the row that is written
    updated = row + scalar + row  # the update in, its index, and the update out: not the array that it lies in
    on_chip = array  # the result stays on the chip
    reduced = 5 * 2 * array
    gathered = array + 4 * array  # the operand and the result: the shape of the start has both
    assert CompiledText(TEXT).bytes_moved == sliced + updated + on_chip + reduced + gathered


def test_collectives_are_counted_with_their_loops_and_sizes():
    assert CompiledText(TEXT).collectives == [
        Collective("all-gather", 1, 4 * 100 * 8 * 4),
        Collective("all-reduce", 5, 5 * 100 * 8 * 4),
    ]


def test_a_start_moves_its_results_whatever_else_is_in_its_shape():
    """Compares the texts of jax 0.10 and of jax 0.12, whose all-reduce has its operands in its shape as well."""
    line = "  ROOT %out = {} all-reduce-start(%x), channel_id=1, replica_groups={{}}, to_apply=%sum"
    for shape in ("f32[30]{0}", "((f32[30]{0}), f32[30]{0})"):
        text = f"ENTRY %main (x: f32[30]) -> f32[30] {{\n  %x = f32[30]{{0}} parameter(0)\n{line.format(shape)}\n}}\n"
        assert CompiledText(text).collectives == [Collective("all-reduce", 1, 120)]
        assert CompiledText(text).bytes_moved == 240


def test_kernels_and_operations_are_counted():
    program = CompiledText(TEXT)
    assert program.kernels == 3 + 5 + 1  # two fusions and the call, the reduction in the loop, the gathering
    assert program.count("dynamic-slice") == 1
    assert program.count("__cudnn$convForward") == 1
    assert program.count("sort") == 0


def test_a_program_of_xlas_is_read():
    mesh = make_mesh(data=4)
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(lambda x: jnp.sum(jnp.sin(x), axis=0)).lower(x).compile()
    program = CompiledText(compiled.as_text())
    assert program.collectives == [Collective("all-reduce", 1, 128 * 4)]
    assert program.bytes_moved >= 2 * 128 * 4 + 128 * 4
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, x: jnp.cos(x @ x), x)).lower(np.ones((64, 64))).compile()
    assert CompiledText(loop.as_text()).bytes_moved >= 7 * 3 * 64 * 64 * 4

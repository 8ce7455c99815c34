"""The programs of a run are compiled for two GPUs and a TPU slice, and read."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from ldrld_jax import config as config_lib
from ldrld_jax.aot import hlo
from ldrld_jax.aot.programs import programs_of
from ldrld_jax.deploy.export import PLATFORMS
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.plan import Run
from tests.compiled.compilers import compiled, target

# What another process has compiled is on disk, and cannot be loaded without the device.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

RESIDENT = ("data.loader=resident", "steps_per_dispatch=4")
RECIPES = {
    "everything at once": (*RESIDENT, "ema_decay=.9", "accumulate=2", "remat=True", "mesh.fsdp=True"),
    "bfloat16": ("precision=bfloat16", "data.mixup=.2", "data.remainder=drop", "non_finite=skip"),
    "a teacher's store": ("logits.dir=/nowhere", "method=ldrld+dist", "batch_norm_group=16"),
}


def programs(name, *overrides):
    """Compiles all programs of a run of the digits with nets of eight layers; by name."""
    nets = ("student.model=resnet8", "teacher.model=resnet8", "data.data_dir=/nowhere", "loss.ldrld.depth=4")
    config = config_lib.load("configs/digits.py", [*nets, *overrides])
    with precision_scope(config.precision, config.matmul_precision):
        run = Run.plan(config_lib.resolve(config), epath.Path(""), absent=target(name).devices)
        made = {}
        for program in programs_of(run):
            lowered = program.jitted.lower(*program.arguments.values())
            made[program.name] = lowered.compile(compiler_options=dict(target(name).options))
    return made, run


@pytest.mark.parametrize("name", ["h100:2", "v5e:2x2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_runs_programs_compile_and_talk_no_more_than_they_must(recipe, name):
    made, run = programs(name, *RECIPES[recipe])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.networks.outline("resnet8", run.config.data)[1].params))
    for label, executable in made.items():
        text = executable.as_text()
        program = hlo.CompiledText(text)
        assert program.count("sort") == 0
        assert "dilate=2x1" not in text  # the rows apart: the form of a convolution that is meant for CPUs
        if "step" in label and run.config.mesh.fsdp is False:
            # Gradients, moments of BatchNorm and scalars: of the batch only mixup's images at the seams move.
            by_kind = {collective.kind: collective.bytes for collective in program.collectives}
            assert set(by_kind) == {"all-reduce", *(["collective-permute"] if run.config.data.mixup else [])}
            assert by_kind["all-reduce"] <= 1.2 * 4 * parameters
        if "step" in label and name.startswith("h100"):
            assert program.count("__cudnn$convForward") > 0
            assert " convolution(" not in text


@pytest.mark.parametrize("name", ["h100:2", "v5e:2x2"])
def test_a_batch_of_resident_images_is_gathered_where_they_lie(name):
    """Neither a loop over its examples, nor a copy of all images in another layout."""
    overrides = ["student.model=resnet8", "teacher.model=resnet8", "data.loader=resident", "data.data_dir=/nowhere"]
    config = config_lib.resolve(config_lib.load("configs/cifar100.py", overrides))
    run = Run.plan(config, epath.Path(""), absent=target(name).devices)
    (made,) = (program for program in programs_of(run) if program.name == "batch of resident images")
    lowered = made.jitted.lower(*made.arguments.values())
    executable = lowered.compile(compiler_options=dict(target(name).options))
    program = hlo.CompiledText(executable.as_text())
    assert program.collectives == []
    assert program.count("while") == 0
    batch = 64 * 32 * 32 * 3
    assert program.bytes_moved < 10 * batch
    assert executable.memory_analysis().temp_size_in_bytes < 10 * batch


@pytest.mark.parametrize("name", ["h100", "v5e:2x2"])
def test_an_exported_student_compiles(name):
    data = config_lib.load("configs/digits.py").data
    network, variables = Networks(10, 1, "float32").random("resnet8", data, seed=0)
    student = jax.jit(lambda images: network(variables, images, train=False)[0])
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.uint8)
    exported = jax.export.export(student, platforms=PLATFORMS)(images)
    again = jax.export.deserialize(exported.serialize())
    program = compiled(again.call, name, ((16, 8, 8, 1), jnp.uint8))
    assert program.kernels > 0

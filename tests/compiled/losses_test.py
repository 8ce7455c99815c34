"""Every loss is compiled for a GPU and a TPU, value and gradient, and LDRLD's programs are read.

LDRLD_JAX_COMPILE=all python -m pytest -n 2 tests/compiled      # every shape: an hour on two cores
"""

import jax
import jax.numpy as jnp
import pytest

from ldrld_jax import LDRLDConfig
from ldrld_jax.losses import METHODS
from ldrld_jax.losses.ldrld import ldrld_loss
from ldrld_jax.train.step import compared
from tests.compiled.compilers import ALL, TARGETS, compiled

# What another process has compiled is on disk, and cannot be loaded without the device.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")

ROWS = (1, 2, 7, 16, 32, 64, 128, 512) if ALL else (1, 64)
CLASSES = (2, 3, 10, 100, 200, 1000, 21841) if ALL else (10, 100)
DTYPES = (jnp.float32, jnp.bfloat16) if ALL else (jnp.float32,)


def value_and_gradient(name, rows, classes):
    """The loss of a method with its defaults, as a function of the student's logits, the teacher's and labels."""
    method = METHODS[name]
    cfg = method.config(depth=min(7, classes)) if name == "ldrld" else method.config()
    params = None if method.init is None else method.init(cfg)

    def loss(student, teacher, labels):
        given = params if method.from_teacher is None else method.from_teacher(jnp.eye(classes))
        return method.loss(teacher, student, labels, cfg, params=given)

    shape = (rows, classes) if method.views(cfg) == 1 else (method.views(cfg), rows, classes)
    return jax.value_and_grad(loss), shape


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_a_loss_and_its_gradient_compile(name, target):
    for classes in CLASSES:
        for rows in ROWS:
            for dtype in DTYPES:
                function, shape = value_and_gradient(name, rows, classes)
                try:
                    jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, dtype),) * 2, labels(shape))
                except ValueError as error:
                    assert "classes" in str(error)  # a method that needs more of them says so
                    continue
                program = compiled(function, target, (shape, dtype), (shape, dtype), (shape[:-1], jnp.int32))
                assert program.count("sort") == 0


def labels(shape):
    return jax.ShapeDtypeStruct(shape[:-1], jnp.int32)


def kd(student, teacher):
    log_p, log_q = (jax.nn.log_softmax(z / 4.0) for z in (teacher, student))
    return 16 * jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


@pytest.mark.parametrize("classes", [100, 200, 1000])
def test_ldrld_compiles_at_the_published_batch(classes):
    """XLA of jax 0.10.2 refused it for an H100 at 64 rows: the gathers of candidates in a fusion of Triton's."""
    for rows in (16, 32, 64):
        program = compiled(jax.value_and_grad(ldrld), "h100", *(((rows, classes), jnp.float32),) * 2)
        assert program.count("gather") == program.count("scatter") == program.count("sort") == 0


def ldrld(student, teacher):
    return ldrld_loss(teacher, student, LDRLDConfig())


def test_the_metrics_of_a_step_select_no_second_time():
    """They read the logits once more than the loss does: 5.9 arrays with a selection of their own, and now 2.2."""

    def both(student, teacher):
        return jax.value_and_grad(ldrld)(student, teacher), compared(teacher, student, 7)

    shapes = (((64, 100), jnp.float32),) * 2
    together, alone = (compiled(function, "h100", *shapes) for function in (both, jax.value_and_grad(ldrld)))
    assert together.bytes_moved - alone.bytes_moved <= 2.5 * 4 * 64 * 100


@pytest.mark.parametrize(("rows", "classes"), [(64, 100), (128, 1000)])
def test_ldrld_moves_at_most_three_times_what_kd_does_on_a_tpu(rows, classes):
    shapes = (((rows, classes), jnp.float32),) * 2
    ours, theirs = (compiled(jax.value_and_grad(loss), "v5e:2x2", *shapes) for loss in (ldrld, kd))
    assert ours.count("gather") == ours.count("scatter") == ours.count("sort") == ours.count("while") == 0
    assert ours.bytes_moved <= 3 * theirs.bytes_moved


@pytest.mark.parametrize("classes", [100, 1000, 21841])
@pytest.mark.parametrize("rows", [64, 256, 1024])
def test_ldrld_launches_at_most_three_times_the_kernels_of_kd_on_a_gpu(rows, classes):
    shapes = (((rows, classes), jnp.float32),) * 2
    ours, theirs = (compiled(jax.value_and_grad(loss), "h100", *shapes) for loss in (ldrld, kd))
    assert ours.kernels <= 3 * theirs.kernels


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.12 on
@pytest.mark.parametrize("target", ["h100:8", "v5e:2x4"])
def test_the_kernel_of_a_batch_on_eight_devices_gathers_no_logits(target):
    """XLA alone gathers all of them on every GPU, and refuses to compile the kernel for a TPU."""
    shapes = (((1024, 1000), jnp.float32),) * 2

    def kernel(student, teacher):
        return ldrld_loss(teacher, student, LDRLDConfig(), implementation="pallas")

    program = compiled(jax.value_and_grad(kernel), target, *shapes, split=True)
    assert [(moved.kind, moved.bytes <= 12) for moved in program.collectives] == [("all-reduce", True)]
    assert program.bytes_moved <= 5.1 * 4 * 128 * 1000  # two reads of both sides and one write of each device's rows

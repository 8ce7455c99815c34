"""One run on many meshes: the same numbers, the communication that they need and no more, each device's share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax import config as config_lib
from ldrld_jax.models import MODELS, create_model
from ldrld_jax.models.layers import Mode
from ldrld_jax.models.purify import purify
from ldrld_jax.runtime.mesh import make_mesh, model_shardings, replicated, to_devices
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.train import loop, plan
from ldrld_jax.train.optim import make_optimizer
from ldrld_jax.train.plan import Run
from ldrld_jax.train.step import rematerialised
from ldrld_jax.train.teacher import NetworkTeacher
from tests.collectives import transfers
from tests.tiny_net import TinyNet


def built(config, workdir):
    """A run, its step over its mesh, its first state, and its teacher's variables: nearly the student's."""
    run = Run.plan(config_lib.resolve(config), workdir)
    (student, variables), (_, frozen) = run.make_student(), run.make_student()
    optimizer = make_optimizer(run.config.optim, run.schedule)
    state = run.make_state(variables, optimizer)
    step = loop.make_step(run, student, NetworkTeacher(student, None) if run.objective.methods else None, optimizer)
    step = jax.jit(step, donate_argnums=0, out_shardings=(run.placement.of_state(state), replicated(run.mesh)))
    frozen = jax.tree.map(lambda x: x * 1.1, frozen)
    return run, step, state, run.placement.put_variables(frozen)


def compiled(config, workdir):
    run, step, state, frozen = built(config, workdir)
    (batch,) = to_devices([run.batches[0]], run.mesh)
    return step.lower(state, frozen, batch).compile()


def losses(config, workdir, steps: int) -> list[float]:
    """The losses of the first steps."""
    with precision_scope(config.precision):
        run, step, state, frozen = built(config, workdir)
        found = []
        for batch in to_devices((run.batches[i] for i in range(steps)), run.mesh):
            state, metrics = step(state, frozen, batch)
            found.append(metrics["loss"].total / metrics["loss"].count)
        return [float(loss) for loss in found]


MESHES = {
    "2 devices": ["mesh.data=2"],
    "8 devices": ["mesh.data=8"],
    "8 devices, FSDP": ["mesh.data=8", "mesh.fsdp=True"],
    "2x4": ["mesh.data=2", "mesh.model=4"],
    "4x2, FSDP": ["mesh.data=4", "mesh.model=2", "mesh.fsdp=True"],
    "1 device, 4 microbatches": ["mesh.data=1", "accumulate=4"],
    "8 devices, 4 microbatches": ["mesh.data=8", "accumulate=4"],
    "2x4, FSDP, 4 microbatches": ["mesh.data=2", "mesh.model=4", "mesh.fsdp=True", "accumulate=4"],
}


@pytest.fixture
def distillation(tiny):
    """Two full batches of 32 and one of 26 an epoch, ldrld, a moving average, clipped gradients, groups of 8."""
    flags = ["method=ldrld", "teacher.checkpoint=x", "teacher.model=tiny_net", "batch_size=32", "ema_decay=.9"]
    return lambda *more: tiny(*flags, "batch_norm_group=8", "optim.clip_norm=1.", "epochs=20", *more)


@pytest.fixture(scope="module")
def on_one_device():
    return {}


@pytest.mark.parametrize(
    ("precision", "steps", "tolerance", "mesh"),
    [("float64", 20, 1e-9, mesh) for mesh in MESHES]
    + [("float32", 3, 1e-5, mesh) for mesh in ("8 devices", "2x4, FSDP, 4 microbatches")],
)
def test_every_mesh_gives_the_same_losses(distillation, on_one_device, tmp_path, precision, steps, tolerance, mesh):
    if precision not in on_one_device:
        on_one_device[precision] = losses(distillation("mesh.data=1", f"precision={precision}"), tmp_path, steps)
    found = losses(distillation(*MESHES[mesh], f"precision={precision}"), tmp_path, steps)
    assert len(found) == steps
    np.testing.assert_allclose(found, on_one_device[precision], rtol=tolerance)


class Identity(nnx.Module):
    def __call__(self, x: jax.Array, mode: Mode) -> jax.Array:
        return x


class NoStatistics(TinyNet):
    """TinyNet without its batch normalisation."""

    def __init__(self, *args, **common):
        super().__init__(*args, **common)
        self.bn = Identity()


def test_microbatches_of_a_net_without_batch_statistics_are_the_large_batch(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "no_statistics", NoStatistics)
    flags = ["student.model=no_statistics", "precision=float64", "mesh.data=1", "batch_size=36", "epochs=4"]
    found = [losses(tiny(*flags, f"accumulate={k}"), tmp_path, 6) for k in (1, 4)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


def test_data_parallel_steps_reduce_gradients_moments_and_scalars_and_nothing_else(distillation, tmp_path):
    config = distillation("mesh.data=8", "batch_norm_group=None")
    found = transfers(compiled(config, tmp_path))
    gradients = {(3, 3, 1, 16), (16,), (10,), (10, 16), (16, 10)}
    moments = {(1,) * n + (16,) for n in range(1, 5)}
    numbers = {(), (1, 1, 1, 1), (3,)}  # the second of a mask's rows, the third of LDRLD's three parts
    assert {kind for kind, _ in found} == {"all-reduce"}
    shapes = {shape for _, shapes in found for shape in shapes}
    assert shapes <= gradients | moments | numbers
    assert (3, 3, 1, 16) in shapes


def test_microbatches_stay_on_their_devices(distillation, tmp_path):
    found = transfers(compiled(distillation("mesh.data=8", "accumulate=4"), tmp_path))
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(np.prod(shape) for _, shapes in found for shape in shapes) == 160


def test_fsdp_leaves_each_device_an_eighth(tiny, tmp_path):
    """Allows a seventh: what eight devices do not divide, the biases of the head, is on each of them."""
    flags = ["student.model=resnet8x4", "mesh.data=8", "method=kd", "teacher.checkpoint=x", "teacher.model=resnet8x4"]
    sizes = {}
    for fsdp in (True, False):
        _, _, state, frozen = built(tiny(*flags, f"mesh.fsdp={fsdp}"), tmp_path)
        on_first = lambda x: x.addressable_shards[0].data.nbytes  # noqa: E731
        parts = {"params": state.student.params, "opt_state": state.opt_state, "teacher": frozen.params}
        sizes[fsdp] = {name: sum(map(on_first, jax.tree.leaves(part))) for name, part in parts.items()}
    for name, whole in sizes[False].items():
        assert whole > 4e6
        assert sizes[True][name] <= whole / 7, name


def test_the_compiled_step_takes_an_eighth_of_the_arguments_under_fsdp(distillation, tmp_path):
    sizes = []
    for fsdp in (True, False):
        analysis = compiled(distillation("mesh.data=8", f"mesh.fsdp={fsdp}"), tmp_path).memory_analysis()
        sizes.append(analysis.argument_size_in_bytes)
    assert sizes[0] < sizes[1] / 3  # the batch, the statistics and the ten biases of the head are in both


def test_an_axis_that_its_devices_do_not_divide_stays_whole():
    mesh = make_mesh(data=2, model=4)
    shapes = {"kernel": (3, 3, 16, 32), "head": (10, 64), "bias": (10,), "scale": (16,), "step": ()}
    like = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: tuple(s.spec) for name, s in model_shardings(like, mesh, fsdp=True).items()}
    assert specs == {
        "kernel": (None, None, "data", "model"),
        "head": ("data", "model"),
        "bias": ("data",),
        "scale": (("model", "data"),),
        "step": (),
    }
    plain = {name: tuple(s.spec) for name, s in model_shardings(like, mesh).items()}
    assert (plain["kernel"], plain["head"]) == ((None, None, None, "model"), (None, "model"))
    assert (plain["bias"], plain["scale"], plain["step"]) == ((None,), ("model",), ())


def test_accumulation_says_what_does_not_decompose(tiny, tmp_path):
    flags = ["method=dist+kd", "teacher.checkpoint=x", "teacher.model=tiny_net", "accumulate=4"]
    for more, expected in (([], "dist and BatchNorm see a microbatch of 10 "), (["batch_norm_group=5"], "4: dist see")):
        run = Run.plan(config_lib.resolve(tiny(*flags, *more)), tmp_path)
        assert expected in run.of_microbatches(run.make_student()[1])
    run = Run.plan(config_lib.resolve(tiny("accumulate=4", "batch_norm_group=5")), tmp_path)
    assert run.of_microbatches(run.make_student()[1]) is None


def size(tree) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def a_third_of_657920(plain: int, again: int) -> None:
    """A third of what the plain step kept before BatchNorm's derivative was written down; it keeps less since."""
    assert plain <= 657_920
    assert again < 657_920 / 3


def products_alone(plain: int, again: int) -> None:
    assert 0.25 * plain < again < 0.4 * plain  # the convolutions' outputs are among them


@pytest.mark.parametrize(
    ("dtype", "kept_as_it_should", "close"),
    [
        ("float64", a_third_of_657920, lambda plain: dict(rtol=1e-10, atol=1e-12)),
        ("float32", products_alone, lambda plain: dict(rtol=1e-7, atol=1e-5 * float(jnp.max(jnp.abs(plain))))),
    ],
)
def test_rematerialisation_keeps_little_for_the_backward_pass_and_the_same_gradient(
    dtype, kept_as_it_should, close, rng
):
    """Bytes between the passes; what a program then holds is XLA's to decide, and on a CPU it undoes this."""
    with jax.enable_x64(dtype == "float64"):
        model = create_model("resnet8", 10, 1, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        apply, params, batch_stats = purify(model)
        images = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), dtype)
        forward = functools.partial(apply, train=True)
        kept, gradients = [], []
        for function in (forward, rematerialised(forward)):
            loss = lambda params, function=function: jnp.sum(function(params, batch_stats, images)[0] ** 2)  # noqa: E731
            residuals = jax.eval_shape(lambda params, loss=loss: jax.vjp(loss, params)[1], params)
            kept.append(size(residuals) - size(params))  # the parameters are there anyhow
            gradients.append(jax.jit(jax.grad(loss))(params))
        kept_as_it_should(*kept)
        for plain, again in zip(*map(jax.tree.leaves, gradients), strict=True):
            assert again.dtype == dtype
            np.testing.assert_allclose(again, plain, **close(plain))


def test_a_state_is_made_in_parts(tiny, tmp_path):
    """The optimizer's state and the moving average of a large model would not fit on the first device as a whole."""
    config = tiny("mesh.data=8", "mesh.fsdp=True", "ema_decay=.9", "optim.name=adamw", "student.model=resnet8")
    run = Run.plan(config_lib.resolve(config), tmp_path)
    _, variables = run.make_student()
    optimizer, made = run.make_optimizer(), []
    first = plan.TrainState.first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.TrainState, "first", lambda *args, **options: made.append(args) or first(*args, **options))
        state = run.make_state(variables, optimizer)
    assert made and all(isinstance(leaf, jax.core.Tracer) for args in made for leaf in jax.tree.leaves(args[0].params))
    shapes = run.state_shapes(variables, optimizer)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, shapes)
    moments = state.opt_state[0][0].mu
    whole, part = (sum(map(size, jax.tree.leaves(moments))) for size in (lambda x: x.size, _on_first_device))
    assert part < 0.2 * whole
    chex.assert_trees_all_equal(state.student, state.ema)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(_first_parts((state.student, state.ema)))]
    assert len(set(buffers)) == len(buffers)  # the step donates each of them


def _first_parts(tree):
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, tree)


def _on_first_device(leaf) -> int:
    return leaf.addressable_shards[0].data.size

"""`ldrld_jax.Trainer`: the same runs as the command line's, with models, teachers, data and the rest as objects."""

import signal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ldrld_jax
from ldrld_jax.config.keys import leaves
from ldrld_jax.data.tfds_records import make_builder
from ldrld_jax.errors import NonFiniteError, UserError
from ldrld_jax.losses import METHODS
from ldrld_jax.losses import ldrld_loss as bare_ldrld
from ldrld_jax.losses.common import mean_over_rows
from ldrld_jax.models.pure import pure
from ldrld_jax.record.reader import read_config
from ldrld_jax.runtime.signals import Interrupted
from ldrld_jax.train import trainer
from tests.conftest import comparable_lines
from tests.tiny_net import TinyNet
from tests.train.conftest import QUICK, linear
from tests.train.trainer_test import saved

FLOATS = dict(dtype=jnp.float32, param_dtype=jnp.float32)


class Drop(nnx.Module):
    """A user's network with what Flax's own layers keep: statistics, random streams, and a variable of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return self.head(self.drop(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))


class Linen(nn.Module):
    """The same in Flax's older form."""

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(momentum=0.9)(x, use_running_average=not training)).mean((1, 2))
        return nn.Dense(10)(nn.Dropout(0.3)(x, deterministic=not training))


def test_objects_give_bitwise_the_run_of_their_names(tiny, digits, teacher_dir, tmp_path):
    config = tiny("method=ldrld", f"teacher.checkpoint={teacher_dir}", "optim.learning_rate=.01", "mesh.data=1")
    trainer.train(config, tmp_path / "names")
    theirs = (
        "student.",
        "teacher.",
        "loss.",
        "method",
        "data.name",
        "data.data_dir",
        "data.train_split",
        "data.eval_split",
    )
    rest = {key: value for key, value in leaves(config) if not key.startswith(theirs) and value is not None}
    objects = ldrld_jax.Trainer(
        student=TinyNet(10, 1, rngs=nnx.Rngs(0), **FLOATS),
        teacher=teacher_dir,
        method=ldrld_jax.LDRLDConfig(),
        epochs=2,
        batch_size=40,
        workdir=tmp_path / "objects",
        config=rest,
        **digits,
    )
    result = objects.fit()
    assert comparable_lines(tmp_path / "objects") == comparable_lines(tmp_path / "names") == _comparable(result.metrics)
    chex.assert_trees_all_equal(saved(tmp_path / "objects", 6), saved(tmp_path / "names", 6))
    best = trainer.evaluate(config, tmp_path / "names")
    assert objects.evaluate() == best
    assert result.summary["best_top1"] == best["top1"]
    assert repr(objects) == f"Trainer(<TinyNet> by ldrld, workdir='{tmp_path}/objects')"
    assert repr(result) == f"Result(summary={result.summary!r})"  # in a notebook, neither metrics nor an address
    images, labels = digits["evaluation"]
    assert 100 * np.mean(objects.predict(images).argmax(-1) == labels) == pytest.approx(best["top1"])
    mean, std = (np.float32(rest[f"data.{name}"]) for name in ("mean", "std"))
    as_module = result.student((images / np.float32(255) - mean) / std, train=False)
    np.testing.assert_allclose(objects.predict(images), as_module, atol=1e-5)


def _comparable(lines):
    return [{**x, "values": {k: v for k, v in x["values"].items() if not k.endswith("_per_second")}} for x in lines]


def test_fit_takes_no_number_of_epochs(make):
    with pytest.raises(TypeError, match="positional argument"):
        make().fit(10)


@pytest.mark.parametrize(
    "student",
    [
        lambda: Drop(nnx.Rngs(0)),
        lambda: (Linen(), Linen().init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), training=False)),
        lambda: (linear, {"w": np.zeros((64, 10), np.float32)}),
    ],
    ids=["NNX", "Linen", "function"],
)
def test_a_model_of_any_library_resumes_bitwise_and_comes_back_as_its_own(make, student, tmp_path, monkeypatch):
    own = student()
    weights = (lambda: nnx.state(own, nnx.Param)) if isinstance(own, nnx.Module) else (lambda: own[1])
    before = jax.tree.map(np.array, weights())
    straight = make(student=own, workdir=tmp_path / "straight").fit()
    chex.assert_trees_all_equal(before, weights())  # left alone

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Signals, "stop_at", lambda self, step: step == 4 and _stop(self))
        with pytest.raises(Interrupted):
            make(student=student()).fit()
    resumed = make(student=student()).fit()
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "run", 6), saved(tmp_path / "straight", 6))
    images = np.float32(np.random.default_rng(1).normal(size=(5, 8, 8, 1)))
    options = (
        {} if isinstance(own, nnx.Module) else {"training": False} if isinstance(own[0], nn.Module) else {"train": 0}
    )
    np.testing.assert_array_equal(*(result.student(images, **options) for result in (straight, resumed)))


def _stop(signals) -> bool:
    signals.received = signal.SIGTERM
    return True


def test_dropout_is_a_function_of_the_seed_and_the_step_and_none_in_evaluations(make, tmp_path):
    def losses(name, **arguments):
        make(student=Drop(nnx.Rngs(0)), workdir=tmp_path / name, epochs=1, **arguments).fit()
        return [x["values"]["loss"] for x in comparable_lines(tmp_path / name) if x["split"] == "train"]

    seven = losses("7", seed=7, config={"data.seed": 0})
    assert losses("again", seed=7) == seven
    eight = losses("8", seed=8)
    assert all(a != b for a, b in zip(seven, eight, strict=True))
    np.testing.assert_allclose(losses("two devices", seed=7, config={"mesh.data": 2}), seven, rtol=1e-5)
    model = pure(Drop(nnx.Rngs(0)))
    x = jnp.ones((64, 8, 8, 1))
    one, two = (model.apply(model.params, model.batch_stats, x, train=True, key=jax.random.key(i))[0] for i in (1, 2))
    assert not np.allclose(one, two)
    still = model.apply(model.params, model.batch_stats, x, train=False)[0]
    chex.assert_trees_all_equal(still, model.apply(model.params, model.batch_stats, x, train=False)[0])
    assert np.ptp(np.asarray(still), axis=0).max() == 0  # equal rows: nothing is dropped


@pytest.mark.parametrize("make_student", [lambda: Drop(nnx.Rngs(0)), None], ids=["NNX", "Linen"])
def test_padding_enters_no_statistic_of_flaxs_own_normalisation(make_student, rng):
    if make_student is None:
        module = Linen()
        student = module, module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), training=False)
    else:
        student = make_student()
    model, images = pure(student), rng.normal(size=(6, 8, 8, 1)).astype(np.float32)
    padded = np.concatenate([images, np.full((4, 8, 8, 1), 1e3, np.float32)])
    where = np.arange(10) < 6
    step = lambda x, w: model.apply(model.params, model.batch_stats, x, train=True, where=w)[1]  # noqa: E731
    chex.assert_trees_all_close(step(padded, where), step(images, None), rtol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), step(padded, np.zeros(10, bool))))


@pytest.mark.parametrize("config", [{}, {"ema_decay": 0.9}, {"accumulate": 2}, {"ema_decay": 0.9, "accumulate": 2}])
def test_variables_that_are_no_parameters_are_kept(make, tmp_path, config):
    """A counter has no average: over steps, nor over microbatches."""
    half = make(student=Drop(nnx.Rngs(0)), epochs=1, config=config).fit()
    assert half.student.calls[...].dtype == jnp.int32
    result = make(student=Drop(nnx.Rngs(0)), config=config).fit()  # resumes
    assert int(result.student.calls[...]) == 6  # a call a step
    assert "calls" in saved(tmp_path / "run", 6)["model"]["batch_stats"]


def test_a_teacher_on_the_host_sees_the_students_images_and_teaches_what_it_does_on_a_device(make, digits, tmp_path):
    weights, seen = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32), []

    def teach(images):
        seen.append((images.dtype, images.shape))
        return (images.reshape(len(images), -1) / np.float32(255) - 0.5) / 0.5 @ weights

    device = make(workdir=tmp_path / "device").fit()
    host = make(workdir=tmp_path / "host", teacher=ldrld_jax.HostTeacher(teach, name="linear")).fit()
    on = [[x["values"]["loss"] for x in _comparable(r.metrics) if x["split"] == "train"] for r in (device, host)]
    np.testing.assert_allclose(*on, rtol=1e-5)
    assert host.summary["teacher"] == "<linear>"
    assert host.summary["teacher_top1"] == pytest.approx(device.summary["teacher_top1"])
    assert {dtype for dtype, _ in seen} == {np.dtype(np.uint8)}
    assert [shape[0] for _, shape in seen] == [
        24,
        24,
        2,
        40,
        40,
        10,
        40,
        40,
        10,
    ]  # measured, then the batches, once each

    seen.clear()
    stored = {"logits.dir": str(tmp_path / "store"), "logits.dtype": "float32"}
    teacher = ldrld_jax.HostTeacher(teach, name="linear")
    first = make(workdir=tmp_path / "writes", teacher=teacher, config=stored).fit()
    assert seen
    seen.clear()
    second = make(workdir=tmp_path / "reads", teacher=teacher, config=stored).fit()
    assert not seen
    assert _comparable(second.metrics) == _comparable(first.metrics)
    with pytest.raises(UserError, match=r"holds other logits: .*teacher\.name \('linear' there, 'other' here\)"):
        make(workdir=tmp_path / "x", teacher=ldrld_jax.HostTeacher(teach, name="other"), config=stored).fit()


def test_a_normalised_host_teacher_gets_what_it_asks_for():
    got = []
    teacher = ldrld_jax.HostTeacher(lambda x: got.append(x) or np.zeros((len(x), 3)), mean=(0.5,), std=(0.25,))
    teacher(np.full((2, 4, 4, 1), 255, np.uint8), classes=3)
    np.testing.assert_array_equal(got[0], np.full((2, 4, 4, 1), 2, np.float32))


def test_a_host_teacher_is_called_as_the_function_that_it_has():
    images = np.zeros((2, 8, 8, 1), np.uint8)
    assert ldrld_jax.HostTeacher(lambda x: np.zeros((len(x), 7)))(images).shape == (2, 7)
    for shape, shown in (((2,), r"\(2,\)"), ((), r"\(\)"), ((3, 7), r"\(3, 7\)")):
        teacher = ldrld_jax.HostTeacher(lambda x, shape=shape: np.zeros(shape))
        with pytest.raises(UserError, match=rf"returns {shown} for 2 images, and must return logits \[2, C\]"):
            teacher(images)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: np.zeros((len(x), 7)), r"returns \(24, 7\) for 24 images of 10 classes"),
        (lambda x: np.full((len(x), 10), np.nan), "a logit of the teacher function is not finite"),
    ],
)
def test_what_a_host_teacher_returns_is_looked_at(make, function, message):
    with pytest.raises(UserError, match=message):
        make(teacher=ldrld_jax.HostTeacher(function)).fit()


def test_a_host_teacher_is_refused_where_it_cannot_see_the_images(make):
    for config, message in (
        ({"data.mixup": 0.2, "data.remainder": "drop"}, "data.mixup"),
        ({"data.loader": "resident"}, "data.loader=resident"),
        ({"logits.dir": "logits"}, "needs a name"),
    ):
        with pytest.raises(UserError, match=message):
            make(teacher=ldrld_jax.HostTeacher(lambda x: x), config=config).fit()


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_file_of_logits_teaches_what_its_teacher_does(make, digits, tmp_path, suffix):
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    logits = ((digits["train"][0].reshape(90, -1) / np.float32(255) - 0.5) / 0.5) @ weights
    path = str(tmp_path / f"logits{suffix}")
    if suffix == ".npy":
        np.save(path, logits)
    else:
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        tensorstore.open(spec, create=True, dtype="float32", shape=logits.shape).result().write(logits).result()
    online, stored = make(workdir=tmp_path / "online").fit(), make(workdir=tmp_path / "file", teacher=path).fit()
    on = [[x["values"]["loss"] for x in _comparable(r.metrics) if x["split"] == "train"] for r in (online, stored)]
    np.testing.assert_allclose(*on, rtol=1e-5)
    assert stored.summary["teacher_top1"] is None
    for config, message in (
        ({"data.flip": True}, "the run augments them"),
        ({"data.pad": 1}, "the run augments them"),
        ({"logits.views": 2}, "holds 1 views of each image, and logits.views is 2"),
        ({"data.fraction": 0.5}, "need logits"),
        ({"teacher.min_top1": 1.0}, "teacher.min_top1"),
    ):
        with pytest.raises(UserError, match=message):
            make(workdir=tmp_path / "no", teacher=path, config=config).fit()


@pytest.mark.parametrize("name", ["empty.npy", "several.npz", "torn.safetensors", "torn.npy", "missing.npy"])
def test_a_file_that_holds_no_logits_is_one_line(make, tmp_path, name):
    path = tmp_path / name
    if name == "several.npz":
        np.savez(path, a=np.zeros((90, 10)), b=np.zeros((90, 10)))
    elif name != "missing.npy":
        path.write_bytes(b"" if name == "empty.npy" else b"no logits")
    teacher = {"teacher.model": "logits", "teacher.checkpoint": str(path)}
    line = "is truncated or damaged" if name == "torn.safetensors" else "cannot be read as a file of logits"
    with pytest.raises(UserError, match=f"{name} {line}") as error:
        make(teacher=None, config=teacher).fit()
    assert "\n" not in str(error.value)


def test_a_file_with_several_views_gives_each_epoch_its_own(make, tmp_path):
    logits = np.stack([np.zeros((90, 10), np.float32), np.eye(10, dtype=np.float32)[np.arange(90) % 10] * 9])
    np.save(tmp_path / "two.npy", logits)
    result = make(teacher=str(tmp_path / "two.npy"), config={"logits.views": 2, "data.flip": True}, epochs=3).fit()
    top = [x["values"]["kd"] for x in result.metrics if x["split"] == "train"]
    flat, sharp = np.array(top)[[0, 1, 2, 6, 7, 8]], np.array(top)[[3, 4, 5]]
    assert flat.max() < sharp.min() / 3


def test_a_loss_of_ones_own_is_its_mean_over_the_rows_kept(make, tmp_path):
    def squares(teacher_logits, student_logits, labels):
        return jnp.mean((teacher_logits - student_logits) ** 2, axis=-1)

    rows = make(method=squares, workdir=tmp_path / "rows").fit()
    kept = lambda t, s, y, where=None: mean_over_rows(squares(t, s, y), where=where)  # noqa: E731
    scalar = make(method=["kd", kept], workdir=tmp_path / "sum", config={"loss_weight.kd": 0.0, "ce_weight": 1.0}).fit()
    assert read_config(tmp_path / "rows")["method"] == "<squares>"
    assert read_config(tmp_path / "sum")["method"] == "kd+<loss>"
    for a, b in zip(rows.metrics, scalar.metrics, strict=True):
        if a["split"] == "train":
            assert a["values"]["squares"] == pytest.approx(b["values"]["loss"] - b["values"]["ce_term"], rel=1e-5)
    with pytest.raises(UserError, match="returns a scalar and does not take where"):
        make(method=lambda t, s, y: jnp.mean(t - s), workdir=tmp_path / "no").fit()
    dropped = make(
        method=lambda t, s, y: jnp.mean((t - s) ** 2), config={"data.remainder": "drop"}, workdir=tmp_path / "d"
    )
    assert dropped.fit().summary["steps"] == 4


def test_a_method_of_ones_own_with_the_librarys_loss_inside_is_that_method(make, tmp_path):
    ours = make(method="ldrld", workdir=tmp_path / "ours").fit()

    def inside(teacher_logits, student_logits, labels, where=None):
        return bare_ldrld(teacher_logits, student_logits, ldrld_jax.LDRLDConfig(), where=where)

    own = make(method=inside, workdir=tmp_path / "own").fit()
    a, b = ([x["values"]["loss"] for x in r.metrics if x["split"] == "train"] for r in (ours, own))
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_an_optimizer_of_optax_is_the_one_that_updates(make, tmp_path, capsys):
    rate = optax.piecewise_constant_schedule(0.1, {3: 0.1})
    given = make(
        optimizer=optax.inject_hyperparams(optax.sgd)(rate), workdir=tmp_path / "given", method="ce", teacher=None
    )
    config = {"optim.momentum": 0.0, "optim.decay_epochs": (1,), "optim.learning_rate": 0.1}
    named = make(config=config, workdir=tmp_path / "named", method="ce", teacher=None)
    capsys.readouterr()
    given, printed, named = given.fit(), capsys.readouterr().out, named.fit()
    assert "batches of 40; <optimizer>, a learning rate of its own\n" in printed
    assert "<arrays> given in Python: 90 training images" in printed
    assert "sgd, learning rate 0.1, step after 1" in capsys.readouterr().out
    trained = [saved(tmp_path / name, 6)["model"]["params"] for name in ("given", "named")]
    chex.assert_trees_all_close(*trained, rtol=1e-5, atol=1e-7)
    rates = [x["values"]["learning_rate"] for x in given.metrics if x["split"] == "train"]
    np.testing.assert_allclose(rates[-1], 0.01, rtol=1e-5)
    other = make(optimizer="lion", workdir=tmp_path / "lion", config={"optim.learning_rate": 1e-3}).fit()
    assert other.summary["steps"] == 6
    with pytest.raises(UserError, match=r"there is no optim\.name 'loin'\. Did you mean 'lion'"):
        make(optimizer="loin", workdir=tmp_path / "no").fit()


def test_a_metric_that_is_not_finite_is_named_and_the_learning_rate_is_not_blamed(make):
    lost = {"third": lambda logits, labels, where: jnp.where(labels % 3 == 0, jnp.nan, 1.0)}
    with pytest.raises(NonFiniteError, match=r"^third is not finite at step 1 .* The loss and the weights are finite"):
        make(metrics=lost).fit()


def test_a_metric_that_is_not_finite_in_the_evaluation_is_named_and_the_state_is_saved(make, tmp_path):
    few = {"data.remainder": "drop", "eval_batch_size": 45}
    lost = {"third": lambda z, y, where: jnp.full(len(y), 1.0 if len(y) == 40 else jnp.nan)}  # the training's batches
    with pytest.raises(UserError, match=r"^third of the evaluation is not finite\. Fix the metric that computes it\.$"):
        make(metrics=lost, config=few).fit()
    assert saved(tmp_path / "run", 2)
    mended = {"third": lambda logits, labels, where: 0.0 * labels}
    assert make(metrics=mended, config=few).fit().summary["last_epoch"] == 2


def test_writers_callbacks_and_metrics_get_what_the_run_has(make, tmp_path):
    lines, evaluated, kept, closed = [], [], [], []

    class Writer:
        def write(self, step, epoch, split, values):
            lines.append({"step": step, "epoch": epoch, "split": split, "values": values})

        def close(self):
            closed.append(True)

    call = ldrld_jax.Callback(
        after_evaluation=lambda step, values, variables: evaluated.append((step, values["top1"])),
        after_save=lambda step, variables: kept.append((step, np.array(variables.params["w"]))),
    )
    third = {"third": lambda logits, labels, where: (labels % 3 == 0).astype(jnp.float32)}
    result = make(writers=[Writer()], callbacks=[call], metrics=third).fit()
    assert lines == result.metrics
    assert closed == [True]
    evaluations = [x for x in result.metrics if x["split"] == "eval"]
    assert evaluated == [(x["step"], x["values"]["top1"]) for x in evaluations]
    assert [step for step, _ in kept] == [3, 6]
    np.testing.assert_array_equal(kept[-1][1], saved(tmp_path / "run", 6)["model"]["params"]["w"])
    assert {x["values"]["third"] for x in evaluations} == {evaluations[0]["values"]["third"]}
    train = [
        x["values"]["third"] * n
        for x, n in zip([x for x in result.metrics if x["split"] == "train"], [40, 40, 10] * 2, strict=True)
    ]
    labels = make().given.train.records.labels()
    assert sum(train) / 2 == pytest.approx(np.sum(labels % 3 == 0), rel=1e-5)


def test_raw_inputs_go_to_the_model_untouched(digits, tmp_path):
    rng = np.random.default_rng(0)
    tokens, labels = rng.integers(0, 50, (60, 7)), rng.integers(0, 3, 60)

    class Bag(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.head = nnx.Embed(50, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, tokens):
            assert tokens.dtype == jnp.int32
            return self.head(self.embed(tokens).mean(1))

    run = ldrld_jax.Trainer(
        student=Bag(nnx.Rngs(0)),
        teacher=Bag(nnx.Rngs(1)),
        method=METHODS["ldrld"].config(depth=3),
        train=(tokens, labels),
        evaluation=(tokens[:20], labels[:20]),
        num_classes=3,
        batch_size=25,
        workdir=tmp_path,
        config=QUICK,
    )
    result = run.fit()
    np.testing.assert_allclose(run.predict(tokens[:5]), result.student(jnp.asarray(tokens[:5], jnp.int32)), atol=1e-6)
    with pytest.raises(UserError, match=r"data\.flip=True is for pixels, and the data are raw: int32"):
        run.config.data.flip = True
        run.fit()


def test_a_builder_of_tfds_is_the_data_of_its_name(make, data_dir, tmp_path):
    builder = make_builder("digits", data_dir)
    parts = {"data.train_split": "train[:90]", "data.data_dir": data_dir}
    built = make(train=builder, evaluation="test[:50]", workdir=tmp_path / "built", config=parts).fit()
    named = make(train="digits", evaluation="test[:50]", workdir=tmp_path / "named", config=parts).fit()
    assert _comparable(built.metrics) == _comparable(named.metrics)
    assert built.summary["best_top1"] == named.summary["best_top1"]

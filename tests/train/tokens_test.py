"""Token models: several labels an example, of which those of -1 are left out, from the data to the student."""

import json
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ldrld_jax
from ldrld_jax import config as config_lib
from ldrld_jax.aot.programs import programs_of
from ldrld_jax.errors import UserError
from ldrld_jax.logit_store.store import LogitStore
from ldrld_jax.runtime.mesh import replicated, to_devices
from ldrld_jax.runtime.precision import precision_scope
from ldrld_jax.runtime.signals import Interrupted
from ldrld_jax.train import loop, trainer
from ldrld_jax.train.objective import Objective
from ldrld_jax.train.plan import Run
from ldrld_jax.train.state import TrainState, Variables
from ldrld_jax.train.step import Network, make_train_step
from ldrld_jax.train.teacher import NetworkTeacher
from tests.conftest import comparable_lines
from tests.train.conftest import QUICK
from tests.train.trainer_test import saved, values

V, LENGTH = 11, 6


def texts(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and labels, of which each example keeps others: a prompt and padding are left out, some whole."""
    rng = np.random.default_rng(seed)
    tokens, labels = rng.integers(0, V, (2, count, LENGTH))
    first, last = rng.integers(0, LENGTH, count), rng.integers(0, LENGTH + 1, count)
    position = np.arange(LENGTH)[None, :]
    kept = (position >= first[:, None]) & (position < last[:, None])
    kept[0] = True  # an example counts for up to six, and another for nothing
    return tokens, np.where(kept, labels, -1)


TRAIN, EVALUATION = texts(0, 40), texts(1, 21)


def table(variables, tokens, train):
    """A model of pairs: the logits of the next token are a row of a table."""
    del train
    return variables["w"][tokens]


def weights(seed: int, dtype=np.float32):
    return {"w": np.random.default_rng(seed).normal(size=(V, V)).astype(dtype)}


@pytest.fixture
def make(tmp_path):
    """`make(**arguments)`: a trainer of two epochs of 40 texts, three batches each, of which the last is half full."""

    def make(**arguments):
        defaults = dict(
            student=(table, weights(0)),
            teacher=(table, weights(1)),
            method="kd",
            train=TRAIN,
            evaluation=EVALUATION,
            num_classes=V,
            epochs=2,
            batch_size=16,
            workdir=tmp_path / "run",
            config=QUICK | {"eval_batch_size": 8} | arguments.pop("config", {}),
        )
        return ldrld_jax.Trainer(**defaults | arguments)

    return make


def log_softmax(z):
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def top(z, k):
    """The k largest classes of each row."""
    return np.argsort(-z, axis=-1, kind="stable")[:, :k]


def measured(tokens, labels, student, teacher) -> dict[str, float]:
    """Loss and metrics of the labels that are kept, and of nothing else, in float64."""
    kept = labels >= 0
    z, t, y = student[tokens[kept]], teacher[tokens[kept]], labels[kept]
    own = log_softmax(z)[np.arange(len(y)), y]
    p, q = log_softmax(t / 4), log_softmax(z / 4)
    kd, ce = 16 * np.mean(np.sum(np.exp(p) * (p - q), axis=-1)), -own.mean()
    share = lambda right: 100 * np.mean(right)  # noqa: E731
    return {
        **dict(ce=ce, ce_term=ce, kd=kd, loss=0.1 * ce + 0.9 * kd),
        **{f"top{k}": share((top(z, k) == y[:, None]).any(axis=1)) for k in (1, 5)},
        "agreement": share(z.argmax(-1) == t.argmax(-1)),
        "top_d_overlap": share([np.isin(a, b).mean() for a, b in zip(top(z, 7), top(t, 7), strict=True)]),
        "label_in_top_d": share((top(z, 7) == y[:, None]).any(axis=1)),
    }


def test_loss_and_metrics_are_those_of_the_labels_kept_alone(make):
    """Trains at a rate of 0: one line covers the epoch, and each batch counts for as many labels as it keeps."""
    student, teacher = weights(0, np.float64), weights(1, np.float64)
    still = {"precision": "float64", "optim.learning_rate": 0.0, "log.every_steps": 3}
    run = make(student=(table, student), teacher=(table, teacher), epochs=1, config=still)
    result = run.fit()
    want = measured(*TRAIN, student["w"], teacher["w"])
    (train,) = (line["values"] for line in result.metrics if line["split"] == "train")
    assert {name: train[name] for name in want} == pytest.approx(want, rel=1e-12)
    want = measured(*EVALUATION, student["w"], teacher["w"])
    assert run.evaluate() == pytest.approx({name: want[name] for name in ("ce", "top1", "top5")}, rel=1e-12)
    taught = measured(*EVALUATION, teacher["w"], student["w"])
    assert result.summary["teacher_top1"] == pytest.approx(taught["top1"], rel=1e-12)


def test_the_gradient_is_the_mean_over_the_labels_kept_and_the_model_is_told_the_examples_with_any(x64):
    (tokens, labels), w = (x[:8] for x in TRAIN), weights(0, np.float64)["w"]
    apply = lambda params, _, tokens, where, **options: (params["w"][tokens], {"told": where})  # noqa: E731
    network, optimizer = Network(apply, (0.0,), (1.0,), raw=True, dtype=jnp.float64), optax.sgd(1.0)
    variables = Variables({"w": w}, {"told": np.zeros(8, bool)})
    state = TrainState.first(variables, optimizer, method_params={}, averaged=False)
    step = jax.jit(make_train_step(network, None, Objective({}), optimizer, schedule=None, steps_per_epoch=1))
    kept = labels >= 0
    after, metrics = step(state, None, {"image": tokens, "label": np.maximum(labels, 0), "mask": kept})
    want = np.zeros((V, V))
    for token, label in zip(tokens[kept], labels[kept], strict=True):
        want[token] += (np.exp(log_softmax(w[token])) - np.eye(V)[label]) / kept.sum()
    np.testing.assert_allclose(w - after.student.params["w"], want, atol=1e-14)
    assert float(metrics["loss"].count) == kept.sum()
    np.testing.assert_array_equal(after.student.batch_stats["told"], kept.any(axis=1))
    assert not kept.any(axis=1).all()


def stepped(run: ldrld_jax.Trainer) -> tuple[list[dict[str, float]], np.ndarray]:
    """The metrics of the three steps of an epoch in float64, and the weights after them."""
    with precision_scope("float64"):
        plan = Run.plan(config_lib.resolve(run.config), run.workdir, given=run.given)
        (network, variables), optimizer = plan.make_student(), plan.make_optimizer()
        teacher = NetworkTeacher(network, Variables(*jax.tree.map(np.negative, variables)))
        state = plan.make_state(variables, optimizer)
        shardings = plan.placement.of_state(state), replicated(plan.mesh)
        step = jax.jit(loop.make_step(plan, network, teacher, optimizer), out_shardings=shardings)
        found = []
        for batch in to_devices((plan.batches[i] for i in range(3)), plan.mesh):
            state, metrics = step(state, teacher.variables, batch)
            found.append({name: mean.value for name, mean in metrics.items()})
        return found, np.asarray(state.student.params["w"])


def test_unequal_numbers_of_labels_a_device_and_a_microbatch_give_one_devices_step(make):
    """Gives each of eight devices two examples of 0 to 6 labels, one in each of two microbatches."""
    found = []
    for devices, accumulate in ((1, 1), (8, 2)):
        config = {"precision": "float64", "mesh.data": devices, "accumulate": accumulate, "optim.clip_norm": 1.0}
        found.append(stepped(make(student=(table, weights(0, np.float64)), config=config)))
    (want, one), (metrics, several) = found
    for got, expected in zip(metrics, want, strict=True):
        assert got == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(several, one, rtol=1e-12)
    assert np.abs(one - weights(0)["w"]).max() > 0.01
    assert len(set((TRAIN[1] >= 0).sum(axis=1).tolist())) > 4


def test_a_run_resumes_bitwise_and_its_student_comes_back(make, tmp_path, monkeypatch):
    make(workdir=tmp_path / "straight").fit()

    def stop(self, step):
        self.received = signal.SIGTERM if step == 4 else None
        return step == 4

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Signals, "stop_at", stop)
        with pytest.raises(Interrupted):
            make().fit()
    run = make()
    resumed = run.fit()
    assert comparable_lines(tmp_path / "run") == comparable_lines(tmp_path / "straight")
    chex.assert_trees_all_equal(saved(tmp_path / "run", 6), saved(tmp_path / "straight", 6))
    logits = run.predict(EVALUATION[0][:5])
    assert logits.shape == (5, LENGTH, V)
    np.testing.assert_array_equal(logits, resumed.student(EVALUATION[0][:5], train=False))
    assert run.predict(EVALUATION[0][:0]).shape == (0, LENGTH, V)


def test_a_logit_store_keeps_the_largest_logits_of_each_token(make, tmp_path, capsys):
    """All but one of them, which is all: the losses are those of the teacher itself."""
    stored = {"logits.dir": str(tmp_path / "logits"), "logits.dtype": "float32", "logits.views": 1}
    stored |= {"logits.top_k": V - 1, "logits.spread_rest": True}
    for name in ("wrote", "read"):
        make(workdir=tmp_path / name, config=stored).fit()
    assert comparable_lines(tmp_path / "read") == comparable_lines(tmp_path / "wrote")
    assert "the teacher is not run" in capsys.readouterr().out
    make(workdir=tmp_path / "online").fit()
    losses = [values(tmp_path / name, "train", "loss") for name in ("read", "online")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    key = json.loads((tmp_path / "logits/key.json").read_text())["key"]
    assert (key["label_shape"], key["classes"]) == ([LENGTH], V)


def test_a_logit_store_keeps_all_logits_of_each_token(tmp_path, rng):
    store = LogitStore(
        str(tmp_path), {"dtype": "float32", "classes": V, "data": {"records": 3}, "label_shape": [LENGTH]}
    )
    assert store.describe(2) == "1.6 kB: 2 epochs x 3 images x 6 labels x 11 classes x 4 bytes"
    logits = rng.normal(size=(3, LENGTH, V)).astype(np.float32)
    store.write(0, logits)
    np.testing.assert_array_equal(store.read(0), logits)


@pytest.mark.parametrize("outside", ["host", "file"])
def test_a_teacher_outside_of_jax_gives_logits_of_each_token(make, tmp_path, outside):
    rows = weights(1)["w"]
    np.save(tmp_path / "logits.npy", rows[TRAIN[0]])
    teachers = {"host": ldrld_jax.HostTeacher(lambda x: rows[x]), "file": str(tmp_path / "logits.npy")}
    make(workdir=tmp_path / "device", epochs=1).fit()
    taught = make(workdir=tmp_path / outside, teacher=teachers[outside], epochs=1).fit()
    found = [values(tmp_path / name, "train", "loss") for name in ("device", outside)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    device = json.loads((tmp_path / "device/summary.json").read_text())["teacher_top1"]
    assert taught.summary["teacher_top1"] == (pytest.approx(device) if outside == "host" else None)


def test_a_teacher_on_the_host_is_not_measured_on_nothing(make):
    class Nothing:
        num_classes = V

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return EVALUATION[0][index], np.full(LENGTH, -1)

    rows = weights(1)["w"]
    with pytest.raises(UserError, match="no image of the evaluation split is left"):
        make(teacher=ldrld_jax.HostTeacher(lambda x: rows[x]), evaluation=Nothing()).fit()


def test_texts_are_held_out_and_thinned_as_if_of_one_class(make):
    run = make(evaluation=None, config={"data.held_out": 0.25, "data.fraction": 0.5})
    plan = Run.plan(config_lib.resolve(run.config), run.workdir, given=run.given)
    assert (len(plan.batches.source), len(plan.eval_source)) == (15, 10)
    kept = [plan.batches.source.read(np.arange(15)), plan.eval_source.read(np.arange(10))]
    assert not {x.tobytes() for x in kept[0][0]} & {x.tobytes() for x in kept[1][0]}


@pytest.mark.parametrize("stored", [False, True])
def test_programs_for_absent_devices_take_the_batches_of_the_run(make, tmp_path, stored):
    run = make(config={"logits.dir": str(tmp_path / "logits")} if stored else {})
    plan = Run.plan(config_lib.resolve(run.config), run.workdir, given=run.given)
    (step, *_, evaluation) = programs_of(plan)
    for batch in (step.arguments["batch"], evaluation.arguments["split"]):
        assert batch["label"].shape[-1] == batch["mask"].shape[-1] == LENGTH
    shapes = {name: (x.shape, x.dtype) for name, x in step.arguments["batch"].items() if name != "teacher_logits"}
    assert shapes == {name: (x.shape, x.dtype) for name, x in plan.batches[0].items()}
    if stored:
        assert step.arguments["batch"]["teacher_logits"].shape == (16, LENGTH, V)


WITH = {name: (TRAIN[0], labels) for name, labels in (("pytorch", np.where(TRAIN[1] < 0, -100, TRAIN[1])),)}
PIXELS = np.zeros((40, 4, 4, 1), np.uint8), np.zeros((40, 4, 4), int)
WRONG = {
    "PyTorch's -100": (dict(train=WITH["pytorch"]), "label -100 of example .* and -1 for a label that is left out"),
    "a label too large": (dict(num_classes=5), "there are 5 classes, from 0, and -1"),
    "nothing kept": (dict(train=(TRAIN[0], np.full((40, LENGTH), -1))), "every label of the training data is below 0"),
    "one-hot labels": (dict(train=(TRAIN[0], np.eye(40, dtype=int))), "one-hot.*argmax"),
    "logits an example": (
        dict(student=(lambda v, x, train: v["w"][x][:, 0], weights(0))),
        r"must return logits \(2, 6, 11\): the data have 11 classes and labels \[n, 6\]",
    ),
    "a network for images": (dict(student="resnet8"), r"the model resnet8 fails on images \(2, 6\) int32"),
    "noise": (dict(config={"data.label_noise": "symmetric"}), "goes by the one label of an image"),
    "a long tail": (dict(config={"data.imbalance": 10.0}), "goes by the one label of an image"),
    "mixup": (dict(config={"data.mixup": 0.2}), "data.mixup=0.2 is for pixels, and the data are raw"),
    "the resident loader": (dict(config={"data.loader": "resident"}), "data.loader=resident is for pixels"),
    "pixels that move": (
        dict(train=PIXELS, evaluation=PIXELS, config={"data.flip": True}),
        r"data.flip=True is for images with one label each, and these have labels of shape \(4, 4\)",
    ),
    "a loss of one row an example": (
        dict(method=lambda t, s, y: jnp.zeros(len(y))),
        r"returns \(2,\), and must return a scalar or one loss per example, \(2, 6\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_work_with_tokens_is_one_line_and_no_workdir(make, tmp_path, wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as error:
        make(**arguments).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_broken_text_is_named_or_left_out(make, tmp_path):
    class Broken:
        num_classes = V

        def __len__(self):
            return 40

        def __getitem__(self, index):
            labels = TRAIN[1][index].copy()
            labels[2] = V if index == 7 else labels[2]
            return TRAIN[0][index], labels

    with pytest.raises(UserError, match=r"training data\[7\] is broken: a label is 11, and there are 11 classes"):
        make(train=Broken(), config={"precision": "float64"}).fit()
    still = {"precision": "float64", "optim.learning_rate": 0.0, "log.every_steps": 3, "data.on_error": "skip"}
    student, teacher = weights(0, np.float64), weights(1, np.float64)
    pair = dict(student=(table, student), teacher=(table, teacher))
    make(train=Broken(), epochs=1, workdir=tmp_path / "skips", config=still, **pair).fit()
    want = measured(*(np.delete(x, 7, axis=0) for x in TRAIN), student["w"], teacher["w"])
    assert values(tmp_path / "skips", "train", "loss") == [pytest.approx(want["loss"], rel=1e-12)]

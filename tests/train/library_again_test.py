"""`ldrld_jax.Trainer` in a workdir that has a run of objects of the same names: the same run, or one line."""

import concurrent.futures

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ldrld_jax
from ldrld_jax.errors import UserError
from ldrld_jax.train import plan
from ldrld_jax.train.networks import Networks
from tests.train.conftest import linear
from tests.train.trainer_test import saved


class Net(nnx.Module):
    def __init__(self, width: int):
        self.first, self.last = nnx.Linear(64, width, rngs=nnx.Rngs(0)), nnx.Linear(width, 10, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x.reshape(len(x), -1))))


def weights(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((64, 10), value, np.float32)}


@pytest.mark.parametrize(
    ("first", "then", "key"),
    [
        (dict(teacher=(linear, weights(1.0))), dict(teacher=(linear, weights(2.0))), "teacher.model"),
        (dict(teacher=[Net(4), Net(5)]), dict(teacher=[Net(4), Net(6)]), "teacher.model"),
        (dict(student=Net(4)), dict(student=Net(5)), "student.model"),
    ],
    ids=["teacher", "ensemble", "student"],
)
def test_other_weights_under_the_same_name_are_refused(make, first, then, key):
    summary = make(epochs=1, **first).fit().summary
    assert make(epochs=1, **first).fit().summary == summary  # the same again is complete
    other = rf"^{key}( and \w+\.structure)? of the run in .*: the weights, .* are not those that it began with"
    with pytest.raises(UserError, match=other):
        make(epochs=1, **then).fit()


class Scaled(Net):
    """A network of the same weights whatever the scale of its logits."""

    def __init__(self, scale: float):
        super().__init__(4)
        self.scale = scale

    def __call__(self, x):
        return self.scale * super().__call__(x)


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_a_module_of_the_same_weights_that_computes_something_else_is_refused(make, part):
    summary = make(epochs=1, **{part: Scaled(1.0)}).fit().summary
    assert make(epochs=1, **{part: Scaled(1.0)}).fit().summary == summary
    with pytest.raises(UserError, match=rf"^{part}\.structure of the run in .* other attributes are not those that"):
        make(epochs=1, **{part: Scaled(2.0)}).fit()


@pytest.mark.parametrize(
    ("teacher", "other", "key"),
    [
        (Scaled(1.0), Scaled(2.0), r"teacher\.structure"),
        (
            ldrld_jax.HostTeacher(lambda x: x.reshape(len(x), -1)[:, :10], name="ours", std=(np.float32(0.5),)),
            ldrld_jax.HostTeacher(lambda x: x.reshape(len(x), -1)[:, :10], name="ours", std=np.array([0.05])),
            r"teacher\.fed\.std",
        ),
    ],
    ids=["module", "host"],
)
def test_a_store_tells_teachers_of_the_same_weights_apart(make, tmp_path, teacher, other, key):
    config = {"logits.dir": str(tmp_path / "logits"), "logits.views": 1}
    for name in "ab":
        make(epochs=1, teacher=teacher, workdir=tmp_path / name, config=config).fit()
    with pytest.raises(UserError, match=rf"holds other logits: {key} \("):
        make(epochs=1, teacher=other, workdir=tmp_path / "c", config=config).fit()


def test_a_teacher_whose_first_weights_teach_nothing_may_have_others(make):
    train = {"teacher.epochs": 1, "teacher.optim.schedule": "constant"}
    summary = make(epochs=1, teacher=Net(4), config=train).fit().summary
    other = Net(4)
    other.last.kernel[...] += 1.0
    assert make(epochs=1, teacher=other, config=train).fit().summary == summary


def test_a_student_of_other_first_weights_resumes(make):
    make(epochs=1, config={"optim.schedule": "constant"}).fit()
    other = make(student=(linear, weights(3.0)), epochs=2, config={"optim.schedule": "constant"})
    assert other.fit().summary["steps"] == 6


def test_what_cannot_be_compared_is_named(make, capsys):
    make(epochs=1, optimizer=optax.sgd(0.1)).fit()
    assert "cannot be compared" not in capsys.readouterr().out
    make(epochs=1, optimizer=optax.sgd(0.2)).fit()
    assert "an earlier part of this run; the optimizer cannot be compared with that part's" in capsys.readouterr().out


def test_a_resumed_run_makes_no_first_state(make, monkeypatch):
    config = {"optim.schedule": "constant"}
    make(epochs=1, config=config).fit()
    monkeypatch.setattr(plan.Run, "make_state", None)  # beside the restored one it would lie on the devices to the end
    assert make(epochs=2, config=config).fit().summary["steps"] == 6


def test_predictions_load_a_checkpoint_once_and_again_when_there_is_a_better_one(make, digits, monkeypatch):
    trainer, restored, restore = make(epochs=1), [], Networks.restore
    trainer.fit()
    monkeypatch.setattr(Networks, "restore", lambda self, *place: restored.append(place) or restore(self, *place))
    images = digits["evaluation"][0]
    first = trainer.predict(images)
    np.testing.assert_array_equal(trainer.predict(images), first)
    assert len(restored) == 1
    better = make(
        student=(linear, weights(1.0)), epochs=1, method="ce", teacher=None, workdir=trainer.workdir / "other"
    )
    better.fit()
    (trainer.workdir / "checkpoints").rename(trainer.workdir / "before")
    (better.workdir / "checkpoints").rename(trainer.workdir / "checkpoints")
    with pytest.raises(UserError, match="belongs to another run"):  # of the same step
        trainer.predict(images)


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated", "ignore:Specifying a key")
@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ("lbfgs", "optim.name=lbfgs cannot update the student"),
        ("rprop", "optim.name=rprop cannot "),
        ("optimistic_adam", "optim.name=optimistic_adam cannot "),
        (optax.contrib.reduce_on_plateau(), "optim.name=<optimizer> cannot update the student"),
        ("noisy_sgd", "the state of optim.name=noisy_sgd has a key of jax.random.key, which no checkpoint holds"),
        (optax.add_noise(0.1, 0.5, key=0), "the state of optim.name=<optimizer> has a key of jax.random.key"),
    ],
)
def test_an_optimizer_that_needs_more_than_gradients_or_a_checkpoint_is_refused_before_the_teacher_trains(
    make, tmp_path, optimizer, why
):
    with pytest.raises(UserError, match=why) as error:
        make(optimizer=optimizer).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_average_of_weights_that_rounding_would_lose_is_refused(make, dtype):
    student = linear, {"w": np.zeros((64, 10), dtype)}
    with pytest.raises(UserError, match=f"<linear> has some of {jnp.dtype(dtype)}, which rounds the average away"):
        make(student=student, config={"ema_decay": 0.999}).fit()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"data.mixup": 0.2, "data.remainder": "drop"}, "data.mixup blends each image"),
        ({"method": "mlkd", "loss.mlkd.views": 2}, "method=mlkd compares 2 views of an image"),
        ({"method": "wkd"}, "method=wkd takes the teacher's last layer"),
    ],
)
def test_a_file_of_logits_is_refused_where_they_are_of_other_images(make, tmp_path, config, why):
    np.save(tmp_path / "logits.npy", np.zeros((90, 10), np.float32))
    method = config.pop("method", "kd")
    with pytest.raises(UserError, match=f"a file has logits, but {why}"):
        make(teacher=str(tmp_path / "logits.npy"), method=method, config=config).fit()


def test_a_file_of_bfloat16_is_read_as_such(make, tmp_path):
    logits = np.random.default_rng(0).normal(size=(90, 10)).astype(jnp.bfloat16)
    np.save(tmp_path / "narrow.npy", logits)
    np.save(tmp_path / "wide.npy", logits.astype(np.float32))
    narrow, wide = (
        make(teacher=str(tmp_path / f"{name}.npy"), workdir=tmp_path / name, epochs=1).fit().summary
        for name in ("narrow", "wide")
    )
    assert narrow["last_top1"] == wide["last_top1"]
    np.save(tmp_path / "bytes.npy", np.zeros((90, 10), "V3"))
    with pytest.raises(UserError, match=r"holds \|V3 \[90, 10\], and logits are floating-point"):
        make(teacher=str(tmp_path / "bytes.npy"), workdir=tmp_path / "bytes", epochs=1).fit()


def test_names_of_teachers_are_told_from_paths(make, tmp_path):
    assert make(teacher="resnet8").config.teacher.model == "resnet8"
    assert make(teacher=["resnet8", "tests.tiny_net:TinyNet"]).config.teacher.model == "resnet8,tests.tiny_net:TinyNet"
    assert make(teacher="timm/resnet18.a1_in1k").config.teacher.model == "timm/resnet18.a1_in1k"
    with pytest.raises(UserError, match=r"no model, file or folder for the teacher: 'resnet9'\. Did you mean"):
        make(teacher="resnet9")
    assert make(teacher="resnet8,resnet20").config.teacher.model == "resnet8,resnet20"
    files = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for file in files:
        file.touch()
    both = make(teacher=",".join(map(str, files)), config={"teacher.model": "resnet8,resnet20"}).config.teacher
    assert (both.model, both.checkpoint) == ("resnet8,resnet20", ",".join(map(str, files)))
    with pytest.raises(UserError, match="several teachers are all names or all paths"):
        make(teacher=["resnet8", files[0]])
    with pytest.raises(UserError, match=r"has teacher\.model='resnet20', and its argument teacher gives 'resnet8'"):
        make(teacher="resnet8", config={"teacher.model": "resnet20"})
    with pytest.raises(UserError, match=r"needs a teacher: .* teacher\.checkpoint, or with teacher\.epochs"):
        make(teacher="resnet8").fit()


def test_two_losses_of_one_name_are_both_added(make):
    def kd(teacher_logits, student_logits, labels):
        return jnp.full(labels.shape, 100.0)

    def constant(value):
        return lambda teacher_logits, student_logits, labels: jnp.full(labels.shape, value)

    first = lambda result: next(x["values"] for x in result.metrics if x["split"] == "train")  # noqa: E731
    own = first(make(epochs=1, method=["kd", kd], config={"ce_weight": 0.0}).fit())
    assert own["kd_2"] == 100.0 and own["loss"] == pytest.approx(0.9 * own["kd"] + 100.0, rel=1e-6)
    both = first(make(epochs=1, method=[constant(3.0), constant(4.0)], config={"ce_weight": 0.0}, workdir=None).fit())
    assert both["loss"] == 7.0


def test_a_home_directory_is_expanded(make, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(make(workdir="~/x").workdir) == f"{tmp_path}/x"
    trainer = make()
    assert str(ldrld_jax.Trainer.from_config(trainer.config, "~/y").workdir) == f"{tmp_path}/y"
    with pytest.raises(UserError, match=rf"the teacher's {tmp_path} holds no run"):
        make(teacher="~/")
    with pytest.raises(UserError, match=rf"for the teacher: '{tmp_path}/a'"):
        make(teacher=["~/a", "~/b"])
    (tmp_path / "images").mkdir()
    assert make(train="~/images", evaluation=None).config.data.data_dir == f"{tmp_path}/images"


def test_a_run_of_an_object_is_no_teacher_by_its_folder(make, tmp_path):
    make(epochs=1, workdir=tmp_path / "first").fit()
    with pytest.raises(UserError, match="trained the object <linear>, and its folder has the weights alone"):
        make(teacher=str(tmp_path / "first"))


def test_a_writer_that_raises_loses_no_training(make, tmp_path):
    class Service:
        def write(self, step, epoch, split, values):
            if split == "eval":
                raise RuntimeError("503")

    with pytest.raises(RuntimeError, match="503"):
        make(writers=[Service()]).fit()
    assert saved(tmp_path / "run", 3)
    result = make().fit()
    assert [line["step"] for line in result.metrics if line["split"] == "eval"] == [3, 6]


def test_a_run_in_another_thread_is_refused_and_one_within_a_callback_is_not(make, tmp_path):
    refused, scores = [], []

    def others(step, weights):
        if step == 3:
            with pytest.raises(UserError, match="another thread of this process is training"):
                concurrent.futures.ThreadPoolExecutor(1).submit(make(workdir=str(tmp_path / "thread")).fit).result()
            refused.append(not (tmp_path / "thread").exists())
            scores.append(make(workdir=str(tmp_path / "within")).fit().summary["best_top1"])

    result = make(callbacks=[ldrld_jax.Callback(after_save=others)]).fit()
    assert refused == [True] and scores == [result.summary["best_top1"]]


def test_a_store_of_a_functions_logits_says_what_it_knows(make, tmp_path):
    summary = make(epochs=1, config={"logits.dir": str(tmp_path / "store")}).fit().summary
    assert any(
        text.startswith("the logit store knows <linear 2> by its variables alone") for text in summary["warnings"]
    )


def test_what_a_teacher_that_is_trained_reads_depends_on_its_kind(make, tmp_path):
    host = ldrld_jax.HostTeacher(lambda images: np.zeros((len(images), 10), np.float32), name="host")
    config = {"teacher.data.mean": (0.4,), "teacher.data.image_size": 8}
    because = "set but has no effect, because the teacher runs on the host"
    said = make(epochs=1, teacher=host, config=config, workdir=tmp_path / "host").fit().summary["warnings"]
    assert {f"teacher.data.{key} is {because}" for key in ("mean", "image_size")} <= set(said)
    own = make(epochs=1, config=config).fit().summary["warnings"]
    assert not [text for text in own if "teacher.data" in text and "not read" in text]


def test_raw_inputs_reach_a_teacher_on_the_host_as_they_are():
    seen = []

    def function(images):
        seen.append(images)
        return np.zeros((len(images), 2))

    teacher = ldrld_jax.HostTeacher(function, mean=(0.5,), std=(0.25,))
    teacher(np.full((1, 3), 1.0, np.float32), classes=2)
    teacher(np.full((1, 2, 2, 1), 255, np.uint8), classes=2)
    assert [float(images.flat[0]) for images in seen] == [2.0, 2.0]


def test_a_file_of_logits_in_another_order_is_said(make, digits, tmp_path):
    labels = np.asarray(digits["train"][1])
    np.save(tmp_path / "logits.npy", np.eye(10, dtype=np.float32)[(labels + 1) % 10])
    said = make(epochs=1, teacher=str(tmp_path / "logits.npy")).fit().summary["warnings"]
    assert any(text.startswith("the teacher's top-1 is 0.00 %, and guessing gives 10.00 %") for text in said)
    keys = ("dir", "dtype", "top_k")
    config = {"logits.dir": str(tmp_path / "store"), "logits.dtype": "float32", "logits.top_k": 20}
    unused = make(epochs=1, teacher=str(tmp_path / "logits.npy"), config=config, workdir=tmp_path / "unused").fit()
    because = "set but has no effect, because the teacher's logits are read from a file"
    assert {f"logits.{key} is {because}" for key in keys} <= set(unused.summary["warnings"])
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_a_teacher_on_the_host_is_given_examples_alone_also_for_a_store(make, digits, tmp_path, remainder):
    """Uses a teacher that depends on the whole batch and has no logits for a black image, as padding is."""
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    seen = []

    def function(images):
        seen.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32)
        return (flat / flat.max(axis=1, keepdims=True) - flat.mean(axis=0) / 255) @ weights

    def run(name, **config):
        seen.clear()
        keys = {"data.remainder": remainder, **config}
        teacher = ldrld_jax.HostTeacher(function, name="batch")
        result = make(epochs=1, teacher=teacher, config=keys, workdir=tmp_path / name).fit()
        return [line["values"]["kd"] for line in result.metrics if line["split"] == "train"], [*seen]

    beside, sizes = run("beside")
    stored, sizes_stored = run("stored", **{"logits.dir": str(tmp_path / "store"), "logits.dtype": "float32"})
    assert stored == pytest.approx(beside, rel=1e-6)
    assert sizes_stored == [*sizes, *([10] if remainder == "drop" else [])]  # a store has logits of every image
    assert sizes[-2:] == [40, 40] if remainder == "drop" else sizes[-3:] == [40, 40, 10]

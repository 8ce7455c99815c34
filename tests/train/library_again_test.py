"""`ldrld_jax.Trainer` in a workdir that has a run of objects of the same names: the same run, or one line."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from ldrld_jax.train import plan
from ldrld_jax.train.trainer import Networks
from tests.train.conftest import linear


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
    other = rf"^{key} of the run in .*: the weights or their shapes are not those that it began with"
    with pytest.raises(UserError, match=other):
        make(epochs=1, **then).fit()


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


@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        ("lbfgs", "optim.name=lbfgs cannot update the student"),
        ("rprop", "optim.name=rprop cannot "),
        ("optimistic_adam", "optim.name=optimistic_adam cannot "),
        (optax.contrib.reduce_on_plateau(), "optim.name=<optimizer> cannot update the student"),
    ],
)
def test_an_optimizer_that_needs_more_than_gradients_is_refused_before_the_teacher_trains(
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
    with pytest.raises(UserError, match=r"holds \|V3 .* need logits"):
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
    with pytest.raises(UserError, match=r"has teacher\.model='resnet20', and its argument teacher is 'resnet8'"):
        make(teacher="resnet8", config={"teacher.model": "resnet20"})
    with pytest.raises(UserError, match=r"needs a teacher: .* teacher\.checkpoint, or with teacher\.epochs"):
        make(teacher="resnet8").fit()

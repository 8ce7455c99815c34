"""Arguments that `ldrld_jax.Trainer` cannot use get one line, and leave no workdir."""

import dataclasses
import io
import itertools
import json
import pathlib

import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image, ImageOps

from ldrld_jax import Callback, LDRLDConfig
from ldrld_jax.errors import UserError
from ldrld_jax.losses import KDConfig
from tests.train.conftest import linear
from tests.train.library_test import Drop, Linen


def nothing_at_all(teacher, student, labels):
    """Returns a user's loss of nothing."""
    return 0 * student[:, 0]


class Printer:
    """A user's writer."""

    def write(self, step, epoch, split, values):
        print(step, epoch, split, values)


@dataclasses.dataclass(frozen=True)
class Saver(Callback):
    """A callback as other libraries have it: by methods."""

    def save(self, step, variables):
        print(step, variables)


WRONG = {
    "no model": (dict(student=3), "a model must be an nnx.Module"),
    "a Linen module alone": (dict(student=Linen()), "with its variables"),
    "no teacher": (dict(teacher=None), "needs a teacher"),
    "paths and models": (dict(teacher=["a", Drop]), "all paths or all models"),
    "a file of what": (dict(teacher=__file__), "does not name its model"),
    "a file that is not there": (dict(teacher="net.pth"), "no model, file or folder for the teacher: 'net.pth'"),
    "no workdir": (dict(teacher="."), r"holds no run \(no config.json\)"),
    "a number as a method": (dict(method=3), "a method must be a name"),
    "an unknown method": (dict(method="ldrdl"), "Did you mean 'ldrld'"),
    "labels of another length": (
        dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(4, int))),
        "one label per image",
    ),
    "one-hot labels": (dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.eye(3))), "argmax"),
    "a missing axis": (dict(train=(np.zeros((3, 8, 8), np.uint8), np.zeros(3, int))), "Add the axis"),
    "a label out of range": (
        dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 12])), num_classes=10),
        "label 12 of example 2 of the training data is out of range",
    ),
    "a label below 0": (dict(train=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, -1]))), "label -1 of example 2"),
    "not finite": (dict(train=(np.full((3, 8), np.nan), np.zeros(3, int))), "not finite"),
    "no evaluation": (dict(evaluation=None), "data.held_out"),
    "other classes": (
        dict(evaluation=(np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 1, 11])), num_classes=10),
        "label 11 of example 2 of the evaluation data",
    ),
    "evaluation inputs of another dtype": (
        dict(evaluation=(np.zeros((3, 8, 8, 1), np.float32), np.array([0, 1, 2])), num_classes=10),
        r"data are uint8 pixels \(3 axes, 1 channels\) with one label each, and the evaluation data fractions raw",
    ),
    "evaluation images with colours": (
        dict(evaluation=(np.zeros((3, 8, 8, 3), np.uint8), np.array([0, 1, 2])), num_classes=10),
        r"\(3 axes, 1 channels\) .* \(3 axes, 3 channels\) .* Give both alike",
    ),
    "raw inputs of two shapes": (
        dict(train=(np.zeros((90, 64)), np.arange(90) % 10), evaluation=(np.zeros((3, 65)), np.array([0, 1, 9]))),
        r"fails on images \(2, 65\) float32",
    ),
    "a metric of the run's own": (dict(metrics={"top1": print}), "'top1' has the name of one that each run measures"),
    "metrics of one curve": (
        dict(metrics={"a b": print, "a+b": print}),
        r"metrics 'a b' and 'a\+b' would be one curve, 'a_b'\. Rename one of them\.$",
    ),
    "a metric of the run's own curve": (dict(metrics={"ce term": print}), "'ce term' has the name of one that each"),
    **{
        f"the name {name!r} of a metric": (dict(metrics={name: print}), rf"metric '{name}' must have a name without")
        for name in ("", "/a", "a/", "a//b", "a/../b", "./a", "..")
    },
    "a metric's long name": (
        dict(metrics={"x" * 245: print}),
        rf"^the name of a metric has 245 characters, and at most 244 are allowed\. Shorten '{'x' * 40}'\.\.\.$",
    ),
    "a metric with the name of a term": (
        dict(metrics={"kd": lambda logits, labels, where: labels}),
        "'kd' has the name of a term of the loss",
    ),
    "a metric with the name of a part": (
        dict(method="ldrld", metrics={"ldrld/pairs": lambda logits, labels, where: labels}),
        "'ldrld/pairs' has the name of a term of the loss",
    ),
    "a metric of the curve of a part": (
        dict(method=nothing_at_all, metrics={"nothing at all/part": print}),
        "'nothing at all/part' has the name of a term of the loss",
    ),
    "no metric": (dict(metrics={"share": 3}), r"'share' must be a function of \(logits, labels, where\), got 3"),
    "an argument and another key": (dict(config={"epochs": 240}), r"has epochs=240.* is 2\. .* Trainer\(epochs=240\)"),
    "a method and another key": (dict(config={"method": "dkd"}), r"has method='dkd', and its argument method is 'kd'"),
    "a field and another key": (
        dict(method=LDRLDConfig(depth=3), config={"loss.ldrld.temperature": 2.0}),
        r"has loss.ldrld.temperature=2.0, and its argument method gives 4.0\. Give one of them",
    ),
    "a dataset and another": (
        dict(train="mnist", evaluation=None, config={"data.name": "cifar10"}),
        "has data.name='cifar10', and its argument train gives 'mnist'",
    ),
    "a folder and another": (
        dict(train=".", evaluation=None, config={"data.data_dir": "elsewhere"}),
        r"has data\.data_dir='elsewhere', and its argument train gives '\.'",
    ),
    "a split and another": (
        dict(train="mnist", evaluation="test", config={"data.eval_split": "validation"}),
        "has data.eval_split='validation', and its argument evaluation gives 'test'",
    ),
    "a checkpoint and another": (
        dict(teacher=__file__, config={"teacher.model": "resnet8", "teacher.checkpoint": "b.pth"}),
        "has teacher.checkpoint='b.pth', and its argument teacher gives",
    ),
    "a student and its name": (
        dict(config={"student.model": "resnet8"}),
        "has student.model='resnet8', which the argument",
    ),
    "a teacher and its name": (
        dict(config={"teacher.model": "resnet8"}),
        "has teacher.model='resnet8', which the argument",
    ),
    "data and their name": (dict(config={"data.name": "mnist"}), "data.name='mnist', which the argument train sets"),
    "an optimizer and its name": (
        dict(optimizer=optax.sgd(0.1), config={"optim.name": "adamw"}),
        "optim.name='adamw', which the argument optimizer sets",
    ),
    "two evaluations": (
        dict(config={"data.held_out": 0.2}),
        "data.held_out=0.2 evaluates on a part of train",
    ),
    "no optimizer": (dict(optimizer=3), "the optimizer must be one of optax"),
    "no writer": (dict(writers=[3]), "a writer must have write"),
    "a writer without a list": (dict(writers=np), "writers must be a list, got module"),
    "a metric without a name": (dict(metrics=[print]), "metrics must be a dict from names to functions, got list"),
    "an array as a teacher": (dict(teacher=np.zeros((64, 10))), "a model must be an nnx.Module"),
    "a fraction of classes": (dict(num_classes=10.0), "num_classes must be a whole number, got 10.0"),
    "the class of a writer": (dict(writers=[Printer]), r"must be an object, got the class Printer\. Give Printer\(\)"),
    "no callback": (
        dict(callbacks=[print]),
        r"a callback must be ldrld_jax\.Callback\(after_save=function\), got a builtin_function_or_method\. Pass",
    ),
    "a callback of another class": (
        dict(callbacks=[Saver()]),
        r"got a Saver\. .* Callback\(after_save=callback\.method",
    ),
    "an unknown key": (dict(config={"data.maen": 1.0}), "Did you mean 'data.mean'"),
    "logits of other classes": (
        dict(student=(lambda v, x, train: x.reshape(len(x), -1) @ v, np.ones((64, 7), np.float32))),
        r"returns float32 \(2, 7\) for 2 images, and must return logits \(2, 10\)",
    ),
    "another shape": (
        dict(student=(linear, {"w": np.ones((49, 10), np.float32)})),
        r"fails on images \(2, 8, 8, 1\) uint8",
    ),
    "groups of Flax's normalisation": (
        dict(student=Drop(nnx.Rngs(0)), config={"batch_norm_group": 20}),
        "works with this package's BatchNorm only",
    ),
}


# Refused by `Trainer(...)` itself, before `fit`.
AT_ONCE = {
    "a dict of inputs": (
        dict(train=({"ids": np.zeros((3, 5), int), "mask": np.zeros((3, 5), int)}, np.zeros(3, int))),
        r"inputs of the training data must be one array \[n, \.\.\.\], got a dict of ids, mask\. Give one of them",
    ),
    "texts that differ in length": (
        dict(train=([[1, 2, 3], [4, 5]], [0, 1])),
        r"inputs of the training data must have one shape, got \(2,\) and \(3,\)\. Pad texts .* label the padding -1",
    ),
    "labels that differ in length": (
        dict(evaluation=(np.zeros((2, 3), int), [[0, 1, 1], [1, 0]])),
        r"labels of the evaluation data must have one shape, got \(2,\) and \(3,\)\. Pad texts",
    ),
    "a function as a teacher": (
        dict(teacher=lambda images: images),
        r"a teacher must be .* or a HostTeacher, got function\. Wrap it: ldrld_jax\.HostTeacher\(function\), whose",
    ),
    "a split of arrays": (
        dict(config={"data.train_split": "train[:50%]"}),
        r"has data.train_split='train\[:50%\]', which is for data with a name, and train is a tuple\. Remove the key",
    ),
    "a split of the evaluation's arrays": (dict(config={"data.eval_split": "test"}), "has data.eval_split='test'"),
    "a folder of arrays": (dict(config={"data.data_dir": "/data"}), "has data.data_dir='/data', which is for data"),
    "the class of a config": (dict(method=LDRLDConfig), r"got the class LDRLDConfig\. Give LDRLDConfig\(\.\.\.\)"),
    "a method twice": (dict(method=[KDConfig(temperature=2), KDConfig(temperature=3)]), "method has kd twice, the"),
    "a function in an ensemble": (
        dict(teacher=[(linear, {"w": np.ones((64, 10))}), lambda images: images]),
        r"or a HostTeacher, got function\. Wrap it",
    ),
}


@pytest.mark.parametrize("wrong", AT_ONCE)
def test_what_no_run_can_use_is_refused_by_the_constructor(make, tmp_path, wrong):
    arguments, message = AT_ONCE[wrong]
    with pytest.raises(UserError, match=message) as error:
        make(**arguments)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_module_of_pytorch_as_a_teacher_is_told_of_the_host_teacher(make):
    torch = pytest.importorskip("torch")
    with pytest.raises(UserError, match=r"or a HostTeacher, got Linear\. Wrap it: ldrld_jax\.HostTeacher"):
        make(teacher=torch.nn.Linear(64, 10))


def test_a_folder_must_have_the_number_of_classes_that_is_given(make, tmp_path):
    for split, name in itertools.product(("train", "val"), "abc"):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / "data" / split / name / f"{i}.png")
    student = (linear, {"w": np.zeros((192, 3), np.float32)})
    sizes = {"data.crop_size": 8, "data.resize_size": 8}
    folder = dict(student=student, teacher=None, method="ce", batch_size=8, config=sizes)
    folder |= dict(train=str(tmp_path / "data"), evaluation=None)
    with pytest.raises(UserError, match=r"num_classes is 5, and the training data have 3 classes\. Remove num_classes"):
        make(**folder, num_classes=5).fit()
    assert not (tmp_path / "run").exists()
    (problem,) = make(**folder, num_classes=5).check()
    assert "num_classes is 5, and the training data have 3 classes" in problem
    assert make(**folder, num_classes=3, epochs=1).fit().summary["best_top1"] >= 0


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_run_can_use_is_one_line_and_no_workdir(make, tmp_path, wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as error:
        make(**arguments).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 1), np.float32), "image 0 cannot be used: its dtype is float32, and the others have uint8"),
        ([np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 1), int)], "image 1 cannot be used: its dtype is int64"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"image 0 cannot be used: its shape is \(9, 8, 1\)"),
        ([b"hello"], r"image 0 cannot be used: not an image \(5 bytes\)"),
        ([(np.zeros((8, 8, 1), np.uint8), 3)], r"image 0 is a tuple, and predict takes images alone, without labels\."),
        ([{"image": np.zeros((8, 8, 1), np.uint8), "label": 3}], "image 0 is a dict, and predict takes images alone"),
    ],
)
def test_an_image_that_is_not_as_the_training_data_is_not_predicted(make, images, message):
    trainer = make(epochs=1)
    trainer.fit()
    with pytest.raises(UserError, match=message):
        trainer.predict(images)


@pytest.mark.parametrize("call", ["predict", "evaluate", "student", "export"])
def test_nothing_is_asked_of_a_run_before_it_is_trained(make, digits, tmp_path, call):
    arguments = [digits["evaluation"][0]] if call == "predict" else []
    with pytest.raises(UserError, match=r"run has no checkpoint yet\. Train the run first\."):
        getattr(make(), call)(*arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_on_data_of_the_form_of_its_training_data(make, digits):
    make(epochs=1).fit()
    images, labels = digits["evaluation"]
    expected = make(epochs=1).evaluate()
    fractions = {name: (split[0] / np.float32(255), split[1]) for name, split in digits.items()}
    for given in (fractions, {"evaluation": fractions["evaluation"]}):
        with pytest.raises(
            UserError, match=r"trained on data of uint8 pixels .*, and these are fractions raw .* alike"
        ):
            make(epochs=1, **given).evaluate()
        with pytest.raises(UserError, match="trained on data of uint8 pixels"):
            make(epochs=1, **given).predict(images)
    with pytest.raises(UserError, match=r"the model <linear> fails on images \(2, 4, 8, 1\) uint8: TypeError"):
        make(epochs=1, evaluation=(images[:, :4], labels)).evaluate()
    assert make(epochs=1, evaluation=(images[::-1], labels[::-1])).evaluate() == pytest.approx(expected, rel=1e-6)
    note = pathlib.Path(make().workdir) / "data.json"
    for strange in ("uint8", None, {"numbers": "uint8"}):
        note.write_text(json.dumps(json.loads(note.read_text()) | {"form": strange}))
        with pytest.raises(UserError, match=r"data\.json is not a valid data\.json\. Restore it"):
            make(epochs=1).evaluate()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda teacher, student: teacher, r"^method=.* fails: TypeError: .* takes 2 positional arguments but 3"),
        (lambda *rows: (rows[0], rows[1]), r"returns a tuple, and must return an array"),
        (lambda *rows: {"a": rows[0]}, r"returns a dict, and must return an array"),
        (lambda teacher, student, labels: teacher @ student, r"^method=.* fails: TypeError: "),
    ],
    ids=["arguments", "tuple", "dict", "shapes"],
)
def test_a_loss_that_fails_is_one_line_of_a_check_too(make, tmp_path, method, message):
    with pytest.raises(UserError, match=message):
        make(method=method).fit()
    assert len(make(method=method).check()) == 1
    assert not list(tmp_path.iterdir())


def test_pictures_are_turned_as_the_files_that_they_are_opened_from(make, rng):
    """Turns them by EXIF in a dataset, an evaluation and `predict`, unless `data.exif=False`."""
    files = []
    for pixels in rng.integers(0, 256, (20, 8, 8, 3), np.uint8):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6  # a quarter turn
        Image.fromarray(pixels).save(file, format="png", exif=exif)
        files.append(file.getvalue())
    opened = [Image.open(io.BytesIO(file)) for file in files]
    student = linear, {"w": rng.normal(size=(192, 2)).astype(np.float32)}
    logits = {}
    for exif in (True, False):
        data = [(image, i % 2) for i, image in enumerate(opened)]
        config = {"data.exif": exif, "data.crop_size": 8, "data.resize_size": 8}
        trainer = make(
            student=student, method="ce", teacher=None, train=data, evaluation=data, num_classes=2, epochs=1,
            config=config, workdir=None,
        )  # fmt: skip
        trainer.fit()
        logits[exif] = trainer.predict(opened)
        np.testing.assert_array_equal(trainer.predict(files), logits[exif])
        upright = [np.asarray(ImageOps.exif_transpose(image) if exif else image) for image in opened]
        np.testing.assert_array_equal(trainer.predict(np.stack(upright)), logits[exif])
    assert np.abs(logits[True] - logits[False]).max() > 0.1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((image for image in np.zeros((2, 8, 8, 1), np.uint8)), r"images must be an array .* or a list, got generator"),
        (None, "images must be an array .* or a list, got NoneType"),
        ("a.png", "images must be an array .* or a list, got str"),
        ({"a": np.zeros((8, 8, 1), np.uint8)}, "images must be an array .* or a list, got dict"),
        (["a.png"], r"image 0 is a str, and predict takes .* Give pathlib\.Path\(path\)\.read_bytes\(\) of a file"),
        ([None], "image 0 is a NoneType"),
    ],
    ids=["generator", "None", "text", "dict", "path", "hole"],
)
def test_what_is_no_sequence_of_images_is_not_predicted(make, images, message):
    trainer = make(epochs=1)
    trainer.fit()
    with pytest.raises(UserError, match=message):
        trainer.predict(images)


def test_whole_numbers_that_do_not_fit_are_not_predicted(make):
    tokens = np.arange(90 * 4).reshape(90, 4) % 10
    student = lambda v, x, train: v["w"][x], {"w": np.eye(10, dtype=np.float32)}
    trainer = make(student=student, teacher=student, epochs=1, train=(tokens, tokens), evaluation=(tokens, tokens))
    trainer.fit()
    assert trainer.predict(tokens).shape == (90, 4, 10)
    with pytest.raises(UserError, match="image 0 cannot be used: it has numbers beyond those of int32"):
        trainer.predict(tokens + 2**32)


def test_a_run_of_objects_goes_on_and_is_exported_with_data_of_one_form_only(make, digits, monkeypatch):
    """A dataset object says nothing of its images, whose list is that of their labels."""

    class Items:
        num_classes = 10

        def __init__(self, split, scale):
            self.images, self.labels = split[0] / scale if scale != 1 else split[0], split[1]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, i):
            return self.images[i], int(self.labels[i])

    def run(scale):
        return make(epochs=1, **{name: Items(split, np.float32(scale)) for name, split in digits.items()})

    run(1).fit()
    assert run(1).fit().summary["steps"] == 3
    for call in ("fit", "export"):
        with pytest.raises(
            UserError, match=r"trained on data of uint8 pixels .*, and these are fractions raw .* alike"
        ):
            getattr(run(255), call)()
    assert any("fractions raw" in line for line in run(255).check())


def test_pictures_of_pillow_are_predicted_as_their_arrays(make, digits):
    trainer = make(epochs=1)
    trainer.fit()
    images = digits["evaluation"][0][:3]
    wanted = trainer.predict(images)
    np.testing.assert_array_equal(trainer.predict([Image.fromarray(image[..., 0]) for image in images]), wanted)


def test_a_folders_own_training_split_is_trained_on(make, tmp_path):
    trainer = make(train=str(tmp_path), evaluation="testing", config={"data.train_split": "training"})
    assert (trainer.config.data.train_split, trainer.config.data.eval_split) == ("training", "testing")
    assert make(train=str(tmp_path), evaluation=None).config.data.train_split == "train"


def test_rows_of_two_axes_are_predicted_as_they_are_trained_on(make):
    """Adds no channel axis, which a grey image of Pillow gets."""
    rows, labels = np.arange(90 * 12, dtype=np.uint8).reshape(90, 4, 3), np.zeros((90, 4), int)
    student = lambda v, x, train: x @ v["w"], {"w": np.ones((3, 2), np.float32)}
    data = dict(train=(rows, labels), evaluation=(rows[:9], labels[:9]), num_classes=2)
    trainer = make(student=student, teacher=student, epochs=1, **data)
    trainer.fit()
    assert trainer.predict(rows[:2]).shape == (2, 4, 2)


def test_a_writer_that_cannot_be_closed_keeps_no_run_from_its_summary(make, tmp_path, caplog):
    class Away(Printer):
        def close(self):
            raise OSError("no route to host")

    make(writers=[Away()]).fit()
    assert (tmp_path / "run" / "summary.json").exists()
    assert "Away could not be closed: no route to host." in caplog.text

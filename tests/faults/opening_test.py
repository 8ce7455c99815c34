"""The lines that a run prints of itself at its start, and its warnings."""

import json
import shutil

import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.data.decoding import Decoding
from ldrld_jax.record.reader import read_summary
from ldrld_jax.report.collect import collect
from ldrld_jax.train import trainer
from ldrld_jax.train.opening import opening, teacher_warnings, warnings
from ldrld_jax.train.plan import Run
from tests.conftest import ROOT


def planned(config, workdir) -> Run:
    return Run.plan(config_lib.resolve(config), workdir)


def test_a_run_says_of_itself_in_five_lines(tiny, tmp_path, data_dir):
    run = planned(tiny("method=kd", "teacher.epochs=1", "optim.warmup_epochs=1"), tmp_path / "run")
    assert opening(run, "student").splitlines() == [
        f"data      digits from {data_dir}: 90 training images (train[:90]), 50 to evaluate on (test[:50]), 10 "
        "classes, 8 x 8 x 1",
        "models    student tiny_net, 346 parameters, 0.0 MFLOPs per image; teacher tiny_net, 346 parameters, 0.0 "
        "MFLOPs per image",
        "device    2 x cpu (cpu), float32",
        "training  kd, 2 epochs of 3 steps, batches of 40; sgd, learning rate 0.05, cosine, linear warm-up of 1 epoch",
        f"results   {tmp_path / 'run'}",
    ]
    assert list(warnings(run)) == []


def test_a_warning_is_said_in_the_summary_and_in_the_report(on_folder, folder, tmp_path, capsys):
    shutil.rmtree(folder / "val/dog")
    trainer.train(on_folder("loss.kd.temperature=2.", "loss_weight.dkd=2."), tmp_path / "run", file="configs/digits.py")
    expected = [
        "optim.learning_rate=0.05 of configs/digits.py is meant for batch_size=64, but batch_size=8: linear scaling "
        "gives 0.125 times that rate",
        "loss.kd.temperature is set but has no effect, because method=ce",
        "loss_weight.dkd is set but has no effect, because method=ce",
        "1 of 3 classes have no image to evaluate on: dog",
    ]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("warning: ")] == [f"warning: {text}." for text in expected]
    assert [line.split()[0] for line in said[:5]] == ["data", "models", "device", "training", "results"]
    assert json.loads((tmp_path / "run/summary.json").read_text())["warnings"] == expected
    assert collect([tmp_path / "run"]).notes == [f"{tmp_path / 'run'}: warning: {text}" for text in expected]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["method=ce", "kd_weight=3"], ["kd_weight is set but has no effect, because method=ce"]),
        (["method=ce", "standardize=True"], ["standardize is set but has no effect, because method=ce"]),
        (["logits.views=3"], ["logits.views is set but has no effect, because logits.dir is not set"]),
        (["logits.views=3", "logits.dir=store"], []),
        (["loss.kd.temperature=4", "loss.dkd.top_k=0"], []),  # as if unset
        (
            ["teacher.checkpoint=t", "teacher.optim.momentum=.5"],
            ["teacher.optim.momentum is set but has no effect, because teacher.checkpoint names a trained teacher"],
        ),
        (
            ["teacher.checkpoint=t", "teacher.data.crop_size=9", "teacher.data.mean=(.5,)", "teacher.seed=1"],
            [
                "teacher.data.crop_size is set but has no effect, because teacher.checkpoint names a trained teacher",
                "teacher.seed is set but has no effect, because teacher.checkpoint names a trained teacher",
            ],
        ),
        (["teacher.optim.momentum=.5", "teacher.seed=1"], []),
        (
            ["teacher.model=ema", "teacher.checkpoint=t", "teacher.epochs=9"],
            [f"teacher.{key} is set but has no effect, because teacher.model=ema" for key in ("checkpoint", "epochs")],
        ),
        (
            ["teacher.epochs=None", "teacher.model=a:b", "teacher.data.flip=True"],
            ["teacher.data.flip is set but has no effect, because teacher.epochs is not set"],
        ),
        (["method=ce", "teacher.checkpoint=t", "teacher.optim.momentum=.5"], []),
        (["method=kd+ldrld", "loss.kd.temperature=3", "loss_weight.ldrld=2."], []),
        (["loss.kd.temperature=3"], ["loss.kd.temperature is set but has no effect, because method=ldrld"]),
        (
            ["data.label_noise=symmetric"],
            ["data.label_noise is set but has no effect, because data.label_noise_rate is 0"],
        ),
        (
            ["data.label_noise_rate=.4"],
            ["data.label_noise_rate is set but has no effect, because data.label_noise is none"],
        ),
        (["data.label_noise=symmetric", "data.label_noise_rate=.4"], []),
        (["data.resize_size=9"], ["data.resize_size is set but has no effect, because data.crop_size is not set"]),
        *[
            ([f"{key}={value}", *others], [f"{key} is set but has no effect, because {why}"])
            for key, value, others, why in (
                ("data.pad", "2", ["data.augment=rotate"], "data.augment=rotate"),
                ("data.crop_area", "(.2,1.)", [], "data.augment=pad_crop"),
                ("data.rotate_degrees", "15.", [], "data.augment=pad_crop"),
                ("data.rand_magnitude", "5", [], "data.rand_augment is 0"),
                ("optim.decay_epochs", "(5,10)", [], "optim.schedule=cosine"),
                ("optim.decay_rate", ".5", [], "optim.schedule=cosine"),
                ("optim.warmup_epochs", "2", ["optim.warmup=none"], "optim.warmup=none"),
                ("logits.dtype", "float32", [], "logits.dir is not set"),
                ("logits.top_k", "5", [], "logits.dir is not set"),
                ("teacher.ensemble", "probabilities", [], "teacher.model is one model"),
                ("student.checkpoint_head", "skip", [], "student.checkpoint is not set"),
            )
        ],
        (["data.augment=rotate", "data.rotate_degrees=15.", "optim.schedule=step", "optim.decay_rate=.5"], []),
        (["logits.dir=store", "logits.top_k=5", "student.checkpoint=c", "student.checkpoint_head=skip"], []),
        (["teacher.model=resnet8,resnet20", "teacher.ensemble=probabilities"], []),
    ],
)
def test_a_block_that_nothing_reads_is_said(flags, expected):
    path = "configs/digits.py"
    assert config_lib.remarks(config_lib.load(path, flags), path) == expected


@pytest.mark.parametrize("name", ["run_1", "run,1"])
def test_a_comma_is_part_of_the_path_of_a_single_teacher(name, tmp_path):
    (tmp_path / name).mkdir()
    flags = [f"teacher.checkpoint={tmp_path / name}", "teacher.data.mean=(.1,)"]
    (line,) = config_lib.remarks(config_lib.load("configs/digits.py", flags), "configs/digits.py")
    assert line.startswith("teacher.data.mean is set but has no effect")


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "configs").glob("*.py")))
def test_what_a_config_file_sets_for_another_run_is_not_said(path):
    for flags in ([], ["teacher.checkpoint=t"], ["method=kd", "teacher.checkpoint=t"], ["method=ce"]):
        assert config_lib.remarks(config_lib.load(path, flags), path) == []


def test_what_a_config_file_sets_and_does_not_read_itself_is_said(tmp_path):
    block = "ConfigDict({'method': 'kd', 'loss': {'dkd': {'beta': 3.0}}, 'teacher': {'optim': {'momentum': .5}}})"
    text = f"from ml_collections import ConfigDict\n\ndef get_config():\n    return {block}\n"
    (tmp_path / "file.py").write_text(text)
    path = str(tmp_path / "file.py")
    beta, momentum = (
        ("loss.dkd.beta", "method=kd"),
        ("teacher.optim.momentum", "teacher.checkpoint names a trained teacher"),
    )
    for flags, expected in (
        (["teacher.epochs=1"], [beta]),
        (["teacher.checkpoint=t"], [beta]),
        (["teacher.checkpoint=t", "teacher.optim.momentum=.6"], [beta, momentum]),
        (["teacher.checkpoint=t", "loss.dkd.beta=4.0", "method=ce"], [(beta[0], "method=ce")]),
        (["teacher.epochs=1", "method=dkd"], []),
    ):
        lines = [f"{key} is set but has no effect, because {why}" for key, why in expected]
        assert config_lib.remarks(config_lib.load(path, flags), path) == lines
    without = config_lib.remarks(config_lib.load(path, ["teacher.checkpoint=t"]))
    assert without == [f"{key} is set but has no effect, because {why}" for key, why in (beta, momentum)]


def test_a_summary_without_warnings_or_with_something_else_in_their_place_is_read(tmp_path):
    for found, expected in ((None, []), (["a", 3], ["a"]), ("text", [])):
        (tmp_path / "summary.json").write_text(json.dumps({"warnings": found}))
        assert read_summary(tmp_path)["warnings"] == expected


def test_a_warmup_as_long_as_the_run_is_said(tiny, tmp_path):
    run = planned(tiny("optim.warmup=linear", "optim.warmup_epochs=2"), tmp_path)
    (line,) = warnings(run)
    assert line.startswith("the warm-up of 2 epochs is as long as the run of 2: lower optim.warmup_epochs")


def test_a_batch_size_without_its_learning_rate_is_said():
    path = "configs/digits.py"
    (line,) = config_lib.remarks(config_lib.load(path, ["batch_size=256"]), path)
    assert "optim.learning_rate=0.05 of configs/digits.py is meant for batch_size=64" in line
    assert line.endswith("but batch_size=256: linear scaling gives 4 times that rate")
    for flags in ([], ["batch_size=256", "optim.learning_rate=.2"], ["optim.learning_rate=.2"]):
        assert config_lib.remarks(config_lib.load(path, flags), path) == []


@pytest.mark.parametrize(("top1", "said"), [(10.0, True), (14.4, True), (14.6, False), (None, False)])
def test_a_teacher_that_guesses_is_said(tiny, tmp_path, top1, said):
    run = planned(tiny("method=kd", "teacher.epochs=1"), tmp_path)
    assert ["guessing gives 10.00 %" in text for text in teacher_warnings(run, [], top1)] == [True] * said


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["teacher.checkpoint=net.pth"], "its checkpoint and teacher.data.mean and std"),
        (["teacher.epochs=1"], "its checkpoint"),
        (["teacher.model=logits", "teacher.checkpoint=z.npy"], "the file and the order of its rows"),
    ],
)
def test_a_weak_teachers_warning_names_what_has_an_effect_on_it(tiny, tmp_path, flags, what):
    run = planned(tiny("method=kd", *flags), tmp_path)
    (tmp_path / "teacher").mkdir()
    (line,) = teacher_warnings(run, [], 10.0)
    assert line.endswith(f"guessing gives 10.00 %: check its classes and their order, and {what}")


TEACHERS = {
    "all images": ([], ["data.held_out=.2"], True),
    "another part": (["data.held_out=.2", "data.seed=1"], ["data.held_out=.2"], True),
    "the same part": (["data.held_out=.2"], ["data.held_out=.2"], False),
    "a test split": ([], [], False),
    "the whole of a split": (["data.train_split=test"], [], True),
    "the training images": ([], ["data.eval_split=train[:90]"], True),
    "some of the training images": ([], ["data.eval_split=train[80:200]"], True),
    "other images of the split": ([], ["data.eval_split=train[90:200]"], False),
    "a sum with them": (["data.train_split=train[:9]+test"], [], True),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_that_saw_what_the_student_is_evaluated_on_is_said(tiny, tmp_path, case):
    of_teacher, of_student, said = TEACHERS[case]
    teacher = planned(tiny(*of_teacher), tmp_path)
    (tmp_path / "config.json").write_text(teacher.config.to_json())
    (tmp_path / "data.json").write_text(json.dumps(teacher.data_note | {"weights": {}}))
    run = planned(tiny("method=kd", f"teacher.checkpoint={tmp_path}", *of_student), tmp_path / "run")
    found = list(teacher_warnings(run, [str(tmp_path)], 90.0))
    assert ["was trained on images that the student is evaluated on" in text for text in found] == [True] * said


@pytest.mark.parametrize("copies", ["the teacher's", "the student's"])
def test_decoded_images_were_seen_by_who_saw_those_that_they_are_copies_of(tiny, tmp_path, copies):
    for _ in Decoding(tiny().data, str(tmp_path / "decoded")).write():
        pass
    files, decoded = [], ["data.name=decoded", f"data.data_dir={tmp_path / 'decoded'}"]
    of_teacher, of_student = (decoded, files) if copies == "the teacher's" else (files, decoded)
    teacher = planned(tiny(*of_teacher), tmp_path)
    (tmp_path / "config.json").write_text(teacher.config.to_json())
    (tmp_path / "data.json").write_text(json.dumps(teacher.data_note | {"weights": {}}))
    held_out = [f"teacher.checkpoint={tmp_path}", "data.held_out=.2"]
    run = planned(tiny("method=kd", *held_out, *of_student), tmp_path / "run")
    (found,) = teacher_warnings(run, [str(tmp_path)], 90.0)
    assert "was trained on images that the student is evaluated on" in found


def test_whether_a_file_saw_the_images_that_are_held_out_cannot_be_told(tiny, tmp_path):
    run = planned(tiny("method=kd", "teacher.checkpoint=t.pth", "data.held_out=.2"), tmp_path)
    (line,) = teacher_warnings(run, ["t.pth"], 90.0)
    assert line == "t.pth may have been trained on the images that data.held_out=0.2 holds out"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["optim.schedule=step", "optim.decay_epochs=(1,3,5)", "epochs=3"],
            "optim.decay_epochs has 3, 5, which a run of 3",
        ),
        (
            ["method=dkd", "teacher.checkpoint=t", "epochs=3"],
            "kd_warmup_epochs=20 is not less than the 3 epochs of the",
        ),
        (
            ["method=kd", "teacher.checkpoint=t", "loss_schedule.temperature=linear:4@1:2@20", "epochs=3"],
            "loss_schedule.temperature ends at epoch 20, and the run has 3",
        ),
        (
            ["method=sld", "teacher.checkpoint=t", "loss.sld.student_swap_epoch=3", "epochs=3"],
            "loss.sld.student_swap_epoch=3 is not less than the 3 epochs of the run: the student's swapped target is",
        ),
    ],
)
def test_a_recipe_that_is_longer_than_the_run_is_a_warning(tiny, tmp_path, flags, expected):
    (line,) = warnings(planned(tiny(*flags), tmp_path))
    assert line.startswith(expected)
    enough = [flag.replace("epochs=3", "epochs=30") for flag in flags]
    assert not list(warnings(planned(tiny(*enough), tmp_path)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["data.eval_split=train"], True),
        (["data.eval_split=train", "data.held_out=.4"], False),
        (["data.eval_split=val"], False),
    ],
)
def test_an_evaluation_on_the_training_images_is_said(on_folder, tmp_path, flags, said):
    found = list(warnings(planned(on_folder(*flags), tmp_path)))
    assert any(line.startswith("the student is evaluated on images that it is trained on") for line in found) == said


@pytest.mark.parametrize("flags", [["data.fraction=.1"], ["data.held_out=.9", "data.cache_mb=0"]])
def test_a_class_that_is_left_without_training_images_is_said(on_folder, folder, tmp_path, flags):
    for image in sorted((folder / "train/dog").iterdir())[:4]:
        image.unlink()
    assert not [line for line in warnings(planned(on_folder(), tmp_path)) if "no image to train on" in line]
    found = list(warnings(planned(on_folder(*flags), tmp_path)))
    assert "1 of 3 classes have no image to train on: dog" in found


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["optim.name=adam"], []),  # the default of weight_decay counts as not set
        (
            ["optim.name=adam", "optim.weight_decay=.3"],
            ["optim.weight_decay=0.3 has no effect: adam does not take it. Unset it"],
        ),
        (["optim.name=adamw", "optim.weight_decay=.3", "optim.momentum=.5"], []),
        (
            ["ema_decay=.9", "epochs=3"],
            [
                "ema_decay=0.9 averages over more steps than the run's 9: 39 % of the evaluated average are the "
                "initial weights. Lower it"
            ],
        ),
        (["ema_decay=.7", "epochs=3"], []),
    ],
)
def test_an_optimizer_or_average_that_does_not_do_what_was_asked_is_warned_of(tiny, tmp_path, flags, expected):
    assert list(warnings(planned(tiny(*flags), tmp_path / "run"))) == expected


def test_a_student_that_goes_on_with_images_fed_otherwise_is_warned_of(tiny, tmp_path):
    trainer.train(tiny("data.mean=.2", "data.std=.1", "epochs=1"), tmp_path / "first")
    flags = [f"student.checkpoint={tmp_path / 'first'}", "data.std=.1"]
    (warning,) = warnings(planned(tiny(*flags, "data.mean=.3"), tmp_path / "next"))
    assert warning == (
        f"student.checkpoint={tmp_path / 'first'} was trained with data.mean=[0.2], and goes on with [0.3]: set "
        "data.mean as there"
    )
    assert list(warnings(planned(tiny(*flags, "data.mean=.2"), tmp_path / "next"))) == []


@pytest.mark.parametrize(
    ("train", "evaluation", "said"),
    [
        ("train[:90%]", "train[50%:]", True),
        ("train[:50%]", "train[:718]", True),
        ("train+test", "test", True),
        ("train", "train+test", True),
        ("all", "test", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:9]+test[:5]", "train[9:20]+test[5:]", False),
    ],
)
def test_ranges_of_a_dataset_that_overlap_are_said(tiny, tmp_path, train, evaluation, said):
    flags = [f"data.train_split={train}", f"data.eval_split={evaluation}"]
    found = list(warnings(planned(tiny(*flags), tmp_path)))
    assert any(line.startswith("the student is evaluated on images that it is trained on") for line in found) == said

"""The real CIFAR-100, read as TFDS prepares it, and an epoch's beginning on it."""

import json

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.data.sources import open_source
from ldrld_jax.runtime.signals import Signals
from ldrld_jax.train import trainer
from tests.conftest import SHARED, run_main


def test_the_published_statistics_and_counts(cifar100_dir):
    for split, examples in (("train", 50_000), ("test", 10_000)):
        source = open_source("cifar100", split, cifar100_dir)
        assert (len(source), source.image_shape, len(source.class_names)) == (examples, (32, 32, 3), 100)
        images, labels = source.read(np.arange(examples))
        assert np.bincount(labels).tolist() == [examples // 100] * 100
        if split == "train":
            scaled = images.reshape(-1, 3) / 255
            # The published constants, .4867 and .4408 among them, are up to 1.6e-4 off the images' own means.
            np.testing.assert_allclose(scaled.mean(axis=0), [0.5071, 0.4867, 0.4408], atol=2e-4)
            np.testing.assert_allclose(scaled.mean(axis=0), [0.507075, 0.486549, 0.440918], atol=1e-6)
            np.testing.assert_allclose(scaled.std(axis=0), [0.2675, 0.2565, 0.2761], atol=2e-4)


def test_the_cifar100_config_trains_on_the_real_images(cifar100_dir, tmp_path):
    """A teacher and a student epoch on 320 of the images through the command line."""
    overrides = [f"data.data_dir={cifar100_dir}", "data.train_split=train[:320]", "data.eval_split=test[:200]"]
    overrides += ["epochs=1", "teacher.epochs=1", "log.every_steps=1", "mesh.data=1"]
    flags = [f"--config.{override}" for override in overrides]
    done = run_main("--config", "configs/cifar100.py:resnet20-resnet8", "--workdir", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["teacher"], summary["student"]) == (5, "resnet20", "resnet8")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["values"]["ce"] for line in lines if line["split"] == "train"]
    assert all(3 < loss < 8 for loss in losses)  # log(100) = 4.6 at chance


def test_the_pytorch_teacher_scores_what_it_scored_there(cifar100_dir, tmp_path):
    """56.93 % of the 10,000 test images in evaluation mode, through our pipeline, before it teaches."""
    pytest.importorskip("torch", reason="a .pth file needs the torch extra")
    teacher = SHARED / "teachers" / "resnet20_cifar100.pth"
    if not teacher.exists():
        pytest.skip(f"there is no {teacher.name} in {teacher.parent}")
    overrides = [f"data.data_dir={cifar100_dir}", f"teacher.checkpoint={teacher}", "teacher.min_top1=56."]
    config = config_lib.resolve(config_lib.load("configs/cifar100.py:resnet20-resnet8", [*overrides, "mesh.data=1"]))
    run = trainer.Run.plan(config, tmp_path)
    teacher = trainer.obtain_teacher(run, student=None, signals=Signals(), train=trainer.train)
    assert abs(teacher.top1 - 56.93) < 0.02

"""Runs whose folders, teachers, logits and data lie in a bucket; tests/object_store.py stands for it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from PIL import Image

from ldrld_jax import Trainer, main
from ldrld_jax import config as config_lib
from ldrld_jax.data.archives import load_arrays
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError
from ldrld_jax.interop.host_teacher import LogitsFile
from ldrld_jax.report import cache, collect
from ldrld_jax.train import trainer
from ldrld_jax.train.folder import _digest
from tests.conftest import comparable_lines


def test_a_run_in_a_bucket_is_that_of_a_disk_and_is_resumed_evaluated_and_exported(
    tiny, bucket, tmp_path, monkeypatch, data_dir
):
    trainer.train(tiny("checkpoint.min_seconds=0."), tmp_path / "local")
    monkeypatch.chdir(tmp_path)
    config, run = tiny("checkpoint.min_seconds=0."), "gs://bucket/run"
    trainer.train(config, run)
    last = max((bucket / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (last / "commit_success.txt").unlink()  # the machine was lost while it wrote the last checkpoint
    (bucket / "run" / "summary.json").unlink()
    trainer.train(config, run)
    assert comparable_lines(bucket / "run") == comparable_lines(tmp_path / "local")
    assert trainer.evaluate(config, run)["top1"] == trainer.evaluate(config, tmp_path / "local")["top1"]
    assert [found.folder for found in collect("gs://bucket").summaries] == [run]
    assert main.main(["--mode", "export", "--workdir", run]) == 0
    assert "student.stablehlo" in [path.name for path in (bucket / "run" / "export").iterdir()]
    teacher = trainer.train(tiny("method=kd", f"teacher.checkpoint={run}", "epochs=1"), "gs://bucket/other")
    assert teacher["steps"] == 3
    assert not (tmp_path / "gs:").exists()


def test_a_teacher_and_images_in_a_bucket_are_given_by_their_paths(bucket, teacher_dir):
    config = (epath.Path(teacher_dir) / "config.json").read_text()
    (bucket / "teacher").mkdir(parents=True)
    (bucket / "teacher" / "config.json").write_text(config)
    for split in ("train", "val"):
        (bucket / "images" / split / "a").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(bucket / "images" / split / "a" / "1.png")
    made = Trainer(student="resnet8", teacher="gs://bucket/teacher", train="gs://bucket/images").config
    assert (made.teacher.model, made.teacher.checkpoint) == ("tiny_net", "gs://bucket/teacher")
    assert (made.data.name, made.data.data_dir) == ("image_folder", "gs://bucket/images")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["logits.npy", "logits.safetensors"])
def test_a_file_of_logits_on_a_disk_and_in_a_bucket_is_read(bucket, rng, name, dtype):
    logits = rng.normal(size=(3, 2)).astype(jnp.dtype(dtype))
    bucket.mkdir(parents=True)
    if name.endswith(".npy"):
        np.save(bucket / name, logits)
    else:
        safetensors.numpy.save_file({"logits": logits}, bucket / name)
    for path in (f"gs://bucket/{name}", str(bucket / name)):
        np.testing.assert_array_equal(LogitsFile.open(path, images=3, classes=2).read(0), logits)


def test_a_zarr_array_in_a_bucket_has_the_digest_of_its_copy_on_a_disk(bucket):
    (bucket / "logits.zarr" / "c" / "0").mkdir(parents=True)
    for name in ("zarr.json", "c/0/0", "c.txt"):
        (bucket / "logits.zarr" / name).write_text(name)
    assert _digest("gs://bucket/logits.zarr") == _digest(str(bucket / "logits.zarr"))


def test_an_archive_of_arrays_in_a_bucket_is_read(bucket):
    bucket.mkdir(parents=True)
    np.savez(bucket / "data.npz", x_train=np.zeros((2, 5, 5, 1), np.uint8), y_train=[0, 1])
    assert len(load_arrays("gs://bucket/data.npz", "train")) == 2


def test_an_analysis_of_a_run_in_a_bucket_is_found_from_any_folder(bucket, tmp_path, monkeypatch):
    places = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        places.append(cache._places("gs://bucket/run", epath.Path("out")))
    assert places[0] == places[1]


def test_what_a_trained_teacher_in_a_bucket_leaves_unread_is_named(bucket):
    (bucket / "teacher").mkdir(parents=True)
    (bucket / "teacher" / "config.json").write_text(json.dumps({}))
    flags = ["teacher.data.image_size=9", "teacher.checkpoint=gs://bucket/teacher"]
    (line,) = (line for line in config_lib.remarks(config_lib.load("configs/digits.py", flags)) if "image_size" in line)
    assert "because teacher.checkpoint names a trained teacher" in line


def test_records_of_tfds_in_a_bucket_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"records of TFDS are read from a local disk, got data.data_dir=gs://bucket/d"):
        open_source("digits", "train", "gs://bucket/data")

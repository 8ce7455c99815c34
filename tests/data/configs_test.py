"""The configs for data of one's own, through the command line, on small data in the real formats."""

import json

import pytest

from ldrld_jax import main as main_lib
from tests.data.images import make_image_folder, make_imagenet, make_tiny_imagenet

# Two steps of two images on one device, evaluated on the rest: as small as these networks get.
SMALL = ["epochs=1", "batch_size=2", "eval_batch_size=4", "mesh.data=1", "log.every_steps=1", "log.tensorboard=False"]


def run(config, data_dir, workdir, *overrides):
    flags = [f"--config.{override}" for override in [*SMALL, f"data.data_dir={data_dir}", *overrides]]
    assert main_lib.main(["--config", config, "--workdir", str(workdir), *flags]) == 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return json.loads((workdir / "summary.json").read_text()), [x["values"] for x in lines if x["split"] == "train"]


def test_imagenet_distils_at_224_px(tmp_path):
    make_imagenet(tmp_path, 4)
    pair = "configs/imagenet.py:imagenet_resnet18-imagenet_resnet18"
    summary, train = run(pair, tmp_path, tmp_path / "run", "teacher.epochs=1", "teacher.min_top1=0.")
    assert (summary["steps"], summary["method"], len(train)) == (2, "ldrld", 2)
    assert 5 < train[0]["ce"] < 10  # log(1000) = 6.9 at chance
    assert train[0]["ldrld"] > 0


@pytest.mark.parametrize("config", ["tiny_imagenet", "image_folder"])
def test_folders_train(config, tmp_path):
    make = {"tiny_imagenet": make_tiny_imagenet, "image_folder": make_image_folder}[config]
    make(tmp_path / "data", each=2)
    overrides = ["method=ce", "student.model=resnet8", "batch_size=3"]
    if config == "image_folder":  # smaller than its 224 px, and images of many sizes
        overrides += ["data.crop_size=32", "data.resize_size=36", "batch_size=2"]
    summary, train = run(f"configs/{config}.py", tmp_path / "data", tmp_path / "run", *overrides)
    assert (summary["steps"], len(train)) == (2, 2)

"""A folder of images in three classes, and runs on it."""

import pathlib

import numpy as np
import pytest
from PIL import Image

CLASSES = ("bird", "cat", "dog")


def make_folder(root: pathlib.Path, *, train: int = 8, val: int = 3, suffix: str = ".png") -> pathlib.Path:
    """Images of three classes that differ in brightness."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for split, count in (("train", train), ("val", val)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(80 * label, 80 * label + 60, (9, 9, 3), np.uint8))
                image.save(root / split / name / f"{i}{suffix}", format="JPEG" if suffix == ".jfif" else None)
    return root


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    return make_folder(tmp_path / "images")


@pytest.fixture
def on_folder(tiny, folder):
    """`on_folder(*overrides)`: a plain run of two epochs on the folder."""
    flags = ["data.name=image_folder", f"data.data_dir={folder}", "data.train_split=train", "data.eval_split=val"]
    return lambda *overrides: tiny(*flags, "data.crop_size=8", "batch_size=8", "mesh.data=1", *overrides)

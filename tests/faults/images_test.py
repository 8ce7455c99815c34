"""Images that are broken, left out, or seen twice."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from ldrld_jax.data.decode import BrokenImageError, open_image, pixels
from ldrld_jax.data.folders import open_folder
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.views import CentreCrop
from ldrld_jax.errors import UserError
from ldrld_jax.train import trainer
from tests.faults.conftest import make_folder


def test_nothing_but_broken_images_is_an_error_and_so_is_a_large_share(on_folder, folder, tmp_path):
    for path in (folder / "train").rglob("*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"images are broken, the last of them .*a share of 0\.05 may be"):
        trainer.train(on_folder("data.on_error=skip"), tmp_path / "run")
    with pytest.raises(UserError, match="24 of 24 images are broken"):
        trainer.train(on_folder("data.on_error=skip", "data.max_skipped=1."), tmp_path / "run")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_image_shows_before_the_first_step(on_folder, folder, tmp_path, split):
    (folder / split / "dog/2.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=rf"{split}/dog/2\.png is broken"):
        trainer.train(on_folder(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_fails_leaves_the_step_before_it_saved(on_folder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ldrld_jax.train.plan.Run.look", lambda run: None)
    (folder / "val/dog/2.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"val/dog/2\.png is broken"):
        trainer.train(on_folder("data.cache_mb=0"), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("[0-9]*")] == ["3"]


@pytest.mark.parametrize("suffix", [".pgm", ".jfif", ".ppm", ".PNG"])
def test_an_image_is_seen_whatever_the_suffix_of_its_format(tmp_path, suffix):
    if suffix == ".pgm":
        make_folder(tmp_path / "images")
        for path in sorted((tmp_path / "images").rglob("*.png")):
            Image.open(path).convert("L").save(path.with_suffix(".pgm"))
            path.unlink()
    else:
        make_folder(tmp_path / "images", suffix=suffix)
    source = open_source("image_folder", "train", str(tmp_path / "images"))
    assert len(source) == 24


def test_a_link_to_a_folder_above_is_not_followed_and_another_file_is_named(folder, caplog):
    (folder / "train/cat/again").symlink_to(folder / "train/cat")
    (folder / "train/cat/up").symlink_to(folder / "train")
    (folder / "train/dog/notes.txt").write_text("x")
    (folder / "train/dog/Thumbs.db").write_text("x")
    (folder / "train/bird/elsewhere").symlink_to(folder / "val/bird")
    records, _, _ = open_folder("image_folder", "train", str(folder))
    assert len(records) == 24 + 3
    (warning,) = caplog.messages
    assert "2 files in" in warning and "train/dog/Thumbs.db for example" in warning


@pytest.mark.parametrize("size", [(10_000, 2), (2, 10_000), (65_000, 3), (400, 2)])
def test_a_thin_image_costs_what_its_crop_does(size):
    buffer = io.BytesIO()
    rows = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    Image.fromarray(rows).save(buffer, "png")
    crop = CentreCrop(resize=20, size=16, channels=1)(buffer.getvalue())
    assert crop.shape == (16, 16, 1)
    middle = rows[rows.shape[0] // 2, rows.shape[1] // 2]
    assert abs(int(crop[8, 8, 0]) - int(middle)) <= 64


@pytest.mark.parametrize(
    "kind", [AssertionError, TypeError, KeyError, ZeroDivisionError], ids=lambda kind: kind.__name__
)
def test_whatever_a_decoder_raises_is_a_broken_image(monkeypatch, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "png")

    def broken(*args, **kwargs):
        raise kind("of the decoder")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    with pytest.raises(BrokenImageError):
        pixels(open_image(buffer.getvalue()), channels=3, exif=True)
    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(BrokenImageError):
        open_image(buffer.getvalue())


TINY_IMAGENET = {
    "tabs": (b"n1\tcat, tabby\nn2\tdog\n", b"a.png\tn1\t0\t0\t1\t1\nb.png\tn2\t0\t0\t1\t1\n"),
    "spaces": (b"n1 cat, tabby\nn2 dog\n", b"a.png n1 0 0 1 1\nb.png n2 0 0 1 1\n"),
    "blank lines": (b"n1\tcat, tabby\n\nn2\tdog\n\n", b"\na.png\tn1\t0\n\nb.png\tn2\t0\n\n"),
    "latin-1": (b"n1\tcat, tabby\nn2\tdog\nn3\tb\xeate\n", b"a.png\tn1\nb.png\tn2\r\n"),
}


@pytest.mark.parametrize("form", [*TINY_IMAGENET, "sorted"])
def test_tiny_imagenets_lists_are_read_in_every_form(tmp_path, form):
    words, annotations = TINY_IMAGENET.get(form, TINY_IMAGENET["tabs"])
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    (tmp_path / "words.txt").write_bytes(words)
    for place in ("train/n1/images", "train/n2/images", "val/images"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "val/val_annotations.txt").write_bytes(annotations)
    names = ("n1/images/a.png", "n2/images/b.png") if form == "sorted" else ("images/a.png", "images/b.png")
    for name in names:
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "val" / name)
    records, classes, _ = open_folder("tiny_imagenet", "val", str(tmp_path))
    assert classes == ("cat, tabby", "dog")
    assert [(pathlib.Path(path).name, label) for path, label in zip(records.paths, records.targets, strict=True)] == [
        ("a.png", 0),
        ("b.png", 1),
    ]

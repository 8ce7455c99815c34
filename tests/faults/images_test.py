"""Images that are broken, left out, or seen twice."""

import io
import pathlib
import struct
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageCms

from ldrld_jax.data import tfds_records
from ldrld_jax.data.decode import BrokenImageError, open_image, pixels
from ldrld_jax.data.folders import open_folder
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.views import CentreCrop
from ldrld_jax.deploy.predict import find
from ldrld_jax.errors import UserError
from ldrld_jax.train import trainer
from tests.faults.conftest import make_folder


def test_nothing_but_broken_images_is_an_error_and_so_is_a_large_share(on_folder, folder, tmp_path):
    for path in (folder / "train").rglob("*.png"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        UserError, match=r"images are broken, the last of them .*more than data\.max_skipped=0\.05 allows"
    ):
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
    monkeypatch.setattr("ldrld_jax.train.plan.Run.read_samples", lambda run: None)
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


@pytest.mark.parametrize(
    ("torn", "content", "why"),
    [
        ("words.txt", b"n1\tcat, tabby\nn2\n", "its line 'n2' lacks the words of a class"),
        ("val/val_annotations.txt", b"a.png\tn1\t0\nb.pn", "its line 'b.pn' lacks the class of an image"),
    ],
)
def test_a_torn_list_of_tiny_imagenet_is_one_line_that_names_it(tmp_path, torn, content, why):
    (tmp_path / "wnids.txt").write_text("n2\nn1\n")
    (tmp_path / "words.txt").write_bytes(TINY_IMAGENET["tabs"][0])
    (tmp_path / "val").mkdir()
    (tmp_path / "val/val_annotations.txt").write_bytes(TINY_IMAGENET["tabs"][1])
    (tmp_path / torn).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_folder("tiny_imagenet", "val", str(tmp_path))
    assert str(error.value) == f"{tmp_path / torn} is torn: {why}. Get the dataset again."


def test_a_list_of_tiny_imagenets_classes_that_is_no_text_names_what_it_leads_to(tmp_path):
    (tmp_path / "wnids.txt").write_bytes(b"n1\n\xff/2\n")
    with pytest.raises(UserError) as error:
        open_folder("tiny_imagenet", "train", str(tmp_path))
    place = tmp_path / "wnids.txt"
    assert str(error.value) == f"{place} names '\xff/2', which leads out of the dataset. Get the dataset again."


def twelve_bit_tiff(rows: list[list[int]]) -> bytes:
    """A grey TIFF of 12 bits a pixel, two pixels in three bytes."""
    height, width = len(rows), len(rows[0])
    pairs = [(row[i], row[i + 1]) for row in rows for i in range(0, width, 2)]
    pixels = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    return head + pixels + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def test_twelve_bits_of_grey_are_as_bright_as_eight(tmp_path):
    image = pixels(open_image(twelve_bit_tiff([[0, 4095], [2048, 1024]])), channels=1, exif=True)
    assert np.asarray(image).tolist() == [[0, 255], [128, 64]]


def test_lab_is_read_as_the_colours_that_it_holds():
    buffer = io.BytesIO()
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    ImageCms.applyTransform(Image.new("RGB", (2, 2), (200, 90, 30)), to_lab).save(buffer, "tiff")
    seen = pixels(open_image(buffer.getvalue()), channels=3, exif=True).getpixel((0, 0))
    assert np.abs(np.subtract(seen, (200, 90, 30))).max() <= 3


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.png", ["0.png", "a/1.png", "a/b/2.png"]),
        ("*/*.png", ["a/1.png"]),
        ("a/[bc]/?.png", ["a/b/2.png"]),
        ("a/*", ["a/1.png"]),
        ("[0].png", ["[0].png"]),
    ],
)
def test_a_pattern_may_name_folders_and_a_file_may_look_like_a_pattern(tmp_path, monkeypatch, pattern, names):
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("0.png", "a/1.png", "a/b/2.png", *([pattern] if pattern == "[0].png" else [])):
        (tmp_path / name).write_bytes(b"")
    assert [path.removeprefix(f"{tmp_path}/") for path in find([str(tmp_path / pattern)])] == names
    monkeypatch.chdir(tmp_path)
    assert find([pattern]) == names


@pytest.mark.parametrize(
    ("image", "label", "expected"),
    [
        (tfds.features.Image(), tfds.features.Scalar(np.int64), r"label \(Scalar\)"),
        (tfds.features.Image(), tfds.features.Text(), r"label \(Text\)"),
        (tfds.features.Text(), tfds.features.ClassLabel(num_classes=2), r"image \(Text\)"),
        (
            tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8),
            tfds.features.ClassLabel(num_classes=2),
            r"image \(Tensor\)",
        ),
        (tfds.features.Image(), tfds.features.ClassLabel(), "how many classes"),
    ],
)
def test_a_data_set_of_other_features_is_one_line_that_lists_them(monkeypatch, image, label, expected):
    features = tfds.features.FeaturesDict({"image": image, "label": label})
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
    monkeypatch.setattr(tfds_records, "_builder", lambda name, data_dir: builder)
    with pytest.raises(UserError, match=rf"dataset some .*{expected}"):
        tfds_records.make_builder("some", None)
    builder.info.features = tfds.features.Tensor(shape=(), dtype=np.int64)
    with pytest.raises(UserError, match="dataset some has Tensor"):
        tfds_records.make_builder("some", None)

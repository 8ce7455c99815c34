"""Decoded images: written from any source, read like any other, and refused where they are not as written."""

import errno
import json
import shutil

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data import decoding as decoding_lib
from ldrld_jax.data.decoding import Decoding
from ldrld_jax.data.given import as_source
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import fingerprint
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError

SIDE = 80  # all images are larger


def block(folder, **changes):
    data = config_lib.load("configs/image_folder.py").data
    data.update(data_dir=str(folder), augment="random_resized_crop", crop_size=64, resize_size=SIDE, threads=2)
    data.crop_area = (0.08, 0.3)  # a larger crop would be decoded at half its size
    data.update(changes)
    return data


def write(data, to, **options):
    return list(Decoding(data, str(to), **options).write())


def from_decoded(place, **changes):
    return block(place, name="decoded", **changes)


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("decoded")
    assert write(block(folder), path)[-1] == 24
    return path


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place, tmp_path / "copy")


def test_an_evaluation_sees_the_same_bits_as_from_the_files(folder, place):
    files, decoded = (make_eval_source(data) for data in (block(folder), from_decoded(place)))
    for ours, theirs in zip(decoded.read(np.arange(12)), files.read(np.arange(12)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert decoded.class_names == files.class_names == ("ant", "bee", "cat")


def test_images_that_are_no_larger_are_kept_whole_and_so_are_their_crops(folder, tmp_path):
    write(block(folder), tmp_path, short_side=1000)
    files, decoded = (
        make_train_batches(data, batch_size=4, seed=3, views=2) for data in (block(folder), from_decoded(tmp_path))
    )
    for key, value in files[5].items():
        np.testing.assert_array_equal(decoded[5][key], value)


def test_crops_are_close_to_those_from_the_files(folder, place):
    """The same part of the image, resized twice."""
    blocks = (block(folder), from_decoded(place))
    files, decoded = (make_train_batches(data, batch_size=12, seed=0)[0]["image"].astype(int) for data in blocks)
    difference = np.abs(files - decoded).mean()
    assert 0 < difference < np.abs(files - decoded[::-1]).mean() / 10  # of images in another order


def test_batches_are_a_function_of_the_step_for_every_host_and_worker(place):
    whole = make_train_batches(from_decoded(place), batch_size=4, seed=1)
    halves = [make_train_batches(from_decoded(place), batch_size=4, seed=1, host=h, hosts=2) for h in (0, 1)]
    parts = [half[4]["image"] for half in halves]
    np.testing.assert_array_equal(np.concatenate(parts), whole[4]["image"])
    workers = whole.iterate(4, workers=1)
    np.testing.assert_array_equal(next(workers)["image"], whole[4]["image"])


def test_jpegs_are_smaller_and_close_to_the_pixels(folder, place, tmp_path):
    write(block(folder), tmp_path, quality=95)
    sizes = [(path / "train" / "images.bin").stat().st_size for path in (tmp_path, place)]
    assert sizes[0] < sizes[1] / 3
    pixels, jpegs = (
        make_eval_source(from_decoded(path)).read(np.arange(12))[0].astype(int) for path in (place, tmp_path)
    )
    assert 0 < np.abs(pixels - jpegs).mean() < 3


def test_images_of_one_size_need_no_crop_and_grey_stays_grey(tmp_path):
    pixels = np.arange(2 * 6 * 5, dtype=np.uint8).reshape(2, 6, 5, 1)
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=[0, 1])
    data = block(None, name=f"arrays:{tmp_path / 'data.npz'}", held_out=0.5)
    write(data, tmp_path / "decoded")
    source = open_source("decoded", "train", str(tmp_path / "decoded"))
    assert source.image_shape == (6, 5, 1)
    np.testing.assert_array_equal(source.read(np.arange(2))[0], pixels)


def test_a_writer_that_is_killed_leaves_nothing_that_passes_for_whole_and_the_next_goes_on(
    folder, place, tmp_path, monkeypatch
):
    monkeypatch.setattr(decoding_lib, "_SPAN", 5)
    writing = Decoding(block(folder), str(tmp_path)).write()
    assert [next(writing), next(writing)] == [5, 10]
    writing.close()
    with pytest.raises(UserError, match=r"^\S+train is unfinished: 10 of 12 images\. Repeat .* them: it continues\.$"):
        open_source("decoded", "train", str(tmp_path))
    with (tmp_path / "train" / "images.bin").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)  # a row whose image did not reach the disk
    with (tmp_path / "train" / "index.bin").open("ab") as file:
        file.write(b"torn")
    decoding = Decoding(block(folder), str(tmp_path))
    assert decoding.done == 9
    assert "24 images, 9 of them already there; about " in decoding.describe()
    assert list(decoding.write())[-1] == 24
    shutil.rmtree(tmp_path / "val")
    writing = Decoding(block(folder), str(tmp_path)).write()
    monkeypatch.setattr(decoding_lib, "appending", lambda *args: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        next(writing)  # before there is a file of images
    monkeypatch.undo()
    assert write(block(folder), tmp_path)[-1] == 24
    for split in ("train", "val"):
        for name in ("images.bin", "index.bin"):
            assert (tmp_path / split / name).read_bytes() == (place / split / name).read_bytes()
    assert write(block(folder), tmp_path) == []  # finished already
    manifest = tmp_path / "val" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"index": None}))  # killed just before that
    assert write(block(folder), tmp_path) == []
    assert manifest.read_bytes() == (place / "val" / "manifest.json").read_bytes()


def test_a_broken_image_stops_the_writer_or_is_skipped_by_it_and_by_its_readers(folder, tmp_path, caplog):
    files = shutil.copytree(folder, tmp_path / "files")
    (files / "train" / "bee" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bee/1\.jpg is broken.*or set data\.on_error=skip"):
        write(block(files), tmp_path / "decoded")
    write(block(files, on_error="skip"), tmp_path / "decoded")
    data = from_decoded(tmp_path / "decoded", held_out=0.0)
    with pytest.raises(UserError, match=r"image 5 of \S+train is broken: not an image \(0 bytes\)"):
        make_train_batches(data, batch_size=12, seed=0)[0]
    data.on_error = "skip"
    assert make_train_batches(data, batch_size=12, seed=0)[0]["mask"].sum() == 11


def test_a_changed_byte_is_found_at_the_first_read(copy):
    path = copy / "val" / "images.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    source = make_eval_source(from_decoded(copy))
    source.read(np.arange(11))
    with pytest.raises(UserError, match=r"images in \S+val are damaged: image 11 has changed\. Delete this folder"):
        source.read(np.array([11]))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("images.bin", lambda content: content[:-7], r"images\.bin has [\d,]+ bytes, and [\d,]+ were written"),
        ("images.bin", None, "No such file"),
        ("index.bin", lambda content: content[:-40], r"index\.bin is not as it was written"),
        ("index.bin", lambda content: bytes([content[0] ^ 1]) + content[1:], r"index\.bin is not as it was written"),
        ("manifest.json", lambda content: content[:-9], "is truncated or not JSON"),
        (
            "manifest.json",
            lambda content: content.replace(b'"format": 1', b'"format": 2'),
            "of format 2, and .* reads 1",
        ),
        ("manifest.json", lambda content: b'{"format": 1}', r"manifest\.json lacks channels, class_names"),
        ("manifest.json", None, r"has no decoded images of the split train; it has val\. Write one: ldrld-jax decode"),
    ],
)
def test_a_folder_that_is_not_as_written_is_refused(copy, name, change, expected):
    path = copy / "train" / name
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(content))
    with pytest.raises(UserError, match=expected):
        open_source("decoded", "train", str(copy))


def test_the_images_fingerprint_is_that_of_their_content(folder, place, tmp_path):
    write(block(folder), tmp_path)
    first, second = (fingerprint(open_source("decoded", "train", str(path))) for path in (place, tmp_path))
    assert first == second
    files = fingerprint(open_source("image_folder", "train", str(folder)))
    assert first["original"] == files["digest"] != first["digest"]
    write(from_decoded(place), tmp_path / "again", short_side=40)
    assert fingerprint(open_source("decoded", "train", str(tmp_path / "again")))["original"] == files["digest"]
    write(block(folder), tmp_path / "smaller", short_side=40)
    assert fingerprint(open_source("decoded", "train", str(tmp_path / "smaller"))) != first


def test_a_folder_of_anything_else_is_not_written_to(folder, copy, tmp_path):
    np.savez(tmp_path / "four.npz", x_train=np.zeros((2, 5, 5, 4), np.uint8), y_train=[0, 1])
    for data, to, options, expected in [
        (block(folder), copy, {"short_side": 40}, r"holds other decoded images: short_side \(80 there, 40 here\)"),
        (block(folder), folder, {}, "train holds other files. Choose another folder"),
        (block(folder), "gs://bucket", {}, "from a local disk"),
        (block(None, name=f"arrays:{tmp_path / 'four.npz'}"), tmp_path / "new", {}, "only images of 1 or 3 channels"),
        (block(folder), tmp_path / "new", {"quality": 101}, "--quality must be between 1 and 100, got 101"),
    ]:
        with pytest.raises(UserError, match=expected):
            Decoding(data, str(to), **options)
    (copy / "val" / "images.bin").write_bytes(b"")
    with pytest.raises(UserError, match="cannot mmap an empty file"):
        Decoding(block(folder), str(copy))


def test_a_full_disk_is_one_line_and_what_was_written_stays(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding_lib, "free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"images take about [\d.]+ kB, and 1\.0 kB are free in .*--quality 95"):
        Decoding(block(folder), str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(decoding_lib, "_SPAN", 5)
    argv = ["--mode", "decode", "--config", "configs/image_folder.py", "--decoded", str(tmp_path)]
    argv += [f"--config.data.data_dir={folder}", "--short_side=80"]
    flush, calls = decoding_lib.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 5:  # the manifest's, the first span's two, the second's
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(decoding_lib.os, "fsync", full)
    assert main_lib.main(argv) == 2
    message = "no space left; the images written stay, and the same command goes on"
    assert capsys.readouterr().err == f"ldrld_jax: {message}: {tmp_path}/train\n"
    monkeypatch.undo()
    assert main_lib.main(argv) == 0
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith(f"{tmp_path}: 24 images, ")
    assert after == f"done. To read them: --config.data.name=decoded --config.data.data_dir={tmp_path}"
    assert json.loads((tmp_path / "train" / "manifest.json").read_text())["short_side"] == 80


def test_the_command_needs_a_folder(capsys):
    assert main_lib.main(["--mode", "decode"]) == 2
    assert "decode needs a folder to write to: --decoded DIR." in capsys.readouterr().err


def test_images_that_were_turned_otherwise_are_refused(place):
    turned = "were decoded with data.exif=True, and the run has data.exif=False. Set data.exif=True"
    with pytest.raises(UserError, match=turned):
        make_eval_source(from_decoded(place, exif=False))
    with pytest.raises(UserError, match=turned):
        make_train_batches(from_decoded(place, exif=False), batch_size=4, seed=3)


def test_images_that_differ_each_time_are_not_decoded(tmp_path, rng, monkeypatch):
    class Random:
        num_classes = 2

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return rng.integers(0, 256, (8, 8, 3), np.uint8), i % 2

    monkeypatch.setattr("ldrld_jax.data.decoding.open_source", lambda *arguments, **options: as_source(Random()))
    with pytest.raises(UserError, match="its images differ each time they are read, and one draw would be kept"):
        Decoding(config_lib.default().data, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()

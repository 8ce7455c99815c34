"""Broken images in a run: named and fatal, or skipped, masked and counted; never a silent wrong tensor."""

import itertools

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax import main as main_lib
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.data.source import fingerprint
from ldrld_jax.data.speed import measure
from ldrld_jax.data.stream import eval_batches
from ldrld_jax.errors import UserError
from tests.data.images import make_image_folder


@pytest.fixture
def folder(tmp_path):
    """Six training images, the second cat truncated; a val image of dogs is no image at all."""
    make_image_folder(tmp_path)
    cat = tmp_path / "train" / "cat" / "1.jpg"
    cat.write_bytes(cat.read_bytes()[:900])
    (tmp_path / "val" / "dog" / "0.jpg").write_bytes(b"a login page")
    return tmp_path


def block(folder, **changes):
    data = config_lib.load("configs/image_folder.py").data
    data.update(data_dir=str(folder), crop_size=16, resize_size=18, **changes)
    return data


def test_the_error_names_the_file_through_the_loaders_threads(folder):
    batches = make_train_batches(block(folder), batch_size=6, seed=0)
    with pytest.raises(UserError, match=r"train/cat/1\.jpg is broken: .*truncated.* or set data\.on_error=skip"):
        next(batches.iterate())
    with pytest.raises(UserError, match=r"val/dog/0\.jpg is broken: not an image \(12 bytes\)"):
        list(eval_batches(make_eval_source(block(folder)), 4))


def test_skipped_images_are_masked_counted_and_named_once(folder, caplog):
    batches = make_train_batches(block(folder, on_error="skip"), batch_size=4, seed=0)
    epochs = list(itertools.islice(batches.iterate(), 4))
    assert [len(batch["mask"]) for batch in epochs] == [4] * 4
    assert sum(int(batch["mask"].sum()) for batch in epochs) == 10  # twice five of six
    for batch in epochs:
        assert not batch["image"][~batch["mask"]].any()
        assert batch["image"][batch["mask"]].any(axis=(1, 2, 3)).all()
    assert caplog.text.count("train/cat/1.jpg: image file is truncated") == 1
    assert "(1 skipped so far)" in caplog.text
    evaluation = list(eval_batches(make_eval_source(block(folder, on_error="skip")), 4))
    assert sum(int(batch["mask"].sum()) for batch in evaluation) == 5


def test_hosts_agree_on_the_mask_whoever_has_the_broken_image(folder):
    options = dict(batch_size=4, seed=0)
    whole = make_train_batches(block(folder, on_error="skip"), **options)
    halves = [make_train_batches(block(folder, on_error="skip"), **options, host=h, hosts=2) for h in (0, 1)]
    for step in range(4):
        parts = [half[step] for half in halves]
        for key, value in whole[step].items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), value)


def test_a_missing_image_is_broken_and_the_list_is_another_one_once_it_is_there(folder, caplog):
    cat, junk = folder / "train/cat/0.jpg", folder / "train/dog/0.jpg"
    (folder / "train.csv").write_text("path,label\ntrain/cat/0.jpg,cat\ntrain/dog/0.jpg,dog\ntrain/dog/1.jpg,dog\n")
    listed = make_train_batches(block(folder, name="file_list"), batch_size=3, seed=0).source
    whole, data = fingerprint(listed), cat.read_bytes()
    cat.unlink()
    content = junk.read_bytes()
    junk.unlink()
    junk.mkdir()
    with pytest.raises(UserError) as error:
        listed.read(np.arange(3))
    assert str(error.value) == (
        f"{cat} is broken: it cannot be read (No such file or directory). Repair or remove it, or set "
        "data.on_error=skip."
    )
    skipping = make_train_batches(block(folder, name="file_list", on_error="skip"), batch_size=3, seed=0).source
    assert skipping.read(np.arange(3))[1].tolist() == [-1, -1, 1]
    assert f"skipped {cat}: it cannot be read (No such file or directory) (1 skipped so far)" in caplog.messages
    assert f"skipped {junk}: it cannot be read (Is a directory) (2 skipped so far)" in caplog.messages
    assert fingerprint(skipping) != whole
    junk.rmdir()
    junk.write_bytes(content)
    cat.write_bytes(data)
    assert fingerprint(skipping) == whole


def test_the_measurement_of_the_input_names_a_broken_image_or_skips_it(folder, caplog):
    with pytest.raises(UserError, match=r"train/cat/1\.jpg is broken: .*truncated.* or set data\.on_error=skip"):
        measure(block(folder), make_train_batches(block(folder), batch_size=6, seed=0), 0.0)
    skipping = block(folder, on_error="skip")
    rates = measure(skipping, make_train_batches(skipping, batch_size=6, seed=0), 0.01)
    assert list(rates) == ["read", "decode", "augment", "pipeline"]
    assert [line.partition(": ")[0] for line in caplog.messages] == [f"skipped {folder}/train/cat/1.jpg"]


def test_the_command_line_says_it_in_one_line(folder, tmp_path, capsys):
    flags = [f"data.data_dir={folder}", "data.crop_size=16", "data.resize_size=18", "student.model=resnet8"]
    flags += ["method=ce", "batch_size=6", "mesh.data=1", "log.tensorboard=False"]
    argv = ["--config", "configs/image_folder.py", "--workdir", str(tmp_path / "run")]
    assert main_lib.main([*argv, *(f"--config.{flag}" for flag in flags)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldrld_jax: ")]
    assert "train/cat/1.jpg is broken" in line

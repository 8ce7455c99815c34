"""Nothing that is read runs code or leads out of its folder (docs/security.md); PyTorch files: torch_import_test."""

import io
import json
import struct
import sys
import zlib

import pytest
from PIL import Image

from ldrld_jax import config as config_lib
from ldrld_jax.checkpoint.folder import Checkpoints
from ldrld_jax.data.decode import BrokenImageError, open_image
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError
from tests.checkpoint.saved import save, trees


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that must not be imported."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "ldrld_trap.py").write_text("class Trap: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "ldrld_trap.Trap"
    assert "ldrld_trap" not in sys.modules


def test_a_dataset_whose_description_names_a_module_is_refused(trap, tmp_path):
    folder = tmp_path / "data [1]" / "birds" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "birds", "version": "1.0.0"}))
    for key in ("pythonClassName", "python_class_name"):
        (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"image": {key: trap}}}}))
        with pytest.raises(UserError, match=r"features.json asks to import 'ldrld_trap.Trap', which is refused"):
            open_source("birds", "train", str(tmp_path / "data [1]"))


@pytest.mark.parametrize("name", ["kaggle:birds", "huggingface:birds", "someone:birds/1", "../birds", "/birds", "a b"])
def test_a_dataset_of_a_namespace_is_fetched_by_nobody(name, tmp_path):
    with pytest.raises(UserError, match=r"there is no (dataset|module)"):
        open_source(name, "train", str(tmp_path))


def test_a_checkpoint_that_names_a_handler_imports_none(trap, tmp_path):
    save(tmp_path / "run", (1, 50.0))
    path = tmp_path / "run" / "1" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"item_handlers": dict.fromkeys(content["item_handlers"], trap)}))
    assert Checkpoints(tmp_path / "run").resume(trees(0)).step == 1


def test_the_compiled_programs_of_a_strangers_run_are_not_executed(tmp_path):
    config = config_lib.default()
    config.compile_cache = str(tmp_path / "programs")
    (tmp_path / "config.json").write_text(config.to_json())
    assert config_lib.load_run(str(tmp_path)).compile_cache == config_lib.default().compile_cache


def test_postscript_is_no_image_whatever_it_is_called(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (20, 20)).save(picture, "EPS")
    Image.open(io.BytesIO(picture.getvalue()))  # Pillow would: loading it starts Ghostscript
    with pytest.raises(BrokenImageError, match="not an image"):
        open_image(picture.getvalue())


def test_a_few_bytes_that_claim_to_be_a_huge_image_are_broken():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    with pytest.raises(BrokenImageError, match="decompression bomb"):
        open_image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))))


@pytest.mark.parametrize(
    ("file", "line"), [("wnids.txt", "../../n01"), ("val/val_annotations.txt", "../../a.JPEG\tn01")]
)
def test_names_that_lead_out_of_tiny_imagenet_are_refused(file, line, tmp_path):
    for folder in ("train/n01/images", "train/n02/images", "val/images"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "wnids.txt").write_text("n01\nn02\n")
    (tmp_path / "words.txt").write_text("n01\tone\nn02\ttwo\n")
    (tmp_path / file).write_text(line + "\n")
    with pytest.raises(UserError, match=r"names '../../.*', which leads out of the dataset"):
        open_source("tiny_imagenet", "val", str(tmp_path))


def test_a_class_is_a_folder_and_its_name_is_text_only(tmp_path):
    for split in ("train", "val"):
        for name in ("a%2f..", "$(touch owned)", "a\nb"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    source = open_source("image_folder", "train", str(tmp_path))
    assert source.class_names == ("$(touch owned)", "a\nb", "a%2f..")

"""Real-format data that the tests make: JPEGs of photographs, an ImageNet as TFDS prepares it, folders."""

import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Part of one of the two photographs that scikit-learn ships, resized: real edges and colours."""
    from sklearn.datasets import load_sample_images

    picture = Image.fromarray(load_sample_images().images[int(rng.integers(2))])
    left, top = int(rng.integers(0, 200)), int(rng.integers(0, 100))
    return picture.crop((left, top, left + 400, top + 300)).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "jpeg", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    return encoded(photograph(rng, width, height), quality=90)


def make_imagenet(data_dir: str | pathlib.Path, examples: int) -> None:
    """`imagenet2012` with `examples` JPEGs a split, laid out as TFDS's own builder does it."""

    def examples_of(seed):
        rng = np.random.default_rng(seed)
        for index in range(examples):
            size = [int(side) for side in rng.integers(240, 400, 2)]
            name = f"n{index:08d}_{seed}.JPEG"
            yield name, {"image": jpeg(rng, *size), "label": int(rng.integers(1000)), "file_name": name}

    # The registered builder of this name reads what this one writes; it could not write without the real archive.
    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")
            pkg_dir_path = None

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=1000),
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(0), "validation": self._generate_examples(1)}

            def _generate_examples(self, seed):
                return examples_of(seed)

    tfds.disable_progress_bar()
    Imagenet2012(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


def make_tiny_imagenet(root: pathlib.Path, classes: int = 3, each: int = 4) -> None:
    """The layout of the official zip, with `each` training and one validation image a class."""
    rng = np.random.default_rng(0)
    wnids = [f"n{9 - label:08d}" for label in range(classes)]  # wnids.txt is not sorted
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\tthing {wnid[-1]}, object\n" for wnid in wnids) + "n1\tother\n")
    lines = []
    for label, wnid in enumerate(wnids):
        images = root / "train" / wnid / "images"
        images.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(each):
            (images / f"{wnid}_{i}.JPEG").write_bytes(jpeg(rng, 64, 64))
        lines.append(f"val_{label}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "images").mkdir(parents=True)
    for label in range(classes):
        (root / "val" / "images" / f"val_{label}.JPEG").write_bytes(jpeg(rng, 64, 64))
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))


def make_image_folder(root: pathlib.Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 3) -> None:
    """`each` JPEGs a class and split, of many sizes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                size = [int(side) for side in rng.integers(90, 200, 2)]
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(rng, *size))

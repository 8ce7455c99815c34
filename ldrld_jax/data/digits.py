"""The digits dataset: 1,797 real scans of handwritten digits, prepared without network access or TensorFlow."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """The test part of the UCI handwritten digits, 8x8 pixels, as distributed with scikit-learn.

    Every fifth scan is held out for testing. The images are stored as PNG, so that preparation does not
    need TensorFlow; grey levels 0 to 16 become 0 to 255.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look for README, citation and checksum files next to the module, and there are none.
    pkg_dir_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {"train": self._generate_examples(held_out=False), "test": self._generate_examples(held_out=True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image
        from sklearn.datasets import load_digits

        scans = load_digits()
        for index, (image, label) in enumerate(zip(scans.images, scans.target, strict=True)):
            if (index % 5 == 4) == held_out:
                png = io.BytesIO()
                Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(png, format="png")
                yield index, {"image": png.getvalue(), "label": int(label)}

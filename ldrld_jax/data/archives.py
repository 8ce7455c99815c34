"""NumPy archives of images and labels, `data.name=arrays:FILE.npz`."""

import dataclasses

import numpy as np
from etils import epath

from ldrld_jax.data.given import as_source, named_classes
from ldrld_jax.data.source import Source, check_count_from_0
from ldrld_jax.errors import UserError, reason


def load_arrays(file: str, split: str) -> Source:
    """Opens a split of a NumPy archive: `x_train` and `y_train`, or `train_images` and `train_labels`.

    An array `class_names` names the classes; without it there are as many as the largest label of all splits asks for.

    Args:
      file: an .npz file.
      split: "train", "test" or another.

    Raises:
      UserError: if the file cannot be read, or lacks the arrays.
    """
    try:
        with epath.Path(file).open("rb") as opened:
            archive = np.load(opened, allow_pickle=False)
            images_of = (f"x_{split}", f"{split}_images")
            arrays = {name: archive[name] for name in archive.files if name in images_of or _is_labels(name)}
            names = archive["class_names"] if "class_names" in archive.files else None
            if names is not None:
                names = (names.astype(str) if names.dtype.kind == "S" else names).tolist()
    except Exception as error:  # of NumPy, zipfile or zlib, which have errors of their own for damaged bytes
        raise UserError(
            f"{file} cannot be read as a NumPy archive: {reason(error)}. Write it with numpy.savez."
        ) from error
    for images, labels in ((f"x_{split}", f"y_{split}"), (f"{split}_images", f"{split}_labels")):
        if images in arrays and labels in arrays:
            every = [array for name, array in arrays.items() if _is_labels(name) and array.dtype.kind in "iu"]
            largest = max((int(array.max()) for array in every if array.size), default=0)
            if not names:
                check_count_from_0(largest, 1 + sum(array.size for array in every), file)
            count = len(names) if names else 1 + largest
            known = len(names) if names else None  # what the labels ask for cannot tell whether they are one-hot
            source = as_source((arrays[images], arrays[labels]), num_classes=known, title=f"{split} split of {file}")
            return dataclasses.replace(source, class_names=named_classes(names, count))
    raise UserError(
        f"{file} has no x_{split} with y_{split}, and no {split}_images with {split}_labels; it has "
        f"{', '.join(archive.files)}. Rename them, or set data.train_split and data.eval_split."
    )


def _is_labels(name: str) -> bool:
    return name.startswith("y_") or name.endswith("_labels")

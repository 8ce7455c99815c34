"""Opens datasets by name: TFDS's, folders and lists of files, arrays in a file, and what a user's own code makes."""

import dataclasses

from ldrld_jax.code import call, is_code
from ldrld_jax.data import decoded, folders, tfds_records
from ldrld_jax.data.archives import load_arrays
from ldrld_jax.data.given import as_source
from ldrld_jax.data.source import Source
from ldrld_jax.files import given_path

ARRAYS = "arrays:"


def open_source(
    name: str,
    split: str,
    data_dir: str | None = None,
    *,
    train_split: str = "train",
    on_error: str = "raise",
    max_skipped: float = 0.05,
    exif: bool = True,
) -> Source:
    """Opens a split of an image classification dataset, without TensorFlow.

    Args:
      name: `tiny_imagenet`, `image_folder` or `file_list` for files; `decoded` for what `--mode decode` wrote;
        `digits`, which is prepared on first use; any dataset name that TFDS knows; `arrays:FILE.npz`; or
        `module:function`, of which `function(split)` returns what `given.as_source` takes.
      split: a split of the dataset; for TFDS also a slice such as `train[:90%]`.
      data_dir: the folder itself, or the folder of TFDS datasets; None for TFDS's default.
      train_split: the split that names the classes of an image folder, see `folders.open_folder`.
      on_error, max_skipped: see `Source`.
      exif: see `given.as_source`.

    Raises:
      UserError: if the name or the split is unknown, or the dataset is missing; the message contains the
        command that prepares it.
    """
    if name.startswith(ARRAYS):
        source = load_arrays(given_path(name.removeprefix(ARRAYS)), split)
    elif is_code(name):
        source = as_source(call(name, split), title=f"{split} split of {name}", exif=exif)
    elif name == decoded.NAME:
        source = Source(*decoded.open_decoded(split, data_dir))
    elif name in folders.FOLDERS:
        source = Source(*folders.open_folder(name, split, data_dir, train_split=train_split, on_error=on_error))
    else:
        source = Source(*tfds_records.open_tfds(name, split, data_dir))
    return dataclasses.replace(source, on_error=on_error, max_skipped=max_skipped)

"""Predicts the top classes of image files: `--mode predict`."""

import glob
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from etils import epath

from ldrld_jax.data.decode import BrokenImageError
from ldrld_jax.data.views import View
from ldrld_jax.deploy.export import Student
from ldrld_jax.deploy.preprocessing import view_of
from ldrld_jax.errors import UserError
from ldrld_jax.files import is_local

_BATCH = 64

Classes = list[tuple[str, float]]


def find(patterns: Iterable[str]) -> list[epath.Path]:
    """Returns the named files, and the matches of names that are patterns such as `*.jpg` or `a/**/*.png`.

    Raises:
      UserError: if a name matches no file or is a folder.
    """
    paths = []
    for pattern in patterns:
        path = epath.Path(pattern)
        if path.is_dir():
            raise UserError(f"{pattern} is a folder. Name its images: {pattern.rstrip('/')}/*.png.")
        found = [path] if path.exists() else sorted(_matches(path))
        if not found:
            raise UserError(f"there is no image {pattern}.")
        paths += found
    return paths


def _matches(pattern: epath.Path) -> Iterator[epath.Path]:
    """Yields the files that match a pattern; on a local path, folders may have wildcards too, ** for any depth."""
    if is_local(pattern):
        found = map(epath.Path, glob.glob(str(pattern), recursive=True))  # noqa: PTH207  # it takes absolute ones
    else:
        found = pattern.parent.glob(pattern.name)
    yield from (path for path in found if not path.is_dir())


class BrokenImagesError(Exception):
    """Error that names the images of a prediction which cannot be read."""

    exit_code = 1


def predict(
    student: Student, paths: Sequence[epath.Path], top: int = 5
) -> Iterator[tuple[epath.Path, Classes | BrokenImageError]]:
    """Yields each path with its `top` classes and their probabilities in 0..1, the most likely first.

    A path whose file is broken, or no image, comes with the error instead.

    Args:
      student: from `export.student_of` or `export.read_student`.
      paths: image files in any format of `decode.FORMATS`, grey or colour.
      top: number of classes, or all if there are fewer.

    Raises:
      UserError: if the student takes no images, or tells several labels an image.
    """
    view = view_of(student.preprocessing)
    if len(labels := student.program.out_avals[0].shape[1:-1]):
        raise UserError(
            f"the student tells {' x '.join(map(str, labels))} labels an image, and a prediction has one. Call its "
            "program, as the README.md of its export shows."
        )
    probabilities_of = jax.jit(lambda images: jax.nn.softmax(student.program.call(images)))
    for start in range(0, len(paths), _BATCH):
        batch = paths[start : start + _BATCH]
        images = [_read(path, view) for path in batch]
        whole = [image for image in images if not isinstance(image, BrokenImageError)]
        found = iter(np.asarray(probabilities_of(np.stack(whole))) if whole else ())
        for path, image in zip(batch, images, strict=True):
            if isinstance(image, BrokenImageError):
                yield path, image
                continue
            probabilities = next(found)
            best = np.argsort(-probabilities, kind="stable")[:top]
            yield path, [(student.labels[i], float(probabilities[i])) for i in best]


def _read(path: epath.Path, view: View) -> np.ndarray | BrokenImageError:
    try:
        return view(path.read_bytes())
    except BrokenImageError as error:
        return error


def line(path: epath.Path, classes: Classes) -> str:
    """Formats an image's classes as one line.

    Example:
      >>> line(epath.Path("scan.png"), [("seven", 0.91), ("one", 0.0512)])
      'scan.png  seven 91.00 %, one 5.12 %'
    """
    return f"{path}  " + ", ".join(f"{name} {100 * probability:.2f} %" for name, probability in classes)

"""The best checkpoint of a run, ready to evaluate and predict."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.data.decode import BrokenImageError
from ldrld_jax.data.given import as_array
from ldrld_jax.data.source import check_dtype, check_range
from ldrld_jax.data.stream import Readable
from ldrld_jax.errors import UserError
from ldrld_jax.record.reader import check_class_names
from ldrld_jax.runtime.hosts import in_turn
from ldrld_jax.train.given import Given
from ldrld_jax.train.input import check_form, form_of, open_evaluation
from ldrld_jax.train.networks import Networks
from ldrld_jax.train.shapes import check_evaluation
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network


class Best(NamedTuple):
    """The best checkpoint of a run, with what its evaluation needs.

    Attributes:
      config: resolved.
      networks: the factory of networks for the data.
      network, variables: the student.
      source: the evaluation split.
      program: `program(variables, images)` returns the student's logits.
    """

    config: ConfigDict
    networks: Networks
    network: Network
    variables: Variables
    source: Readable
    program: Callable[[Variables, Any], jax.Array]

    def input(self, index: int, image: Any) -> np.ndarray:
        """Returns an image as the network takes it: transformed as for the evaluation.

        Raises:
          UserError: if it is broken, or has another shape or dtype than the evaluation's; names it by `index`.
        """
        source = self.source.uncached
        if isinstance(image, tuple | Mapping):
            raise UserError(
                f"image {index} is a {type(image).__name__}, and predict takes images alone, without labels. Give "
                "them as [image for image, label in data]."
            )
        if image is None or isinstance(image, str | pathlib.PurePath):
            raise UserError(
                f"image {index} is a {type(image).__name__}, and predict takes arrays, images of Pillow or the bytes "
                "of files. Give pathlib.Path(path).read_bytes() of a file."
            )
        try:
            known = isinstance(image, bytes | np.ndarray)
            array = source.view(image if known else as_array(image, exif=self.config.data.exif))
            check_dtype(array.dtype, source.dtype)
            check_range(array, source.dtype)
        except BrokenImageError as error:
            raise UserError(f"image {index} cannot be used: {error}. Give images as in the training data.") from error
        return array.astype(source.dtype)


def open_best(config: ConfigDict, workdir: epath.PathLike, given: Given) -> Best:
    """Opens the best checkpoint of a run for the evaluation split of a resolved config.

    Raises:
      UserError: if there is no such run, it trained another model, or the split is not like its training data.
    """
    with in_turn("data"):
        source = open_evaluation(config, given)
    check_class_names(workdir, source.class_names, whose="the run")
    check_form(workdir, form_of(source))
    networks = Networks.of(source, config.precision, given.models)
    network, variables = networks.of_run(workdir, config.student.model, config.data)
    check_evaluation(networks, config.student.model, network.image_size, source)  # of images of another size
    program = jax.jit(lambda variables, images: network(variables, images, train=False)[0])
    return Best(config, networks, network, variables, source, program)

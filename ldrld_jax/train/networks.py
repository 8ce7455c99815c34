"""Networks with their weights: random, given, as shapes only, from a run, or from a PyTorch checkpoint."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ldrld_jax.checkpoint.folder import load_model
from ldrld_jax.code import is_code, load_object
from ldrld_jax.errors import UserError, given_in_python
from ldrld_jax.identity import identity, is_object
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.interop.hub import WEIGHTS, is_on_hub
from ldrld_jax.interop.torch_import import load_torch_checkpoint, load_variables
from ldrld_jax.models import MODELS, create_model, outline, own_model
from ldrld_jax.models.pure import Pure, pure
from ldrld_jax.models.purify import check_finite, last_matrix_path
from ldrld_jax.models.structure import structure
from ldrld_jax.record.console import say
from ldrld_jax.record.reader import read_config, read_data
from ldrld_jax.runtime.precision import dtypes
from ldrld_jax.train.state import Variables
from ldrld_jax.train.step import Network

_EXPORTED = "student.safetensors", WEIGHTS  # of --mode export, without and with --hub
FED = "mean", "std", "image_size"  # keys of the data block that say how images are fed


def is_workdir(path: str) -> bool:
    """Returns whether a checkpoint is a run's workdir, and not a file, `archive.tar::member` or `hf://OWNER/NAME`.

    Raises:
      UserError: if it is a folder of another kind that has a network's file.
    """
    if "::" in path or is_on_hub(path) or not epath.Path(path).is_dir():
        return False
    files = [place for name in _EXPORTED if (place := epath.Path(path) / name).exists()]
    if files and not (epath.Path(path) / "checkpoints").exists():
        raise UserError(f"{path} is an exported network, not the workdir of a run. Give the file in it: {files[0]}.")
    return True


class _Form(NamedTuple):
    """Form of a model: all that is known of it without its weights.

    Attributes:
      pure: the model with the shapes of its weights.
      structure: see `Networks.structure`.
      function: whether it is `(apply, variables)`.
    """

    pure: Pure
    structure: str | None
    function: bool


@dataclasses.dataclass(frozen=True)
class Networks:
    """Factory of networks for one dataset at one precision; their weights stay on the host.

    Attributes:
      num_classes: C.
      channels: of an image.
      precision: see `ldrld_jax.runtime.precision`.
      raw: whether inputs go to the models as the source has them.
      given: models that are objects, of any kind that `pure` takes, by the name that the config has for them.
    """

    num_classes: int
    channels: int
    precision: str
    raw: bool = False
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    # A user's function may take seconds, to download weights for example, so that a run calls it no more than it must.
    _forms: dict[tuple[str, int], _Form] = dataclasses.field(
        default_factory=dict, compare=False, repr=False, init=False
    )

    @classmethod
    def of(cls, source: Any, precision: str, given: Mapping[str, Any] = MappingProxyType({})) -> "Networks":
        """Returns the factory for the images and classes of a source."""
        return cls(len(source.class_names), source.image_shape[-1], precision, source.raw, given)

    def random(
        self, model: str, data: ConfigDict, *, seed: int, batch_norm_groups: int = 1
    ) -> tuple[Network, Variables]:
        """Makes a model with random weights, or takes one that is given with its own.

        Args:
          model: a key of MODELS, `module:function` of a user's own code, or a name in `given`.
          data: the config block that says how images are fed (mean, std, image_size).
          seed: determines the weights.
          batch_norm_groups: see `BatchNorm.groups`.

        Raises:
          UserError: if there is no such model.
        """
        return self._network(self.pure(model, seed=seed, batch_norm_groups=batch_norm_groups), data)

    def pure(self, model: str, *, seed: int = 0, batch_norm_groups: int = 1) -> Pure:
        """Makes a model, without the preprocessing of its images; see `random`."""
        return pure(self._module(model, seed), batch_norm_groups=batch_norm_groups)

    def is_own(self, model: str) -> bool:
        """Returns whether a model is a user's: one that is given, or that `module:function` makes."""
        return model in self.given or (is_code(model) and not isinstance(load_object(model), HostTeacher))

    def structure(self, model: str) -> str | None:
        """Returns a digest of a user's module besides its arrays, see `models.structure`; None for any other model."""
        return self._form(model).structure if self.is_own(model) else None

    def is_function(self, model: str) -> bool:
        """Returns whether a model is a user's `(apply, variables)`, whose function may use more than its variables."""
        return self.is_own(model) and self._form(model).function

    def shapes(self, model: str) -> Variables:
        """Returns the shapes and dtypes of the variables of a user's model, as the user made them."""
        made = self._form(model).pure
        return Variables(made.params, made.batch_stats)

    def _form(self, model: str, batch_norm_groups: int = 1) -> _Form:
        """Returns the form of a user's model, which is made the first time."""
        key = model, batch_norm_groups
        if key not in self._forms:
            module = self._module(model, seed=0)
            made = pure(module, batch_norm_groups=batch_norm_groups)
            params, batch_stats = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (made.params, made.batch_stats)
            )
            made = dataclasses.replace(made, params=params, batch_stats=batch_stats)
            function = isinstance(module, tuple) and not hasattr(module[0], "apply")
            self._forms[key] = _Form(made, structure(module), function)
        return self._forms[key]

    def _module(self, model: str, seed: int) -> Any:
        if model in self.given:
            return self.given[model]
        if is_object(model):
            raise given_in_python(f"the model {model}")
        create = own_model if is_code(model) else create_model
        return create(model, self.num_classes, self.channels, rngs=nnx.Rngs(seed), **dtypes(self.precision))

    def outline(self, model: str, data: ConfigDict, *, batch_norm_groups: int = 1) -> tuple[Network, Variables]:
        """Makes a model with shapes in place of its weights; see `random`."""
        if not self._is_ours(model):
            network, variables = self._network(self._form(model, batch_norm_groups).pure, data)
            # NumPy's float64 becomes float32 on the devices, unless the run is in float64.
            dtype = jax.dtypes.canonicalize_dtype
            return network, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype(x.dtype)), variables)
        module = outline(model, self.num_classes, self.channels, **dtypes(self.precision))
        return self._network(pure(module, batch_norm_groups=batch_norm_groups), data)

    def _is_ours(self, model: str) -> bool:
        return model in MODELS and model not in self.given

    def restore(self, path: str, model: str, data: ConfigDict) -> tuple[Network, Variables]:
        """Loads a model from a run's best checkpoint, fed as that run was, or from a PyTorch file, fed as `data` says.

        Args:
          path: a workdir of ours, or what `load_torch_checkpoint` takes.
          model: its name.
          data: see `random`.

        Raises:
          UserError: if there is nothing at `path`, or it holds another model.
        """
        place = epath.Path(path)
        if not is_workdir(path):
            if model in self.given:
                raise UserError(
                    f"{path} is not a run's workdir, and weights for the object {model} are read only from a workdir. "
                    "Give one, or load the weights into the object."
                )
            module = load_torch_checkpoint(
                path, model, self.num_classes, in_channels=self.channels, **dtypes(self.precision)
            )
            return self._network(pure(module), data)
        if (saved := read_config(place)) is None:
            raise UserError(f"{path} holds no run (no config.json). Give a run's workdir, or a PyTorch checkpoint.")
        run = ConfigDict(saved)
        if run.student.model != model:
            raise UserError(
                f"the run in {path} trained {run.student.model}, not {model}. Name that model, or another run."
            )
        channels = max(len(run.data.mean), len(run.data.std))
        if not self.raw and channels not in (1, self.channels):
            raise UserError(
                f"the run in {path} was trained on images of {channels} channels, and those here have "
                f"{self.channels}. Name another run."
            )
        ours = self._is_ours(model)
        network, like = self.outline(model, run.data) if ours else self.random(model, run.data, seed=0)
        variables = Variables(**load_model(place / "checkpoints", like._asdict(), run=identity(saved)))
        stats = variables.batch_stats if ours else _finite_at_first(like.batch_stats, variables.batch_stats)
        check_finite(variables.params, stats, path)
        return network, variables

    def of_run(self, workdir: epath.PathLike, model: str, data: ConfigDict) -> tuple[Network, Variables]:
        """Loads the student of a run, see `restore`, and says which keys of `data` have no effect on it."""
        network, variables = self.restore(str(workdir), model, data)
        theirs = ConfigDict(read_config(workdir)).data
        for key in FED:
            ours, used = (list(v) if isinstance(v, list | tuple) else v for v in (data.get(key), theirs.get(key)))
            if ours != used:
                say(f"warning: data.{key}={ours} has no effect: the run in {workdir} was trained with {used}.")
        return network, variables

    def without_head(self, path: str, model: str, data: ConfigDict, variables: Variables) -> Variables:
        """Loads all layers of a model but the last, which stays that of `variables`; see `restore`.

        Args:
          path: the same as of `restore`; the model in it may tell any number of classes apart.
          model: its name.
          data: see `random`.
          variables: random, for example.

        Raises:
          UserError: see `restore`.
        """
        head = last_matrix_path(variables.params, self.num_classes)[:-1]
        kept = {path: leaf for path, leaf in flatten_dict(variables.params).items() if path[: len(head)] == head}
        place = epath.Path(path)
        if not is_workdir(path):
            title = f"{model} without its last layer"
            return Variables(*load_variables(path, model, *variables, title=title, kept=unflatten_dict(kept)))
        if (note := read_data(place)) is None:
            raise UserError(
                f"{path} has no data.json with its classes, which student.checkpoint_head=skip takes. Give a workdir "
                "with data.json, or set student.checkpoint_head=load."
            )
        _, loaded = dataclasses.replace(self, num_classes=len(note["classes"])).restore(path, model, data)
        return loaded._replace(params=unflatten_dict(flatten_dict(loaded.params) | kept))

    def _network(self, model: Pure, data: ConfigDict) -> tuple[Network, Variables]:
        network = Network(
            model.apply,
            mean=self._per_channel("mean", data.mean),
            std=self._per_channel("std", data.std),
            image_size=data.image_size,
            dtype=dtypes(self.precision)["dtype"],
            raw=self.raw,
            random=model.random,
        )
        return network, Variables(model.params, model.batch_stats)

    def _per_channel(self, name: str, values: Sequence[float]) -> tuple[float, ...]:
        if not self.raw and len(values) not in (1, self.channels):
            raise UserError(
                f"data.{name} must have one number{'' if self.channels == 1 else f' or {self.channels}'} (the image's "
                f"channels), got {len(values)}."
            )
        return tuple(values)


def _finite_at_first(first: Any, now: Any) -> Any:
    """Returns variables that are not trained, with 0 for what was not finite at first, as a mask of -inf is not."""
    return jax.tree.map(lambda first, now: np.where(np.isfinite(first), now, 0), first, now)

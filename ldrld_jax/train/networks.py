"""Networks with their weights: fresh, from a run of ours, or from a PyTorch checkpoint."""

from collections.abc import Sequence

from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from ldrld_jax.checkpoint.folder import load_model
from ldrld_jax.config import identity, saved_config
from ldrld_jax.errors import UserError
from ldrld_jax.interop.torch_import import load_torch_checkpoint
from ldrld_jax.models import create_model
from ldrld_jax.models.layers import group_batch_norms
from ldrld_jax.models.purify import purify
from ldrld_jax.runtime.precision import dtypes
from ldrld_jax.train.step import Network, Variables


def create_network(
    model: str,
    data: ConfigDict,
    *,
    num_classes: int,
    channels: int,
    precision: str,
    seed: int,
    batch_norm_groups: int = 1,
) -> tuple[Network, Variables]:
    """A freshly initialised model, fed as `data` says (mean, std, image_size).

    Args:
      batch_norm_groups: see `BatchNorm.groups`.

    Raises:
      UserError: if there is no such model.
    """
    module = create_model(model, num_classes, channels, rngs=nnx.Rngs(seed), **dtypes(precision))
    group_batch_norms(module, batch_norm_groups)
    return _network(module, data, channels, precision)


def outline_network(
    model: str, data: ConfigDict, *, num_classes: int, channels: int, precision: str, batch_norm_groups: int = 1
) -> tuple[Network, Variables]:
    """Returns what `create_network` does with shapes in place of the weights, and makes none.

    Raises:
      UserError: if there is no such model.
    """
    module = nnx.eval_shape(lambda: create_model(model, num_classes, channels, rngs=nnx.Rngs(0), **dtypes(precision)))
    group_batch_norms(module, batch_norm_groups)
    return _network(module, data, channels, precision)


def load_network(
    path: str, model: str, data: ConfigDict, *, num_classes: int, channels: int, precision: str
) -> tuple[Network, Variables]:
    """A model with the weights of a run (its best checkpoint), fed as that run was, or of a file, fed as `data` says.

    Args:
      path: a workdir of ours, or what `load_torch_checkpoint` takes.
      model: its name.

    Raises:
      UserError: if there is nothing at `path`, or it holds another model.
    """
    place = epath.Path(path)
    if "::" in path or not place.is_dir():  # archive.tar::member, or a file
        module = load_torch_checkpoint(path, model, num_classes, in_channels=channels, **dtypes(precision))
        return _network(module, data, channels, precision)
    if (saved := saved_config(place)) is None:
        raise UserError(f"{path} holds no run (no config.json). Give a run's workdir, or a PyTorch checkpoint.")
    run = ConfigDict(saved)
    if run.student.model != model:
        raise UserError(f"the run in {path} trained {run.student.model}, not {model}. Name that model, or another run.")
    network, like = outline_network(model, run.data, num_classes=num_classes, channels=channels, precision=precision)
    return network, Variables(**load_model(place / "checkpoints", like._asdict(), run=identity(saved)))


def _network(module: nnx.Module, data: ConfigDict, channels: int, precision: str) -> tuple[Network, Variables]:
    apply, params, batch_stats = purify(module)
    network = Network(
        apply,
        mean=_per_channel("mean", data.mean, channels),
        std=_per_channel("std", data.std, channels),
        image_size=data.image_size,
        dtype=dtypes(precision)["dtype"],
    )
    return network, Variables(params, batch_stats)


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(f"data.{name} must have 1 or {channels} numbers (the image's channels), got {len(values)}.")
    return tuple(values)

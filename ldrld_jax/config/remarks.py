"""Warnings about a config: keys that its run does not read, a batch size without its learning rate."""

from typing import Any

from ml_collections import ConfigDict

from ldrld_jax.config.keys import default, leaves
from ldrld_jax.config.load import load
from ldrld_jax.config.resolve import NONE, Methods, has_weights, method_names, teaches_from_file, teaches_itself
from ldrld_jax.losses import METHODS

# What a teacher has that is trained already; the rest of its block is the recipe that would train it.
_TRAINED = {"model", "checkpoint", "ensemble", "min_top1", "data.mean", "data.std"}


def remarks(config: ConfigDict, path: str | None = None, given: Methods = NONE) -> list[str]:
    """Returns the warnings about an unresolved config, a line each.

    A key that is set and not read is one, unless the config file set it for a run that would read it: files have a
    recipe for the teacher, and the fields of LDRLD, also for runs with a trained teacher or of another method. So is a
    batch size that is not the config file's together with the file's learning rate.

    Args:
      config: with its overrides.
      path: the config file that it is of; None if there is none.
      given: methods that are objects.
    """
    reasons = _unread(config, given)
    if path is None:
        return _said(reasons)
    file = load(path)
    now, then, known = dict(leaves(config)), dict(leaves(file)), _unread(file)
    return [
        *_learning_rate(config, file, path),
        *_said({key: why for key, why in reasons.items() if key in known or now[key] != then[key]}),
    ]


def _said(reasons: dict[str, str]) -> list[str]:
    return [f"{key} is set and not read, because {why}" for key, why in reasons.items()]


def _learning_rate(config: ConfigDict, file: ConfigDict, path: str) -> list[str]:
    same = config.optim.learning_rate == file.optim.learning_rate
    if config.batch_size == file.batch_size or not same:
        return []
    return [
        f"optim.learning_rate={file.optim.learning_rate:g} of {path} is for its batches of {file.batch_size}, and "
        f"batch_size={config.batch_size} here: the usual rule is {config.batch_size / file.batch_size:g} times it"
    ]


def _unread(config: ConfigDict, given: Methods = NONE) -> dict[str, str]:
    """Returns the reason for each key that is set and not read; a value that is the default counts as not set."""
    names = method_names(config, given)
    because = f"method={config.method}"
    reasons: dict[str, str] = {}
    for name in [name for name in METHODS if name not in names]:
        fallback = vars(METHODS[name].config())
        fields = {f"loss.{name}.{key}": (value, fallback[key]) for key, value in config.loss.get(name, {}).items()}
        fields[f"loss_weight.{name}"] = (config.loss_weight.get(name), None)
        reasons |= {key: because for key, (value, usual) in fields.items() if value not in (None, usual)}
    data = config.data
    if config.logits.views is not None and config.logits.dir is None and not teaches_from_file(config):
        reasons["logits.views"] = "logits.dir is not set"
    reasons |= _teacher(config, names)
    if data.label_noise != "none" and not data.label_noise_rate:
        reasons["data.label_noise"] = "data.label_noise_rate is 0"
    if data.label_noise_rate and data.label_noise == "none":
        reasons["data.label_noise_rate"] = "data.label_noise is none"
    if data.resize_size is not None and data.crop_size is None:
        reasons["data.resize_size"] = "data.crop_size is not set"
    return reasons


def _teacher(config: ConfigDict, names: list[str]) -> dict[str, str]:
    """Returns the reason for each key of the teacher that is not read."""
    if not names:
        return {}  # a sweep names one teacher for all its runs, plain training among them
    if teaches_itself(config):
        kept, because = {"model"}, f"teacher.model={config.teacher.model}"
    elif config.teacher.checkpoint is not None:
        kept, because = _TRAINED, "teacher.checkpoint is trained already"
    elif config.teacher.epochs is None and config.teacher.model and has_weights(config):
        kept, because = _TRAINED, "teacher.epochs is not set"
    else:
        return {}
    usual: dict[str, Any] = dict(leaves(default().teacher))
    return {
        f"teacher.{key}": because
        for key, value in leaves(config.teacher)
        if key not in kept and value not in (None, usual[key])
    }

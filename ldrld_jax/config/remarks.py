"""Warnings about a config: keys that its run does not read, a batch size without its learning rate."""

from typing import Any

from ml_collections import ConfigDict

from ldrld_jax.config.keys import default, leaves
from ldrld_jax.config.load import load
from ldrld_jax.config.resolve import (
    NONE,
    Methods,
    has_weights,
    method_names,
    teacher_checkpoints,
    teaches_from_file,
    teaches_itself,
)
from ldrld_jax.files import is_folder
from ldrld_jax.identity import is_object
from ldrld_jax.losses import METHODS

# Keys that a teacher which is already trained still reads; the others are the recipe that would train it.
_TRAINED = {"model", "checkpoint", "ensemble", "min_top1"}
# A teacher that is a run's workdir is fed as in that run, and reads none of these.
_FED = {"data.mean", "data.std", "data.image_size"}


def remarks(config: ConfigDict, path: str | None = None, given: Methods = NONE, *, on_host: bool = False) -> list[str]:
    """Returns the warnings about an unresolved config, a line each.

    A warning names a key that has no effect. A key that the config file itself sets is not warned about if the run
    without overrides would read it: files hold the teacher's recipe and LDRLD's fields for other runs. Another warning
    names the config file's learning rate if the batch size is not the file's.

    Args:
      config: with its overrides.
      path: the config file that it is of; None if there is none.
      given: methods that are objects.
      on_host: whether the teacher is a function on the host.
    """
    reasons = _unread(config, given, on_host=on_host)
    if path is None:
        return _said(reasons)
    file = load(path)
    now, then, known = dict(leaves(config)), dict(leaves(file)), _unread(file)
    return [
        *_learning_rate(config, file, path),
        *_said({key: why for key, why in reasons.items() if key in known or now[key] != then[key]}),
    ]


def _said(reasons: dict[str, str]) -> list[str]:
    return [f"{key} is set but has no effect, because {why}" for key, why in reasons.items()]


def _learning_rate(config: ConfigDict, file: ConfigDict, path: str) -> list[str]:
    same = config.optim.learning_rate == file.optim.learning_rate
    if config.batch_size == file.batch_size or not same:
        return []
    return [
        f"optim.learning_rate={file.optim.learning_rate:g} of {path} is meant for batch_size={file.batch_size}, but "
        f"batch_size={config.batch_size}: linear scaling gives {config.batch_size / file.batch_size:g} times that rate"
    ]


def _unread(config: ConfigDict, given: Methods = NONE, *, on_host: bool = False) -> dict[str, str]:
    """Returns the reason for each key that is set and not read; a value that is the default counts as not set."""
    names = method_names(config, given)
    because = f"method={config.method}"
    reasons = dict[str, str]()
    for name in [name for name in METHODS if name not in names]:
        fallback = vars(METHODS[name].config())
        changed = [key for key, value in config.loss.get(name, {}).items() if value not in (None, fallback[key])]
        reasons |= {f"loss.{name}.{key}": because for key in changed}
        if config.loss_weight.get(name) is not None:
            reasons[f"loss_weight.{name}"] = because
    now, usual = dict(leaves(config)), dict(leaves(default()))
    for key, (read, reason) in _conditions(config).items():
        if not read and now[key] not in (None, usual[key]):
            reasons[key] = reason
    return reasons | _teacher(config, names, on_host=on_host)


def _conditions(config: ConfigDict) -> dict[str, tuple[bool, str]]:
    """Returns for each key that depends on another one whether a run reads it, and the reason if it does not."""
    data, optim, augment = config.data, config.optim, f"data.augment={config.data.augment}"
    from_file, of_file = teaches_from_file(config), "the teacher's logits are read from a file"
    stored = (False, of_file) if from_file else (config.logits.dir is not None, "logits.dir is not set")
    rest = [key for key in optim if key != "name"] if is_object(optim.name) else []
    stepped = optim.schedule == "step", f"optim.schedule={optim.schedule}"
    return {
        "data.pad": (data.augment == "pad_crop", augment),
        "data.crop_area": (data.augment == "random_resized_crop", augment),
        "data.rotate_degrees": (data.augment == "rotate", augment),
        "data.rand_magnitude": (data.rand_augment > 0, "data.rand_augment is 0"),
        "data.label_noise": (data.label_noise_rate > 0, "data.label_noise_rate is 0"),
        "data.label_noise_rate": (data.label_noise != "none", "data.label_noise is none"),
        "data.resize_size": (data.crop_size is not None, "data.crop_size is not set"),
        "optim.decay_epochs": stepped,
        "optim.decay_rate": stepped,
        "optim.warmup_epochs": (optim.warmup != "none", "optim.warmup=none"),
        **{f"optim.{key}": (False, "the optimizer is an object") for key in rest},
        "logits.dir": (not from_file, of_file),
        "logits.dtype": stored,
        "logits.top_k": stored,
        "logits.spread_rest": stored,
        "logits.views": (stored[0] or from_file, stored[1]),
        "teacher.ensemble": ("," in (config.teacher.model or ""), "teacher.model is one model"),
        **dict.fromkeys(("kd_weight", "kd_warmup_epochs", "standardize"), (config.method != "ce", "method=ce")),
        "student.checkpoint_head": (config.student.checkpoint is not None, "student.checkpoint is not set"),
    }


def _teacher(config: ConfigDict, names: list[str], *, on_host: bool) -> dict[str, str]:
    """Returns the reason for each key of the teacher that is not read."""
    if not names:
        return {}  # a sweep names one teacher for all its runs, plain training among them
    if teaches_itself(config):
        kept, because = {"model"}, f"teacher.model={config.teacher.model}"
    elif on_host:
        kept, because = {"model", "min_top1"}, "the teacher runs on the host"
    elif config.teacher.checkpoint is not None:
        runs = all(map(is_folder, teacher_checkpoints(config)))
        kept, because = _TRAINED | (set() if runs else _FED), "teacher.checkpoint names a trained teacher"
    elif config.teacher.epochs is None and config.teacher.model and has_weights(config):
        kept, because = _TRAINED | _FED | {"seed"}, "teacher.epochs is not set"
    else:
        return {}
    usual: dict[str, Any] = dict(leaves(default().teacher))
    return {
        f"teacher.{key}": because
        for key, value in leaves(config.teacher)
        if key not in kept and value not in (None, usual[key])
    }

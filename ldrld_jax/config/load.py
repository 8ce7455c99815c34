"""Loading of configs: the defaults, a file over them, and `key=value` overrides over both."""

import ast
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

from ml_collections import ConfigDict

from ldrld_jax.code import call_of_file, is_code
from ldrld_jax.config.keys import KINDS, check, coerce, default, expanded, leaves, may_be_unset
from ldrld_jax.errors import UserError, unknown
from ldrld_jax.files import split_argument
from ldrld_jax.identity import is_object
from ldrld_jax.losses import METHODS
from ldrld_jax.record.console import say
from ldrld_jax.record.reader import read_config


def load(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Loads the config of a file over the defaults, then sets `overrides`.

    Args:
      path: `configs/cifar100.py` or `configs/cifar100.py:arg`; looked up in the working directory,
        then in the installed package.
      overrides: `key=value` strings, `optim.learning_rate=.1`.

    Raises:
      UserError: if the file is not found or fails, or a key or value is not allowed.
    """
    file, arg = split_argument(path)
    instead = "a sweep file to `python -m ldrld_jax.sweep`"
    changes = call_of_file(str(_find(file)), "get_config", arg, kind="config", instead=instead)
    if not isinstance(changes, ConfigDict):
        raise UserError(
            f"get_config of {path} must return a ConfigDict, got {type(changes).__name__}. End it with `return "
            "ml_collections.ConfigDict(...)`."
        )
    config = default()
    for key, value in leaves(changes):
        set_value(config, key, value, source=file)
    return overridden(config, overrides)


def load_run(workdir: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Loads the config of the run in `workdir`, then sets `overrides`.

    Nothing that a workdir names is executed unless an override names it again. A method, an optimizer, a writer or a
    teacher of the user's own is left out, and the method becomes `ce`, without the schedules of its loss: evaluation,
    export and prediction take the student alone. Nothing is written to Weights & Biases or MLflow.

    Raises:
      UserError: if there is no run, a key or value is not allowed, or the student or the data are of the user's own
        and no override names them.
    """
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"there is no checkpoint of a run in {workdir} (no config.json). Set --workdir.")
    config, overrides = default(), list(overrides)
    strange = [name for name in saved["method"].split("+") if name not in ("ce", *METHODS)]
    if strange:
        say(f"the method {'+'.join(strange)} of the run in {workdir} is not of this package: its loss is left out.")
        saved["method"] = "ce"
    left_out = tuple(f"{block}.{name}." for block in ("loss", "loss_weight") for name in strange)
    left_out += ("loss_schedule.",) if strange else ()
    for key, value in leaves(ConfigDict(saved)):
        # compile_cache is of this machine, whoever made the run: what lies there is executed.
        if key == "compile_cache" or f"{key}.".startswith(left_out):
            continue
        set_value(config, key, value, source=f"{workdir}/config.json")
    _leave_out_own(config, workdir, named={override.partition("=")[0] for override in overrides})
    return overridden(config, overrides)


def _leave_out_own(config: ConfigDict, workdir: str, named: Collection[str]) -> None:
    """Takes a user's own parts out of the config of a run, but for those that are named again."""
    if _is_own(config.optim.name):
        config.optim.name = default().optim.name
    config.log.writers = config.log.wandb.project = config.log.mlflow = None
    if config.teacher.model is not None and any(map(_is_own, config.teacher.model.split(","))):
        say(f"the teacher {config.teacher.model} of the run in {workdir} is not of this package: it is left out.")
        config.method, config.teacher.model, config.loss_schedule = "ce", None, default().loss_schedule
    for key, value in (("student.model", config.student.model), ("data.name", config.data.name)):
        if _is_own(value) and key not in named:
            again = f"This names code in a module. Repeat it if you trust it: --config.{key}={value}"
            python = (
                "It was given in Python: make its ldrld_jax.Trainer again and use Trainer.evaluate, Trainer.predict or "
                "Trainer.export"
            )
            raise UserError(f"the run in {workdir} has {key}={value}. {again if is_code(value) else python}.")


def _is_own(name: str) -> bool:
    """Returns whether a name is of a user's code or of an object."""
    return is_object(name) or is_code(name)


def overridden(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Sets the `key=value` overrides in a config, and returns it.

    Raises:
      UserError: if a key or value is not allowed.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"an override is key=value, got {override!r}.")
        set_value(config, key, _parse(config, key, text), source=f"--config.{override}")
    check(config)
    return config


def _find(file: str) -> pathlib.Path:
    package = pathlib.Path(__file__).parents[1]
    if not file:
        raise UserError("the name of the config file is empty. Give --config FILE, such as configs/digits.py.")
    places = [pathlib.Path(file), package / file, package.parent / file]
    folders = [folder / "configs" for folder in (pathlib.Path(), package, package.parent)]
    bare = pathlib.Path(file).parent in (pathlib.Path(), pathlib.Path("configs"))  # or it is a mistyped path to another
    named = [folder / pathlib.Path(file).name for folder in folders] if bare else []
    for place in [*places, *named, *(place.with_name(f"{place.name}.py") for place in [*places, *named])]:
        if place.is_file():
            return place
    known = sorted({path.name for folder in folders if folder.is_dir() for path in folder.glob("*.py")})
    raise UserError(f"there is no config file {file!r}, here or in the package. Known: {', '.join(known) or 'none'}.")


def find_key(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the block that holds a dotted key, and the key's last part.

    Raises:
      UserError: if there is no such key, or it is a block.
    """
    *path, last = key.split(".")
    block = config
    for depth, part in enumerate([*path, last]):
        if not isinstance(block, ConfigDict) or part not in block:
            raise unknown("config key", key, _nearby(config, path[:depth]))
        if depth < len(path):
            block = block[part]
    if isinstance(block[last], ConfigDict):
        raise UserError(f"{key} is a block: set one of {', '.join(f'{key}.{name}' for name in block[last])}.")
    return block, last


def _nearby(config: ConfigDict, path: list[str]) -> list[str]:
    """Returns the keys of the deepest existing block on the way to a wrong key."""
    prefix = ""
    for part in path:
        if not isinstance(config[part], ConfigDict):
            break
        config, prefix = config[part], f"{prefix}{part}."
    return [prefix + key for key in config]


def _parse(config: ConfigDict, key: str, text: str) -> Any:
    block, last = find_key(config, key)
    kind = block.get_type(last)
    if text == "None" and (block[last] is None or may_be_unset(key)):
        return None
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that the parser documents
        raise UserError(f"{key} must be of type {kind.__name__}, got {text!r}.") from None


def set_value(config: ConfigDict, key: str, value: Any, source: str) -> None:
    """Sets a dotted key of a config.

    Args:
      config: to change.
      key: dotted.
      value: of the key's type; NumPy numbers and lists are converted.
      source: the origin of the value, for the error.

    Raises:
      UserError: if there is no such key, or the value is of another type.
    """
    block, last = find_key(config, key)
    kind, value = block.get_type(last), coerce(value)
    if kind is tuple and isinstance(value, int | float):
        value = (value,)
    if key in KINDS and isinstance(value, str):
        value = expanded(value, KINDS[key])
    wrong_bool = isinstance(value, bool) != (kind is bool) and value is not None
    try:
        if wrong_bool or (value is None and not may_be_unset(key)):
            raise TypeError
        block[last] = value
    except (TypeError, OverflowError):
        raise UserError(f"{key} must be of type {kind.__name__}, got {repr(value)[:99]} ({source}).") from None

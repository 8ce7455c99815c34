"""Assembles a run from Python objects: a config with a name for each of them, and the objects beside it."""

import inspect
import pathlib
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen
import optax
from flax import nnx
from ml_collections import ConfigDict

from ldrld_jax.code import is_code
from ldrld_jax.config import default
from ldrld_jax.config.load import set_value
from ldrld_jax.data.given import as_source
from ldrld_jax.data.source import Source
from ldrld_jax.data.tfds_records import open_builder
from ldrld_jax.errors import UserError, unknown
from ldrld_jax.files import expand_home, given_path, is_folder
from ldrld_jax.identity import is_object
from ldrld_jax.interop.host_teacher import HostTeacher
from ldrld_jax.losses import METHODS, Method, MethodConfig, as_method
from ldrld_jax.metrics import MEASURED, curve_of
from ldrld_jax.models import MODELS
from ldrld_jax.record.reader import read_config
from ldrld_jax.train.given import Callback, Given, LineWriter, check_num_classes, check_writer
from ldrld_jax.train.step import Metric

_MOST_CHARACTERS = 250 - len("train/")  # of a metric's name: MLflow takes 250 with the split's
_FOLDER_SPLITS, _LOGITS = {"train_split": "train", "eval_split": "val"}, (".npy", ".zarr")


def assemble(
    *,
    student: Any,
    teacher: Any,
    method: Any,
    train: Any,
    evaluation: Any,
    num_classes: int | None,
    optimizer: Any,
    epochs: int,
    batch_size: int,
    seed: int,
    config: Mapping[str, Any],
    writers: Sequence[LineWriter],
    callbacks: Sequence[Callback],
    metrics: Mapping[str, Metric],
) -> tuple[ConfigDict, Given]:
    """Returns the config of a run and its objects; see `ldrld_jax.Trainer` for the arguments.

    Raises:
      UserError: if a run cannot use one of them.
    """
    made = default()
    arguments = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    for key, value in {"method": method, **arguments}.items():
        if key in config and config[key] != value:
            raise UserError(
                f"Trainer(config=...) has {key}={config[key]!r}, and its argument {key} is {value!r}. Give only the "
                f"argument: Trainer({key}={config[key]!r})."
            )
    for key, given, argument in (
        ("student.model", True, "student"),
        ("teacher.model", isinstance(teacher, HostTeacher) or _is_object(teacher), "teacher"),
        ("data.name", _is_object(train), "train"),
        ("optim.name", optimizer is not None, "optimizer"),
    ):
        if given and key in config:
            raise UserError(
                f"Trainer(config=...) has {key}={config[key]!r}, which the argument {argument} sets. Remove the key."
            )
    for key in ("data.train_split", "data.eval_split", "data.data_dir"):
        if key in config and _is_object(train) and not hasattr(train, "as_data_source"):
            raise UserError(
                f"Trainer(config=...) has {key}={config[key]!r}, which is for data with a name, and train is a "
                f"{type(train).__name__}. Remove the key, and give a part of the data, or data.fraction."
            )
    if evaluation is not None and config.get("data.held_out"):
        raise UserError(
            f"data.held_out={config['data.held_out']} evaluates on a part of train, and evaluation is given. Give one "
            "of them."
        )
    for key, value in {**config, **arguments}.items():
        set_value(made, key, value, source="Trainer(config=...)")
    models = dict[str, Any]()
    set_value(made, "student.model", student if isinstance(student, str) else _entered(student, models), "Trainer")
    host_teacher = _set_teacher(made, teacher, models)
    methods = _set_method(made, method)
    splits = _set_data(made, train, evaluation, num_classes, own=config)
    if isinstance(optimizer, str):
        set_value(made, "optim.name", optimizer, "Trainer(optimizer=...)")
    elif optimizer is not None:
        if isinstance(optimizer, optax.MultiSteps):
            optimizer = optimizer.gradient_transformation()
        if not isinstance(optimizer, optax.GradientTransformation):
            raise UserError(f"the optimizer must be one of optax, or a name, got {type(optimizer).__name__}.")
        made.optim.name = "<optimizer>"
    check_observers(writers, callbacks, metrics)
    return made, Given(
        models=models,
        teacher=host_teacher,
        methods=methods,
        train=splits[0],
        evaluation=splits[1],
        num_classes=num_classes,
        optimizer=None if isinstance(optimizer, str) else optimizer,
        writers=tuple(writers),
        callbacks=tuple(callbacks),
        metrics=dict(metrics),
    )


def _is_object(given: Any) -> bool:
    """Returns whether an argument is an object, or a list with one, and not a name or a path."""
    if isinstance(given, list) and given:
        return any(map(_is_object, given))
    return given is not None and not isinstance(given, str | pathlib.PurePath)


def _entered(thing: Any, table: dict[str, Any], unnamed: str = "model") -> str:
    """Enters an object in a table under a name in angle brackets, and returns the name."""
    named = thing[0] if isinstance(thing, tuple) and thing else thing
    base = getattr(named, "__name__", None) or type(named).__name__
    base = base if base.isidentifier() else unnamed
    name = next(
        name for name in (f"<{base}>", *(f"<{base} {i}>" for i in range(2, len(table) + 2))) if name not in table
    )
    table[name] = thing
    return name


def _set_teacher(config: ConfigDict, teacher: Any, models: dict[str, Any]) -> HostTeacher | None:
    """Names the teacher in a config; returns one that runs on the host."""
    if teacher is None:
        return None
    if isinstance(teacher, HostTeacher):
        config.teacher.model = f"<{teacher.shown}>"
        return teacher
    if isinstance(teacher, str) and teacher == "ema":
        config.teacher.model = "ema"
        return None
    if isinstance(teacher, str | pathlib.PurePath):
        whole = str(teacher)
        teacher = [whole] if pathlib.Path(expand_home(whole)).exists() else whole.split(",")
    for one in teacher if isinstance(teacher, list) else [teacher]:
        if callable(one) and not isinstance(one, nnx.Module | flax.linen.Module | HostTeacher | type):
            raise UserError(
                "a teacher must be an nnx.Module, (Linen module, variables), (apply, variables) or a HostTeacher, got "
                f"{type(one).__name__}. Wrap it: ldrld_jax.HostTeacher(function), whose function maps NumPy images to "
                "logits."
            )
    if not isinstance(teacher, list):
        config.teacher.model = _entered(teacher, models)
        return None
    paths = [given_path(one) for one in teacher if isinstance(one, str | pathlib.PurePath)]
    if paths and len(paths) < len(teacher):
        raise UserError("several teachers are all paths or all models, got both. Load the paths as models first.")
    if not paths:
        config.teacher.model = ",".join([_entered(one, models) for one in teacher])
        return None
    names = [path for path in paths if _is_model(path)]
    if names and len(names) < len(paths):
        raise UserError("several teachers are all names or all paths, got both. Give the names' weights as paths.")
    if names:
        _name_teacher(config, ",".join(names))
        return None
    if paths[0].rstrip("/").endswith(_LOGITS):
        _name_teacher(config, "logits")
    elif all(map(is_folder, paths)):
        _name_teacher(config, ",".join(map(_trained_model, paths)))
    elif missing := [path for path in paths if not ("://" in path or pathlib.Path(path.partition("::")[0]).exists())]:
        raise unknown("model, file or folder for the teacher:", missing[0], MODELS)
    elif config.teacher.model is None:
        raise UserError(
            f"the teacher {paths[0]} is a file, which does not name its model. Name the model in "
            'config={"teacher.model": "resnet32x4"}, for example.'
        )
    _check_same("teacher.checkpoint", config.teacher.checkpoint, "teacher", ",".join(paths))
    config.teacher.checkpoint = ",".join(paths)
    return None


def _is_model(name: str) -> bool:
    return not pathlib.Path(name).exists() and (name in MODELS or name.startswith("timm/") or is_code(name))


def _name_teacher(config: ConfigDict, model: str) -> None:
    _check_same("teacher.model", config.teacher.model, "teacher", model)
    config.teacher.model = model


def _check_same(key: str, there: Any, argument: str, given: Any) -> None:
    """Raises a UserError if the user's config sets a key, to `there`, that an argument sets otherwise."""
    if there not in (None, given):
        raise UserError(
            f"Trainer(config=...) has {key}={there!r}, and its argument {argument} gives {given!r}. Give one of them."
        )


def _trained_model(workdir: str) -> str:
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"the teacher's {workdir} holds no run (no config.json). Give a run's workdir, or a model.")
    model = saved["student"]["model"]
    if is_object(model):
        raise UserError(
            f"the run in {workdir} trained the object {model}, and its folder has the weights alone. Give the trained "
            "model: teacher=result.student of that run, or Trainer(...).student() with the same arguments."
        )
    return model


def _set_method(config: ConfigDict, method: Any) -> dict[str, Method]:
    """Names the methods in a config and sets their fields; returns those that are objects."""
    names, given = list[str](), dict[str, Method]()
    for one in method if isinstance(method, list | tuple) else [method]:
        if isinstance(one, str):
            names.append(one)
        elif isinstance(one, MethodConfig):
            known = [name for name, entry in METHODS.items() if type(one) is entry.config]
            if not known:
                raise UserError(f"{type(one).__name__} is the config of no method. Give the method itself.")
            if known[0] in names:
                raise UserError(f"method has {known[0]} twice, the second time as {one}. Give it once.")
            names += known
            for field, value in vars(one).items():
                key = f"loss.{known[0]}.{field}"
                _check_same(key, config.loss[known[0]][field], "method", value)
                set_value(config, key, value, "Trainer(method=...)")
        elif inspect.isclass(one):
            raise UserError(f"a method must be an object, got the class {one.__name__}. Give {one.__name__}(...).")
        elif isinstance(one, Method) or callable(one):
            names.append(_entered(one, given, unnamed="loss"))
            given[names[-1]] = as_method(one)
        else:
            raise UserError(
                f"a method must be a name, a config, a ldrld_jax.losses.Method or a function, got {type(one).__name__}."
            )
    config.method = "+".join(names)
    return given


def _set_data(
    config: ConfigDict, train: Any, evaluation: Any, num_classes: int | None, *, own: Mapping[str, Any]
) -> tuple[Source | None, Source | None]:
    """Names the data in a config, in which `own` keys are set already; returns the splits that are objects."""
    if isinstance(train, str | pathlib.PurePath):
        if not (evaluation is None or isinstance(evaluation, str)):
            raise UserError(
                "where train is a name, evaluation must be the name of a split, or None for the usual one, got "
                f"{type(evaluation).__name__}."
            )
        train = given_path(train)
        if is_folder(train):
            _check_same("data.data_dir", config.data.data_dir, "train", train)
            if config.data.name == default().data.name:
                config.data.name = "image_folder"
            config.data.data_dir = train
            config.data.update({key: split for key, split in _FOLDER_SPLITS.items() if f"data.{key}" not in own})
        else:
            _check_same("data.name", own.get("data.name"), "train", train)
            config.data.name = train
        if evaluation is not None:
            _check_same("data.eval_split", own.get("data.eval_split"), "evaluation", evaluation)
            config.data.eval_split = evaluation
        return None, None
    if hasattr(train, "as_data_source"):  # a builder of TFDS
        split = evaluation or config.data.eval_split
        opened = [Source(*open_builder(s, train)) for s in (config.data.train_split, split)]
        check_num_classes(num_classes, len(opened[0].class_names))
        config.data.name, config.data.eval_split = f"<{train.name}>", split
        return opened[0], opened[1]
    first = as_source(train, num_classes=num_classes, title="training data", exif=config.data.exif)
    if evaluation is None and not config.data.held_out:
        raise UserError('evaluation is missing. Give a split, or config={"data.held_out": 0.1} for a part of train.')
    second = None
    if evaluation is not None:
        second = as_source(
            evaluation, num_classes=len(first.class_names), title="evaluation data", exif=config.data.exif
        )
        if second.class_names != first.class_names:
            raise UserError(
                f"the evaluation data have other classes than the training data: {len(second.class_names)} and "
                f"{len(first.class_names)}, or other names. Give both the same, in the same order."
            )
    check_num_classes(num_classes, len(first.class_names))
    config.data.name = "<arrays>" if isinstance(train, tuple | list) else f"<{type(train).__name__}>"
    config.data.train_split, config.data.eval_split = "train", "evaluation"
    return first, second


def check_observers(
    writers: Sequence[LineWriter], callbacks: Sequence[Callback], metrics: Mapping[str, Metric]
) -> None:
    """Raises a UserError if a run cannot call one of them, or a metric has the name of one that each run measures."""
    for given, what in ((writers, "writers"), (callbacks, "callbacks")):
        if not isinstance(given, list | tuple):
            raise UserError(f"{what} must be a list, got {type(given).__name__}. Give [{type(given).__name__}(...)].")
    if not isinstance(metrics, Mapping):
        raise UserError(f"metrics must be a dict from names to functions, got {type(metrics).__name__}.")
    curves: dict[str, str] = {}
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise UserError(f"the name of a metric must be text, got {name!r}.")
        if not callable(metric):
            raise UserError(f"the metric {name!r} must be a function of (logits, labels, where), got {metric!r}.")
        # MLflow refuses a line with such a name, all of it.
        if posixpath.normpath(f"train/{name}") != f"train/{name}":
            raise UserError(
                f"the metric {name!r} must have a name without empty parts, '.' and '..' between slashes, as in 'a/b'."
            )
        if len(name) > _MOST_CHARACTERS:
            raise UserError(
                f"the name of a metric has {len(name)} characters, and at most {_MOST_CHARACTERS} are allowed. Shorten "
                f"{name[:40]!r}..."
            )
        curve = curve_of(name)
        if curve in MEASURED:
            raise UserError(f"the metric {name!r} has the name of one that each run measures. Choose another name.")
        if (other := curves.setdefault(curve, name)) != name:
            raise UserError(f"the metrics {other!r} and {name!r} would be one curve, {curve!r}. Rename one of them.")
    for callback in callbacks:
        if type(callback) is not Callback:  # a subclass too: the fields would hide its methods
            raise UserError(
                f"a callback must be ldrld_jax.Callback(after_save=function), got a {type(callback).__name__}. Pass a "
                "method of it as Callback(after_save=callback.method)."
            )
    for writer in writers:
        check_writer(writer)

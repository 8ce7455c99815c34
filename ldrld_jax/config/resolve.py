"""Resolution of configs: every value that a run uses, its method's weights, and its teacher's recipe."""

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ldrld_jax.code import is_code, load_object
from ldrld_jax.config.keys import check, default
from ldrld_jax.errors import UserError, given_in_python, unknown
from ldrld_jax.identity import is_object
from ldrld_jax.losses import METHODS, Method, as_method

Methods = Mapping[str, Method]
NONE: Methods = MappingProxyType({})

_SELF = "ema"  # as teacher.model: the student's own moving average teaches it
_FILE = "logits"  # as teacher.model: teacher.checkpoint is a file of logits

# timm's architectures whose state_dict has the keys and layouts of a model of ours, which torchvision's have too.
_TIMM = {
    **{f"resnet{depth}": f"imagenet_resnet{depth}" for depth in (18, 34, 50, 101)},
    **{name: name for name in ("vit_tiny_patch16_224", "vit_small_patch16_224")},
}


def method_names(config: ConfigDict, given: Methods = NONE) -> list[str]:
    """Returns the methods of `config.method` ("ldrld+kd"); none for "ce".

    Args:
      config: any.
      given: methods that are objects, by the name that the config has for them.

    Raises:
      UserError: if a name is unknown, or given twice.
    """
    names = [] if config.method == "ce" else config.method.split("+")
    for name in names:
        if is_object(name) and name not in given:
            raise given_in_python(f"method {name}")
        if name not in METHODS and name not in given and not is_code(name):
            parts = [part.strip() for part in name.replace(",", "+").split("+")]
            if name == "ce" and len(names) > 1:
                rest = "+".join(other for other in names if other != "ce")
                raise UserError(
                    f"method {config.method!r} names ce, but every method already adds the cross-entropy, weighted by "
                    f"ce_weight. Set method={rest}."
                )
            if len(parts) > 1 and all(part in METHODS for part in parts):
                raise UserError(f"there is no method {name!r}. Several are written as a sum: method={'+'.join(parts)}.")
            raise unknown("method", name, ["ce", *METHODS])
    if len(set(names)) < len(names):
        raise UserError(f"method {config.method!r} names a method twice. Weight it with loss_weight instead.")
    return names


def method_of(name: str, given: Methods = NONE) -> Method:
    """Returns a method by its name: of METHODS, one that is given, or a user's own code."""
    if name in given:
        return given[name]
    return METHODS[name] if name in METHODS else as_method(load_object(name))


def resolve(config: ConfigDict, given: Methods = NONE) -> ConfigDict:
    """Returns a copy with a value for everything that the run uses, and nothing else.

    Unset fields of the selected methods get their defaults, blocks of other methods are removed, unset
    weights become the methods', and the teacher's unset data and recipe become the student's. A run
    writes the result to `config.json` and takes its identity from it.

    Args:
      config: any.
      given: see `method_names`.

    Raises:
      UserError: if a method's field is out of range, or a teacher is needed and not given.
    """
    check(config)  # again: it may have been changed since it was loaded
    config = copy.deepcopy(config)
    names = method_names(config, given)
    _resolve_weights(config, names, given)
    losses = {name: dataclasses.asdict(method_config(config, name)) for name in names if name in METHODS}
    config.loss = ConfigDict(losses)
    for key in ("data", "optim"):
        for name in config[key]:
            # Runs that differ in order and augmentation share one teacher, and it has a seed of its own.
            if config.teacher[key][name] is None and name != "augment_seed":
                config.teacher[key][name] = config[key][name]
    if config.student.checkpoint is None or config.student.checkpoint_head == "load":
        del config.student.checkpoint_head  # runs from before it do not have it in their identity
    _resolve_published(config.teacher)
    if config.teacher.batch_size is None:
        config.teacher.batch_size = config.batch_size
    if names and teaches_from_file(config):  # the file may have several views
        config.logits = ConfigDict() if config.logits.views is None else ConfigDict({"views": config.logits.views})
    elif not names or config.logits.dir is None:
        config.logits = ConfigDict()
    if not names:
        config.teacher = ConfigDict()
        return config
    if teaches_itself(config):
        config.teacher.checkpoint = config.teacher.epochs = None
        if config.ema_decay is None:
            raise UserError("teacher.model=ema is the student's moving average: set ema_decay, .999 for example.")
        return config
    if teaches_from_file(config) and config.teacher.checkpoint is None:
        raise UserError("teacher.model=logits is a file of logits: set teacher.checkpoint to its path.")
    if config.teacher.model is None or not (
        config.teacher.checkpoint is not None or config.teacher.epochs is not None or has_weights(config)
    ):
        raise UserError(
            f"method {config.method!r} needs a teacher: teacher.model with teacher.checkpoint, or with teacher.epochs "
            "to train it first. Set them, or method=ce."
        )
    if config.teacher.checkpoint is not None:
        config.teacher.epochs = None  # weights at hand go before a recipe
    if config.teacher.epochs is not None and is_object(config.teacher.optim.name) and not has_weights(config):
        raise UserError(
            "teacher.epochs trains the teacher by an optimizer of its own, and the run's is an object. Set "
            "teacher.optim.name, to sgd for example."
        )
    return config


def _resolve_published(teacher: ConfigDict) -> None:
    """Replaces teachers by timm's names, `timm/resnet18.a1_in1k`, by models of ours with the weights on the Hub.

    A checkpoint that is set stays. A revision may follow the name: `timm/resnet18.a1_in1k@COMMIT`.

    Raises:
      UserError: if there is no such model here, or some teachers are timm's and some are not.
    """
    names = (teacher.model or "").split(",")
    timms = [name.removeprefix("timm/") for name in names if name.startswith("timm/")]
    if not timms:
        return
    if len(timms) < len(names) and teacher.checkpoint is None:
        raise UserError(
            f"only the timm models in teacher.model={teacher.model} come with weights. Set teacher.checkpoint for each "
            "model."
        )
    if teacher.checkpoint is None:
        teacher.checkpoint = ",".join(f"hf://timm/{name}" for name in timms)
    teacher.model = ",".join(_ours(name) for name in names)


def _ours(name: str) -> str:
    if not name.startswith("timm/"):
        return name
    architecture = re.split("[.@]", name.removeprefix("timm/"))[0]
    if architecture not in _TIMM:
        raise unknown("model of timm here", architecture, _TIMM)
    return _TIMM[architecture]


def _resolve_weights(config: ConfigDict, names: Sequence[str], given: Methods) -> None:
    """Fills in unset weights: for one method, those that its authors published.

    In a sum each term keeps its authors' weight and the longest warm-up applies to all terms. The weight
    of the cross-entropy is the one that all methods share, else 1.
    """
    methods, alone = [method_of(name, given) for name in names], len(names) == 1
    agreed = {method.ce_weight for method in methods}
    scheduled = config.loss_schedule.kd_weight is not None  # which has the warm-up that it wants
    published = dict(
        ce_weight=agreed.pop() if len(agreed) == 1 else 1.0,
        kd_weight=methods[0].kd_weight if alone else 1.0,
        kd_warmup_epochs=0 if scheduled else max((method.kd_warmup_epochs for method in methods), default=0),
    )
    for key, value in published.items():
        if config[key] is None:
            config[key] = value
    ours = [name for name in names if name in METHODS]  # others have no block in a config
    own = {name: 1.0 if alone else METHODS[name].kd_weight for name in ours}
    chosen = {name: config.loss_weight[name] for name in ours}
    config.loss_weight = ConfigDict({name: own[name] if chosen[name] is None else chosen[name] for name in ours})


def method_config(config: ConfigDict, name: str) -> Any:
    """Returns the config object of one method from its block; unset fields keep the method's defaults.

    Raises:
      UserError: if a field is out of its range.
    """
    given = {key: value for key, value in config.loss[name].items() if value is not None}
    try:
        return METHODS[name].config(**given)
    except ValueError as error:
        raise UserError(f"loss.{name}: {error}") from error


def views(config: ConfigDict, given: Methods = NONE) -> int:
    """Returns the number of views of an image that the methods of a config compare; it need not be resolved."""

    def of(name: str) -> int:
        method = method_of(name, given)
        return method.views(method_config(config, name) if name in METHODS else method.config())

    return max(map(of, method_names(config, given)), default=1)


def teaches_from_file(config: Mapping[str, Any]) -> bool:
    """Returns whether the teacher of a resolved config is a file of logits."""
    return config["teacher"].get("model") == _FILE


def has_weights(config: ConfigDict) -> bool:
    """Returns whether the teachers are objects or a user's code, which may come with their weights."""
    return all(is_object(name) or is_code(name) for name in teacher_models(config))


def teaches_itself(config: Mapping[str, Any]) -> bool:
    """Returns whether the student of a resolved config is taught by its own moving average."""
    return config["teacher"].get("model") == _SELF


def teacher_models(config: ConfigDict) -> list[str]:
    """Returns the names in `teacher.model`, several for an ensemble."""
    return config.teacher.model.split(",")


def teacher_checkpoints(config: Mapping[str, Any]) -> list[str]:
    """Returns the paths in `teacher.checkpoint`, one for each model; a comma is part of the path of a single teacher.

    Example:
      >>> teacher_checkpoints({"teacher": {"model": "resnet8", "checkpoint": "runs/a,b"}})
      ['runs/a,b']
      >>> teacher_checkpoints({"teacher": {"model": "resnet8,resnet20", "checkpoint": "runs/a,b"}})
      ['runs/a', 'b']
    """
    models, given = (config["teacher"].get(key) or "" for key in ("model", "checkpoint"))
    if not given:
        return []
    return given.split(",") if "," in models else [given]


def teacher_runs(config: ConfigDict, workdir: epath.Path) -> list[tuple[ConfigDict, epath.Path]]:
    """Returns the recipe and the workdir of each teacher that a resolved config trains first.

    Args:
      config: resolved.
      workdir: of the run.
    """
    root = epath.Path(config.teacher.workdir or workdir / "teacher")
    models = teacher_models(config)
    places = [root] if len(models) == 1 else [root / f"{i}-{model}" for i, model in enumerate(models)]
    recipes = [teacher_recipe(config, model) for model in models]
    for i, recipe in enumerate(recipes):
        recipe.seed += i  # an ensemble of one model is one of several seeds
    return list(zip(recipes, places, strict=True))


def teacher_recipe(config: ConfigDict, model: str) -> ConfigDict:
    """Returns the config, to be resolved, of the plain training run that makes one teacher of a resolved config."""
    teacher, recipe = config.teacher, default()
    for key in (
        "eval_batch_size",
        "precision",
        "matmul_precision",
        "mesh",
        "log",
        "checkpoint",
        "eval_every_epochs",
        "remat",
    ):
        recipe[key] = copy.deepcopy(config[key])
    recipe.steps_per_dispatch = config.steps_per_dispatch if teacher.data.loader == "resident" else 1
    recipe.method = "ce"
    recipe.seed, recipe.epochs, recipe.batch_size = teacher.seed, teacher.epochs, teacher.batch_size
    recipe.student.model = model
    recipe.data, recipe.optim = copy.deepcopy(teacher.data), copy.deepcopy(teacher.optim)
    return recipe

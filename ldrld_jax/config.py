"""Configs: every key with its default, the files and flags that override them, and a run's identity.

A file in `configs/` defines `get_config(arg="")` and gives an `ml_collections.ConfigDict` that holds
only what differs from `default()`. `--config` executes that file: it is Python, trust it as such.
"""

import ast
import copy
import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from etils import epath
from ml_collections import ConfigDict, config_dict

from ldrld_jax.errors import UserError, unknown
from ldrld_jax.identity import flat as flat
from ldrld_jax.identity import identity as identity
from ldrld_jax.losses import METHODS
from ldrld_jax.record.reader import read_config

ENSEMBLES = ("logits", "probabilities")
_SELF = "ema"  # as teacher.model: the student's own moving average teaches it


def default() -> ConfigDict:
    """Every config key with its default; a key that may stay unset is a typed placeholder.

    Example:
      >>> default().teacher.checkpoint is None, default().optim.momentum
      (True, 0.9)
    """
    config = ConfigDict()
    config.seed = 0  # of initialisation, order and, unless data.augment_seed is set, augmentation
    config.epochs = 1  # full passes over the training split
    config.batch_size = 64  # global, whatever the number of devices
    config.eval_batch_size = 256  # likewise
    config.precision = "float32"  # of the computation: float32 | bfloat16 | float64; parameters are never below float32
    # Of float32 products on a GPU or TPU: tensorfloat32 (19 bits; three bfloat16 passes on a TPU), float32 (exact), ...
    config.matmul_precision = "tensorfloat32"
    config.method = "ldrld"  # a key of METHODS, several as "ldrld+kd", or "ce" for plain training
    config.ce_weight = config_dict.placeholder(float)  # unset: the method's published one; 1 for several that differ
    config.kd_weight = config_dict.placeholder(float)  # of all distillation terms; unset: the method's; 1 for several
    # The distillation terms are multiplied by min(epoch / this, 1); unset: the method's, for several the longest.
    config.kd_warmup_epochs = config_dict.placeholder(int)
    config.standardize = False  # logit standardisation of both sides before every method
    config.label_smoothing = 0.0  # of the cross-entropy
    config.ema_decay = config_dict.placeholder(float)  # evaluate a moving average of the student; unset: the student
    config.accumulate = 1  # microbatches whose gradients make one step: less memory, the same batch_size
    config.batch_norm_group = config_dict.placeholder(int)  # statistics of so many examples; unset: of the (micro)batch
    config.remat = False  # keep only what convolutions and products gave, and compute the rest again: less memory
    config.non_finite = "stop"  # at a loss or gradient that is not finite: stop | skip the step, and count it
    config.loss = ConfigDict({name: _method_block(name) for name in METHODS})  # unset: the method's default
    # Of each term beside kd_weight; unset: 1 for a method alone, its published kd_weight among several.
    config.loss_weight = ConfigDict({name: config_dict.placeholder(float) for name in METHODS})
    config.data = _data()
    config.student = ConfigDict()
    config.student.model = "resnet8"  # a key of MODELS: python -m ldrld_jax.models.table
    config.student.checkpoint = config_dict.placeholder(str)  # weights to start from
    config.optim = _optim()
    config.teacher = ConfigDict()
    config.teacher.model = config_dict.placeholder(str)  # "a,b" for an ensemble, "ema" for the student's own average
    config.teacher.checkpoint = config_dict.placeholder(str)  # a workdir of ours or a PyTorch file; "x,y" for "a,b"
    config.teacher.epochs = config_dict.placeholder(int)  # if there is no checkpoint: train it first, into
    config.teacher.workdir = config_dict.placeholder(str)  # unset: WORKDIR/teacher; set it to share one teacher
    config.teacher.ensemble = ENSEMBLES[0]  # what an ensemble averages: logits | probabilities
    config.teacher.min_top1 = 0.0  # percent on the evaluation split; a weaker teacher is refused
    config.teacher.seed = 0  # of the teacher that the run trains first
    config.teacher.batch_size = config_dict.placeholder(int)  # unset: the student's
    # The teacher's own data and recipe; unset: the student's, but for augment_seed: teacher.seed.
    config.teacher.data = _placeholders(config.data)
    config.teacher.optim = _placeholders(config.optim)
    config.steps_per_dispatch = 1  # so many in one program, with data.loader=resident; not on a CPU: docs/bench.md
    config.compile_cache = "~/.cache/ldrld_jax/compiled"  # compiled programs are kept here for the next start; "": not
    config.logits = ConfigDict()  # a store of the teacher's logits: the first run writes it, later ones run no teacher
    config.logits.dir = config_dict.placeholder(str)  # where it lies, for any number of runs; unset: no store
    config.logits.dtype = "float16"  # in which they are stored and taught: float16 | bfloat16 | float32
    config.logits.views = config_dict.placeholder(int)  # k: epoch e is augmented as epoch e % k; unset: each anew
    config.compile = ConfigDict()  # of --mode compile: what it takes of data that are not here and not described
    config.compile.train_images = config_dict.placeholder(int)  # of the training split
    config.compile.eval_images = config_dict.placeholder(int)  # of the evaluation split
    config.compile.classes = config_dict.placeholder(int)  # that images are told apart into
    config.compile.image_shape = config_dict.placeholder(tuple)  # height, width, channels, as stored
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices over which the batch is split; -1: all that are left
    config.mesh.model = 1  # devices over which each layer's outputs are split
    config.mesh.fsdp = False  # split parameters, optimizer state and teacher over mesh.data as well: less memory
    config.log = ConfigDict()
    config.log.every_steps = 50  # a line of metrics.jsonl each, the mean since the one before
    config.log.tensorboard = True  # write event files too
    config.log.watchdog_seconds = 300.0  # without progress, until the stacks of all threads are printed; 0: never
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = config_dict.placeholder(int)  # beside those after each evaluation
    config.checkpoint.keep_last = 2  # beside the best, which is always kept
    config.checkpoint.keep_every_epochs = config_dict.placeholder(int)  # one every so many epochs is kept for good
    config.eval_every_epochs = 1  # and after the last epoch
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    data.name = "digits"  # any TFDS image classification dataset, or the digits that ship with scikit-learn
    data.data_dir = config_dict.placeholder(str)  # unset: TFDS's own default, ~/tensorflow_datasets
    data.train_split = "train"  # "train[:90%]" takes a part
    data.eval_split = "test"  # likewise; "validation" or "val" elsewhere
    data.loader = "stream"  # stream | resident: all images decoded in each device's memory, batches made there
    data.threads = 4  # that prepare batches ahead of the step
    data.cache_mb = 1024  # decoded images that are always the same are kept in host memory up to this
    data.remainder = "keep"  # the last partial batch of an epoch: keep | drop
    data.on_error = "raise"  # at an image that does not decode or a label out of range: raise | skip
    data.exif = True  # turn images as their EXIF orientation says; torchvision's teachers never saw them turned
    data.augment = "pad_crop"  # pad_crop | random_resized_crop (to crop_size) | rotate
    data.pad = 0  # pad_crop: of the image padded with this many zeros on each side
    data.crop_area = (0.08, 1.0)  # random_resized_crop: the share of the image, from and to
    data.rotate_degrees = 20.0  # rotate: by up to this, either way
    data.flip = False  # horizontally, every other image, with any of them
    data.rand_augment = 0  # so many random distortions of each training image
    data.rand_magnitude = 9  # their strength, 0 to 30
    data.augment_seed = config_dict.placeholder(int)  # of crops, mirrors and the like; unset: seed
    data.mixup = 0.0  # alpha: neighbours in a batch are blended by a share from Beta(alpha, alpha); 0: not
    data.resize_size = config_dict.placeholder(int)  # evaluation: the shorter side is resized to this; unset: crop_size
    data.crop_size = config_dict.placeholder(int)  # evaluation: then the middle square of this size; unset: as stored
    data.seed = 0  # of the choices that follow, so that runs of many seeds share one training set
    data.held_out = 0.0  # this share of each training class is kept out, and evaluated on instead of eval_split
    data.fraction = 1.0  # of each class that is trained on
    data.imbalance = 1.0  # largest class over smallest, sizes falling exponentially with the label
    data.label_noise = "none"  # none | symmetric (to any other class) | asymmetric (to the next class)
    data.label_noise_rate = 0.0  # the share of training labels that are changed
    data.mean = (0.5,)  # per channel, of pixels scaled to 0..1
    data.std = (0.5,)  # likewise
    data.image_size = config_dict.placeholder(int)  # resize to a square before the model; unset: as stored
    return data


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.name = "sgd"  # sgd | adamw
    optim.learning_rate = 0.05  # the highest of the schedule
    optim.momentum = 0.9  # sgd; adamw takes it as b1
    optim.nesterov = False  # look ahead along the momentum
    optim.weight_decay = 5e-4  # of all parameters; sgd adds it to the gradient before the momentum
    optim.clip_norm = config_dict.placeholder(float)  # gradients with a larger norm are scaled down to this one
    optim.schedule = "step"  # step | cosine | constant
    optim.decay_epochs = (150, 180, 210)  # step: after these epochs
    optim.decay_rate = 0.1  # step: times this each time
    optim.warmup = "none"  # official | linear | none
    optim.warmup_epochs = 20  # of either form
    return optim


def _placeholders(block: ConfigDict) -> ConfigDict:
    return ConfigDict({key: config_dict.placeholder(block.get_type(key)) for key in block})


def _method_block(name: str) -> ConfigDict:
    fields = dataclasses.fields(METHODS[name].config)
    return ConfigDict({field.name: config_dict.placeholder(_plain_type(field.type)) for field in fields})


def _plain_type(kind: Any) -> type:
    """Of an annotation: float of `Annotated[float, ...]`, str of `Literal["a", "b"]`."""
    while get_origin(kind) is not None:
        kind = get_args(kind)[0]
    return kind if isinstance(kind, type) else type(kind)


def load(path: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of a file over the defaults, then `overrides` over both.

    Args:
      path: `configs/cifar100.py` or `configs/cifar100.py:arg`; looked up in the working directory,
        then in the installed package.
      overrides: `key=value` strings, `optim.learning_rate=.1`.

    Raises:
      UserError: if the file is not found or fails, or a key or value is not allowed.
    """
    file, _, arg = path.partition(":")
    found = _find(file)
    spec = importlib.util.spec_from_file_location("ldrld_jax_config_file", found)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        changes = module.get_config(arg) if arg else module.get_config()
    except Exception as error:
        raise UserError(f"config {path} failed: {type(error).__name__}: {error}") from error
    config = default()
    for key, value in _leaves(changes):
        _set(config, key, value, source=file)
    return overridden(config, overrides)


def load_run(workdir: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config that a run in `workdir` was trained with, then `overrides`.

    Raises:
      UserError: if there is no run, or a key or value is not allowed.
    """
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"there is no checkpoint of a run in {workdir} (no config.json). Set --workdir.")
    config = default()
    for key, value in _leaves(ConfigDict(saved)):
        if key == "compile_cache":  # of this machine, whoever made the run: what lies there is executed
            continue
        _set(config, key, value, source=f"{workdir}/config.json")
    return overridden(config, overrides)


def overridden(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Sets the `key=value` overrides in a config, and returns it.

    Raises:
      UserError: if a key or value is not allowed.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"an override is key=value, got {override!r}.")
        _set(config, key, _parse(config, key, text), source=f"--config.{override}")
    return config


def _find(file: str) -> pathlib.Path:
    package = pathlib.Path(__file__).parent
    places = [pathlib.Path(file), package / file, package.parent / file]
    for place in places:
        if place.is_file():
            return place
    known = sorted(p.name for place in {p.parent for p in places} if place.is_dir() for p in place.glob("*.py"))
    raise UserError(f"there is no config file {file!r}, here or in the package. Known: {', '.join(known) or 'none'}.")


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from _leaves(config[key], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", config[key]


def _block(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The block that holds a dotted key, and the key's last part."""
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
    """The keys of the deepest block that exists on the way to a wrong key; all for a wrong first part."""
    prefix = ""
    for part in path:
        config, prefix = config[part], f"{prefix}{part}."
    return [prefix + key for key in config]


def _parse(config: ConfigDict, key: str, text: str) -> Any:
    block, last = _block(config, key)
    kind = block.get_type(last)
    if text == "None" and block[last] is None:
        return None
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(f"{key} must be of type {kind.__name__}, got {text!r}.") from None


def _set(config: ConfigDict, key: str, value: Any, source: str) -> None:
    block, last = _block(config, key)
    kind = block.get_type(last)
    if kind is tuple and isinstance(value, list | int | float):
        value = tuple(value) if isinstance(value, list) else (value,)
    wrong_bool = isinstance(value, bool) != (kind is bool) and value is not None
    try:
        if wrong_bool:
            raise TypeError
        block[last] = value
    except TypeError:
        raise UserError(f"{key} must be of type {kind.__name__}, got {value!r} ({source}).") from None


def method_names(config: ConfigDict) -> list[str]:
    """The methods of `config.method` ("ldrld+kd"), checked; none for "ce".

    Raises:
      UserError: if a name is not in METHODS, or stands there twice.
    """
    names = [] if config.method == "ce" else config.method.split("+")
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, ["ce", *METHODS])
    if len(set(names)) < len(names):
        raise UserError(f"method {config.method!r} names a method twice. Weight it with loss_weight instead.")
    return names


def resolve(config: ConfigDict) -> ConfigDict:
    """A copy in which everything that the run uses stands as a number, and nothing that it does not.

    Unset fields of the selected methods get their defaults, blocks of other methods are removed, the
    weights around the term are the method's, and the teacher's unset data and recipe the student's.
    What a run writes to `config.json`, and what its identity is taken from.

    Raises:
      UserError: if a method's field is out of range, or a teacher is needed and not given.
    """
    config = copy.deepcopy(config)
    names = method_names(config)
    _resolve_weights(config, names)
    losses = {name: dataclasses.asdict(method_config(config, name)) for name in names}
    config.loss = ConfigDict(losses)
    for key in ("data", "optim"):
        for name in config[key]:
            # Runs that differ in order and augmentation share one teacher, and it has a seed of its own.
            if config.teacher[key][name] is None and name != "augment_seed":
                config.teacher[key][name] = config[key][name]
    if config.teacher.batch_size is None:
        config.teacher.batch_size = config.batch_size
    if not names or config.logits.dir is None:
        config.logits = ConfigDict()
    if not names:
        config.teacher = ConfigDict()
        return config
    if config.teacher.ensemble not in ENSEMBLES:
        raise unknown("teacher.ensemble", config.teacher.ensemble, ENSEMBLES)
    if teaches_itself(config):
        config.teacher.checkpoint = config.teacher.epochs = None
        if config.ema_decay is None:
            raise UserError("teacher.model=ema is the student's moving average: set ema_decay, .999 for example.")
        return config
    if config.teacher.model is None or (config.teacher.checkpoint is None and config.teacher.epochs is None):
        raise UserError(
            f"method {config.method!r} needs a teacher: teacher.model with teacher.checkpoint, or with teacher.epochs "
            "to train it first. Set them, or method=ce."
        )
    if config.teacher.checkpoint is not None:
        config.teacher.epochs = None  # weights at hand go before a recipe
    return config


def _resolve_weights(config: ConfigDict, names: Sequence[str]) -> None:
    """Fills in the weights around the terms: of one method as its authors set them.

    In a sum each term keeps its authors' weight, the longest warm-up goes for all, and so does the weight
    of the cross-entropy that they agree on; where they do not, it is 1.
    """
    methods, alone = [METHODS[name] for name in names], len(names) == 1
    agreed = {method.ce_weight for method in methods}
    published = dict(
        ce_weight=agreed.pop() if len(agreed) == 1 else 1.0,
        kd_weight=methods[0].kd_weight if alone else 1.0,
        kd_warmup_epochs=max((method.kd_warmup_epochs for method in methods), default=0),
    )
    for key, value in published.items():
        if config[key] is None:
            config[key] = value
    own = {name: 1.0 if alone else METHODS[name].kd_weight for name in names}
    given = {name: config.loss_weight[name] for name in names}
    config.loss_weight = ConfigDict({name: own[name] if given[name] is None else given[name] for name in names})


def method_config(config: ConfigDict, name: str) -> Any:
    """The config object of one method, from its block; unset fields keep the method's defaults.

    Raises:
      UserError: if a field is out of its range.
    """
    given = {key: value for key, value in config.loss[name].items() if value is not None}
    try:
        return METHODS[name].config(**given)
    except ValueError as error:
        raise UserError(f"loss.{name}: {error}") from error


def teaches_itself(config: Mapping[str, Any]) -> bool:
    """Returns whether the student of a resolved config is taught by its own moving average."""
    return config["teacher"].get("model") == _SELF


def teacher_models(config: ConfigDict) -> list[str]:
    """The names in `teacher.model`, several for an ensemble."""
    return config.teacher.model.split(",")


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
    """The plain training run that makes one teacher of a resolved config: a config to `resolve`."""
    teacher, recipe = config.teacher, default()
    for key in ("eval_batch_size", "precision", "matmul_precision", "mesh", "log", "checkpoint", "eval_every_epochs"):
        recipe[key] = copy.deepcopy(config[key])
    recipe.steps_per_dispatch = config.steps_per_dispatch if teacher.data.loader == "resident" else 1
    recipe.method = "ce"
    recipe.seed, recipe.epochs, recipe.batch_size = teacher.seed, teacher.epochs, teacher.batch_size
    recipe.student.model = model
    recipe.data, recipe.optim = copy.deepcopy(teacher.data), copy.deepcopy(teacher.optim)
    return recipe

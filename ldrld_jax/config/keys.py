"""Every config key with its type, range, default and purpose, and the check of a config against them."""

import dataclasses
import math
import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
from ml_collections import ConfigDict, config_dict

from ldrld_jax.errors import UserError, unknown
from ldrld_jax.files import given_path
from ldrld_jax.identity import leaves
from ldrld_jax.losses import METHODS


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
      low, high: its ends.
      above_low, below_high: whether the ends are left out.
    """

    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    below_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.above_low else value >= self.low
        below = value < self.high if self.below_high else value <= self.high
        return abs(value) <= sys.float_info.max and above and below  # an integer may be larger than any float

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above_low else f"at least {self.low}"
        high = f"below {self.high}" if self.below_high else f"at most {self.high}"
        ends = [text for end, text in ((self.low, low), (self.high, high)) if math.isfinite(end)]
        return " and ".join(ends) or "finite"


@dataclasses.dataclass(frozen=True)
class Words:
    """A kind of text.

    Attributes:
      name: for errors and documentation.
      empty: whether it may be empty.
    """

    name: str
    empty: bool = False

    def __contains__(self, value: str) -> bool:
        return (self.empty or bool(value)) and "\0" not in value

    def __str__(self) -> str:
        return self.name


Text = Annotated[str, Words("text that is not empty")]
Path = Annotated[str, Words("a path")]  # ~ is expanded
Paths = Annotated[str, Words("paths separated by commas")]  # ~ is expanded in each
Unit = Annotated[float, Range(0, 1)]
PositiveUnit = Annotated[float, Range(0, 1, above_low=True)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above_low=True)]
Share = Annotated[float, Range(0, 1, below_high=True)]
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Ensembling = Literal["logits", "probabilities"]


@dataclasses.dataclass(frozen=True)
class Data:
    # a TFDS dataset, image_folder, tiny_imagenet, file_list, decoded, "arrays:FILE.npz" or "my_module:source"
    name: Text = "digits"
    data_dir: Path | None = None  # folder of the data; unset: TFDS's own default, ~/tensorflow_datasets
    train_split: Text = "train"  # split to train on; "train[:90%]" takes a part of TFDS's splits and of digits
    # split to evaluate on, often "validation" or "val"; "test[:90%]" takes a part of TFDS's splits and of digits
    eval_split: Text = "test"
    # stream: decode images batch by batch; resident: keep all of them decoded on each device
    loader: Literal["stream", "resident"] = "stream"
    threads: Count | None = None  # threads that prepare batches ahead of the step; unset: one per core, from 4 to 32
    # processes in place of threads, for images not kept in memory; 0: none; unset: chosen by cores and images
    workers: Whole | None = None
    cache_mb: Whole = 1024  # host memory in MB for decoded images that are the same in each epoch
    remainder: Literal["keep", "drop"] = "keep"  # keep or drop the last partial batch of an epoch
    # raise an error at an image that is missing or does not decode or a label out of range, or skip it
    on_error: Literal["raise", "skip"] = "raise"
    max_skipped: Unit = 0.05  # largest share of a split's images that on_error=skip may skip
    exif: bool = True  # rotate images by their EXIF orientation; False for torchvision's teachers, trained without
    # random change of training images; random_resized_crop needs crop_size
    augment: Literal["pad_crop", "random_resized_crop", "rotate"] = "pad_crop"
    pad: Whole = 0  # pixels of zeros on each side of an image before pad_crop crops it
    crop_area: tuple[Positive, ...] = (0.08, 1.0)  # share of the image that random_resized_crop takes, from and to
    rotate_degrees: NotNegative = 20.0  # largest angle by which rotate turns an image, either way
    flip: bool = False  # flip half of the training images horizontally, with any augmentation
    rand_augment: Whole = 0  # number of random distortions of each training image
    rand_magnitude: Annotated[int, Range(0, 30)] = 9  # strength of the distortions of rand_augment
    augment_seed: Seed | None = None  # seed of crops, flips and the like; unset: seed
    # alpha of mixup: two images of a batch are blended with a weight drawn from Beta(alpha, alpha); 0: no mixup
    mixup: NotNegative = 0.0
    resize_size: Count | None = None  # length to which the shorter side is resized for evaluation; unset: crop_size
    # side to which images are cropped, at random by random_resized_crop, else in the centre; unset: not cropped
    crop_size: Count | None = None
    # seed of held_out, fraction, imbalance and label_noise, so that runs of many seeds share one training set
    seed: Seed = 0
    held_out: Share = 0.0  # share of each training class that is kept out and evaluated on instead of eval_split
    fraction: PositiveUnit = 1.0  # share of each class that is trained on
    # ratio of the largest class size to the smallest; sizes decay exponentially with the label; 1: unchanged
    imbalance: Annotated[float, Range(1)] = 1.0
    # new class of a changed training label: any other class (symmetric) or the next one (asymmetric)
    label_noise: Literal["none", "symmetric", "asymmetric"] = "none"
    label_noise_rate: Unit = 0.0  # share of training labels that are changed
    mean: tuple[Unit, ...] = (0.5,)  # mean per channel of pixels scaled to 0..1, which is subtracted
    # standard deviation per channel of pixels scaled to 0..1, by which they are divided
    std: tuple[PositiveUnit, ...] = (0.5,)
    image_size: Count | None = None  # side to which images are resized before the model; unset: as stored


@dataclasses.dataclass(frozen=True)
class Optim:
    name: Text = "sgd"  # sgd with momentum in PyTorch's form, adamw, another of optax's, or "my_module:make_optimizer"
    learning_rate: NotNegative = 0.05  # highest learning rate of the schedule
    momentum: Share = 0.9  # momentum of sgd, and b1 of adamw
    nesterov: bool = False  # use Nesterov momentum
    weight_decay: NotNegative = 5e-4  # decay of all parameters; sgd adds it to the gradient before the momentum
    # largest norm of the gradient, to which larger ones are scaled down; unset: no limit
    clip_norm: Positive | None = None
    # course of the learning rate: lowered at decay_epochs, falling to 0 along half a cosine, or constant
    schedule: Literal["step", "cosine", "constant"] = "step"
    decay_epochs: tuple[Whole, ...] = (150, 180, 210)  # epochs after which schedule=step lowers the learning rate
    decay_rate: NotNegative = 0.1  # factor of the learning rate at each of decay_epochs
    # warm-up of the learning rate; official: as the published LDRLD code does it
    warmup: Literal["official", "linear", "none"] = "none"
    warmup_epochs: Count = 20  # length of the warm-up, in epochs


@dataclasses.dataclass(frozen=True)
class Student:
    model: Text = "resnet8"  # key of MODELS (python -m ldrld_jax.models.table), or "my_module:make_net"
    checkpoint: Path | None = None  # weights to start from
    # load the last layer of checkpoint as well, or skip it for other classes
    checkpoint_head: Literal["load", "skip"] = "load"


@dataclasses.dataclass(frozen=True)
class Teacher:
    # a model; "a,b": an ensemble; timm/NAME with its weights; "ema": the student's average; "logits": a file of logits
    model: Text | None = None
    # a run's workdir, a PyTorch file or hf://OWNER/NAME[@REVISION]; "x,y" for "a,b"; an array file for "logits"
    checkpoint: Paths | None = None
    epochs: Count | None = None  # epochs for which the run trains the teacher first, if there is no checkpoint
    # folder of the teacher that the run trains first; unset: WORKDIR/teacher; set it to share one teacher
    workdir: Path | None = None
    ensemble: Ensembling = "logits"  # outputs that an ensemble averages
    # minimum top-1 in percent on the evaluation split; a weaker teacher is refused
    min_top1: Annotated[float, Range(0, 100)] = 0.0
    seed: Seed = 0  # seed of the teacher that the run trains first
    batch_size: Count | None = None  # batch size of the teacher that the run trains first; unset: the student's
    # The teacher's own data and optimizer. Unset keys take the student's values; augment_seed takes teacher.seed.
    data: Data = Data()
    optim: Optim = Optim()


@dataclasses.dataclass(frozen=True)
class LossSchedule:
    # kd_weight by epoch: "linear:0@1:1@20" is 0 in the first epoch and 1 from the twentieth on
    kd_weight: Text | None = None
    alpha: Text | None = None  # alpha by epoch, in each method that has one
    beta: Text | None = None  # beta by epoch, in each method that has one
    gamma: Text | None = None  # gamma by epoch, in each method that has one: "cosine:600@150:0@240"
    temperature: Text | None = None  # temperature by epoch, in each method that has one: "steps:4@1:2@100"


@dataclasses.dataclass(frozen=True)
class Logits:
    dir: Path | None = None  # folder of a store of the teacher's logits, for any number of runs; unset: no store
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # type in which logits are stored and enter the loss
    views: Count | None = None  # number k of stored epochs: augmentations repeat every k epochs; unset: never
    # number of largest logits kept of each image, with the log-sum-exp of the others; unset: all
    top_k: Count | None = None
    # with top_k, let methods that read every logit get the rest spread evenly over its classes
    spread_rest: bool = False


@dataclasses.dataclass(frozen=True)
class Compile:
    train_images: Count | None = None  # number of images of an absent training split
    eval_images: Count | None = None  # number of images of an absent evaluation split
    classes: Annotated[int, Range(2)] | None = None  # number of classes of absent data
    image_shape: tuple[Count, ...] | None = None  # height, width and channels of absent images, as stored


@dataclasses.dataclass(frozen=True)
class Check:
    images: Count | None = None  # number of images of each split that are decoded and evaluated; unset: all


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: Annotated[int, Range(-1)] = -1  # devices over which the batch is split; -1: all remaining ones
    model: Count = 1  # devices over which each layer's outputs are split
    fsdp: bool = False  # split parameters, optimizer state and teacher over mesh.data as well: less memory


@dataclasses.dataclass(frozen=True)
class Wandb:
    project: Text | None = None  # project of Weights & Biases to which metrics go too, with the extra wandb


@dataclasses.dataclass(frozen=True)
class Log:
    every_steps: Count = 50  # number of steps that each training line of metrics.jsonl averages
    tensorboard: bool = True  # write TensorBoard's event files too
    writers: Text | None = None  # further writers, "my_module:make_writer" each, separated by commas
    wandb: Wandb = Wandb()
    mlflow: Text | None = None  # experiment of MLflow to which metrics go too, with the extra mlflow
    watchdog_seconds: NotNegative = 300.0  # seconds without progress until all stacks are printed; 0: never


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every_steps: Count | None = None  # steps between checkpoints saved in addition to one per evaluation; unset: none
    keep_last: Count = 2  # number of newest checkpoints that are kept in addition to the best
    keep_every_epochs: Count | None = None  # epochs between checkpoints that are kept for good; unset: none
    min_seconds: NotNegative = 10.0  # seconds between writes; a checkpoint that comes sooner waits in memory


@dataclasses.dataclass(frozen=True)
class Config:
    seed: Seed = 0  # seed of initialisation, order and, unless data.augment_seed is set, augmentation
    epochs: Count = 1  # full passes over the training split
    batch_size: Count = 64  # examples of a step on all devices together
    eval_batch_size: Count = 256  # examples of a batch of the evaluation on all devices together
    # type of the computation; parameters are never below float32
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    # precision of float32 products on a GPU or TPU; tensorfloat32: 19 bits, or three bfloat16 passes on a TPU
    matmul_precision: Literal["default", "tensorfloat32", "float32"] = "tensorfloat32"
    method: Text = "ldrld"  # a key of METHODS, "my_module:loss", several as "ldrld+kd", or "ce" for plain training
    # weight of the cross-entropy; unset: the method's published one, or 1 for several that differ
    ce_weight: NotNegative | None = None
    # weight of all distillation terms; unset: the method's published one, or 1 for several
    kd_weight: NotNegative | None = None
    # epochs over which the weight of the distillation terms rises linearly to kd_weight; unset: the methods' longest
    kd_warmup_epochs: Whole | None = None
    loss_schedule: LossSchedule = LossSchedule()  # numbers of the loss by epoch, as FORM:VALUE@EPOCH:VALUE@EPOCH
    standardize: bool = False  # standardise the logits of both sides before every method
    label_smoothing: Share = 0.0  # smoothing of the labels of the cross-entropy
    # decay of a moving average of the student, which is evaluated in its place; unset: no average
    ema_decay: Share | None = None
    accumulate: Count = 1  # microbatches whose gradients make one step: less memory, the same batch_size
    batch_norm_group: Count | None = None  # examples whose statistics BatchNorm takes together; unset: the (micro)batch
    remat: bool = False  # keep only the outputs of convolutions and products, and compute the rest again: less memory
    # stop at a loss or weights that are not finite, or skip such steps and count them
    non_finite: Literal["stop", "skip"] = "stop"
    data: Data = Data()
    student: Student = Student()
    optim: Optim = Optim()
    teacher: Teacher = Teacher()
    steps_per_dispatch: Count = 1  # steps in one program, with data.loader=resident; not on a CPU (docs/bench.md)
    # folder in which compiled programs are kept for the next start; "": keep none
    compile_cache: Annotated[str, Words("a path, or empty", empty=True)] = "~/.cache/ldrld_jax/compiled"
    logits: Logits = Logits()  # a store of the teacher's logits: the first run writes it, later ones run no teacher
    compile: Compile = Compile()  # sizes of a dataset that --mode compile cannot find on this machine
    check: Check = Check()  # settings of --mode check
    mesh: Mesh = Mesh()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()
    eval_every_epochs: Count = 1  # epochs between evaluations; the last epoch is always evaluated


def default() -> ConfigDict:
    """Returns a config with every key at its default; a key that may stay unset is a typed placeholder.

    Example:
      >>> default().teacher.checkpoint is None, default().optim.momentum
      (True, 0.9)
    """
    config = _defaults(Config)
    config.loss = ConfigDict({name: _defaults(method.config, unset=True) for name, method in METHODS.items()})
    # Of each term beside kd_weight; unset: 1 for a method alone, its published kd_weight among several.
    config.loss_weight = ConfigDict({name: config_dict.placeholder(float) for name in METHODS})
    return config


def _defaults(block: Any, *, unset: bool = False) -> ConfigDict:
    """Returns a block of defaults; `unset` makes a placeholder of each."""
    values = ConfigDict()
    for field in dataclasses.fields(block):
        if dataclasses.is_dataclass(field.type):
            values[field.name] = _defaults(field.type, unset=field.type in (Data, Optim) and block is Teacher)
        else:
            as_is = not unset and field.default is not None
            values[field.name] = field.default if as_is else config_dict.placeholder(plain_type(field.type))
    return values


def plain_type(kind: Any) -> type:
    """Returns the type that a value has: float for `Annotated[float, ...]`, str for `Literal["a", "b"] | None`."""
    while get_origin(kind) is not None and get_origin(kind) is not tuple:
        kind = get_args(kind)[0]
    kind = get_origin(kind) or kind
    return kind if isinstance(kind, type) else type(kind)


def _kinds(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(block):
        if dataclasses.is_dataclass(field.type):
            yield from _kinds(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.type


KINDS: dict[str, Any] = {**dict(_kinds(Config)), **{f"loss_weight.{name}": NotNegative for name in METHODS}}
"""The annotation of each dotted key; a method's own keys are checked by its config class."""


def allowed(key: str) -> str:
    """Describes the values that a key may have.

    Example:
      >>> allowed("epochs"), allowed("data.remainder"), allowed("data.std")
      ('at least 1', 'keep | drop', 'above 0 and at most 1 each')
    """
    kind = _without_none(KINDS[key])
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return f"{get_args(kind)[0].__metadata__[0]} each"
    return str(kind.__metadata__[0]) if get_origin(kind) is Annotated else "True | False"


def items_of(key: str) -> Any:
    """Returns the annotation of the numbers of a key that holds several."""
    return get_args(_without_none(KINDS[key]))[0]


def _without_none(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) in (Union, types.UnionType) else kind


def may_be_unset(key: str) -> bool:
    """Returns whether None is a value of a key."""
    inherited = key.startswith(("loss.", "loss_weight.", "teacher.data.", "teacher.optim."))
    return inherited or type(None) in get_args(KINDS[key])


def coerce(value: Any) -> Any:
    """Converts NumPy numbers to Python's and lists to tuples; returns anything else unchanged."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(map(coerce, value))
    return value


def expanded(value: str, kind: Any) -> str:
    """Expands ~ in a path, and checks that a remote one can be opened; returns other text unchanged."""
    if (kind := _without_none(kind)) not in (Path, Paths):
        return value
    return ",".join(map(given_path, value.split(",") if kind is Paths else [value]))


def check_value(key: str, value: Any, kind: Any) -> None:
    """Raises a UserError unless a value is of its key's kind and in its range; None stands for unset."""
    kind = _without_none(kind)
    if value is None:
        return
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(key, value, get_args(kind))
    elif get_origin(kind) is tuple:
        if not value and kind != tuple[Whole, ...]:
            raise UserError(f"{key} must hold at least one number, got {value!r}.")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise UserError(f"{key} must be numbers, got {value!r}.")
            if plain_type(get_args(kind)[0]) is int and not isinstance(item, int):
                raise UserError(f"{key} must be whole numbers, got {value!r}.")
            check_value(key, item, get_args(kind)[0])
    elif get_origin(kind) is Annotated:
        (allowed,) = kind.__metadata__
        if value not in allowed:
            raise UserError(f"{key} must be {allowed}, got {value!r}.")


def check(config: ConfigDict) -> None:
    """Checks each value of a config against its key's range, and the keys of a block against each other.

    Raises:
      UserError: the first thing that is wrong.
    """
    for key, value in leaves(config):
        if key in KINDS:
            check_value(key, value, KINDS[key])
    _check_batch(config)
    for prefix, data in (("data", config.data), ("teacher.data", config.teacher.get("data"))):
        if data is not None:
            _check_data(prefix, data)
    shape = config.compile.image_shape
    if shape is not None and len(shape) != 3:
        raise UserError(f"compile.image_shape must be height, width and channels, got {shape}.")


def _check_batch(config: ConfigDict) -> None:
    if config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate must be at least 1 and divide batch_size ({config.batch_size}), got {config.accumulate}."
        )
    micro = config.batch_size // config.accumulate
    if config.batch_norm_group is not None and micro % config.batch_norm_group:
        raise UserError(
            f"batch_norm_group must be at least 1 and divide batch_size / accumulate ({micro}), got "
            f"{config.batch_norm_group}."
        )
    if config.steps_per_dispatch > 1 and config.data.loader != "resident":
        raise UserError(
            f"steps_per_dispatch={config.steps_per_dispatch} takes its batches from images on the devices. Set "
            "data.loader=resident, or steps_per_dispatch=1."
        )


def _check_data(prefix: str, data: ConfigDict) -> None:
    """Compares the keys of a data block; those of a teacher's may be unset."""
    if data.crop_size is not None and data.resize_size is not None and data.crop_size > data.resize_size:
        raise UserError(
            f"{prefix}.crop_size must be between 1 and {prefix}.resize_size, got {data.crop_size} and "
            f"{data.resize_size}."
        )
    if data.augment == "random_resized_crop" and data.crop_size is None and prefix == "data":
        raise UserError("data.augment=random_resized_crop needs a size. Set data.crop_size, to 224 for example.")
    if data.crop_area is not None:
        low, high = data.crop_area if len(data.crop_area) == 2 else (1, 0)
        if not low <= high <= 1:
            raise UserError(f"{prefix}.crop_area must be two numbers, 0 < low <= high <= 1, got {data.crop_area}.")

"""The training and evaluation steps: pure functions of state, teacher and batch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldrld_jax.logit_store.top import TopLogits
from ldrld_jax.losses.top import ranks_of, top_classes
from ldrld_jax.metrics import Mean, Means, agreement, at_least_float32, classification, mean_of
from ldrld_jax.models.layers import accumulation_dtype
from ldrld_jax.models.purify import last_matrix_path
from ldrld_jax.train.objective import Objective
from ldrld_jax.train.state import TrainState, Tree, Variables, trainable

Batch = Mapping[str, jax.Array]
Metric = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""`metric(logits, labels, where)` returns a number for each label, `[n, ...]`; the mean is taken over those kept."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A pure model together with the preprocessing of its images.

    Attributes:
      apply: `apply(params, batch_stats, images, train=, where=, key=) -> (logits, batch_stats)`.
      mean, std: per channel, of pixels scaled to 0..1.
      image_size: images are resized to this square; None leaves them as they are.
      dtype: of the computation.
      raw: whether inputs go to `apply` as the source has them: no scaling, no resize, no normalisation.
      random: whether training draws random numbers, for which `apply` takes a key.
    """

    apply: Callable[..., tuple[jax.Array, Tree]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    dtype: Any = jnp.float32
    raw: bool = False
    random: bool = False

    def __call__(
        self,
        variables: Any,
        images: jax.Array,
        *,
        train: bool,
        where: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        """Returns logits `[n, C]` of images `[n, height, width, channels]` in 0..255, and the new batch statistics.

        Raw inputs are `[n, ...]`, and logits of several labels per example `[n, ..., C]`.
        """
        x = images if self.raw else self._normalised(images)
        return self.apply(variables.params, variables.batch_stats, x, train=train, where=where, key=key)

    def _normalised(self, images: jax.Array) -> jax.Array:
        x = images.astype(accumulation_dtype(self.dtype)) / 255
        if self.image_size is not None and x.shape[1:3] != (self.image_size, self.image_size):
            x = jax.image.resize(x, (x.shape[0], self.image_size, self.image_size, x.shape[3]), "bilinear")
        mean, std = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        return ((x - mean) / std).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several networks as one teacher; its variables are a tuple of theirs.

    Attributes:
      networks: each preprocesses the images in its own way.
      average: "logits" for their mean, "probabilities" for the log of the mean softmax.
    """

    networks: tuple[Network, ...]
    average: str = "logits"

    def __call__(self, variables: tuple[Variables, ...], images: jax.Array, *, train: bool) -> tuple[jax.Array, Tree]:
        """Returns logits as `Network` does, float32 at least, and no statistics."""
        outputs = [n(v, images, train=train)[0] for n, v in zip(self.networks, variables, strict=True)]
        logits = jnp.stack([at_least_float32(output) for output in outputs])
        if self.average == "probabilities":
            log_p = jax.nn.log_softmax(logits)
            return jax.nn.logsumexp(log_p, axis=0) - math.log(len(outputs)), ()
        return jnp.mean(logits, axis=0), ()


@dataclasses.dataclass(frozen=True)
class Mixup:
    r"""Mixup of each image of a batch with the one before it, all by one share drawn for the step.

    .. math:: \lambda x_i + (1 - \lambda) x_{i-1}, \quad
              \lambda = \max(b, 1 - b), \quad b \sim \mathrm{Beta}(\alpha, \alpha)

    A batch is in random order, so neighbours are random pairs; only the images at the seams between
    devices are transferred. Since lambda is at least one half, an image's own label weighs more.

    Attributes:
      alpha: above 0; small for shares near 1.
      seed: the share is a function of it and the step.

    References:
      Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """

    alpha: float
    seed: int = 0

    def __call__(
        self, images: jax.Array, labels: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the blended images `[n, ...]` float32, and the other labels `[n]` with their share, a scalar."""
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        draw = jax.random.beta(key, self.alpha, self.alpha, dtype=jnp.float32)
        share = jnp.minimum(draw, 1 - draw)
        images = images.astype(jnp.float32)
        return (1 - share) * images + share * jnp.roll(images, 1, axis=0), (jnp.roll(labels, 1), share)


def make_train_step(
    student: Network,
    teacher: Network | Ensemble | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None,
    steps_per_epoch: int,
    seed: int = 0,
    ema_decay: float | None = None,
    mixup: Mixup | None = None,
    remat: bool = False,
    accumulate: int = 1,
    skip_non_finite: bool = False,
    watch_optimizer: bool = False,
    unroll: bool = False,
    compared_depth: int = 7,
    extra_metrics: Mapping[str, Metric] = MappingProxyType({}),
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Means]]:
    """Returns `step(state, teacher_variables, batch) -> (state, metrics)`, to be jitted with the state donated.

    `batch` has `image` `[n, height, width, channels]` uint8 (`[n, views, ...]` for several views of
    each), `label` `[n]` and, if padded, `mask` `[n]`, False for padding, which counts in nothing. Teacher
    variables of None stand for the moving average of the student's. A batch may bring `teacher_logits`
    `[n, C]`, or the largest of them, `TopLogits`; then no teacher is run.

    With several labels per example, `label` and `mask` are `[n, ...]` and logits `[n, ..., C]`. Loss, gradient and
    metrics are means over the labels kept of the whole batch, however they are spread over its examples, devices and
    microbatches. The model gets the mask `[n]` of the examples with a label that is kept.

    Args:
      student: the network to train.
      teacher: evaluated only; None for plain training.
      objective: the loss.
      optimizer: over `(student parameters, method parameters)`, see `trainable`.
      schedule: the learning rate by step, to be logged; None if only the optimizer knows it.
      steps_per_epoch: of the run.
      seed: the student's random numbers, if it draws any, are a function of it and the step.
      ema_decay: of the moving average in the state; None without one.
      mixup: blends the images of a batch; it must have no padding then. None does not.
      remat: keep only the outputs of convolutions and matrix products for the backward pass, and recompute
        normalisations and activations from them.
      accumulate: the number of microbatches whose gradients make one step. Example i is in microbatch
        i % accumulate, so that each device keeps its own examples.
      skip_non_finite: leave everything but the step number unchanged by a step whose loss or weights are
        not finite, and count it as `skipped` in the metrics. Otherwise such a step is counted as
        `non_finite`.
      watch_optimizer: whether its state must stay finite as well. Lion updates by the sign of a gradient: if that is
        infinite, the update is finite, and the momentum infinite for good. The square of a large gradient overflows
        Adam's second moment, after which the weight rests.
      unroll: whether to unroll the loop over microbatches; XLA for CPU runs convolutions inside a loop several times
        slower.
      compared_depth: the number of largest classes that the metrics compare, see `agreement`.
      extra_metrics: further metrics by name, see `Metric`.
    """

    def forward(params, batch_stats, images, where, key):
        return student(Variables(params, batch_stats), images, train=True, where=where, key=key)

    if remat:
        forward = rematerialised(forward)

    def step(state: TrainState, teacher_variables: Any, batch: Batch) -> tuple[TrainState, Means]:
        frozen: Any = state.ema if teacher_variables is None else teacher_variables
        epoch = state.step // steps_per_epoch + 1
        trained = trainable(state.student, state.method_params)

        def gradients_of(batch: Batch, key: jax.Array | None) -> tuple[Tree, Tree, Means]:
            rows = _rows(batch, objective.views)
            images, labels, where = rows["image"], rows["label"], rows.get("mask")
            examples = None if where is None else jnp.any(where, axis=tuple(range(1, where.ndim)))
            teacher_logits: Any = rows.get("teacher_logits")
            if teacher_logits is not None:
                dtype = accumulation_dtype(student.dtype)
                sparse = isinstance(teacher_logits, TopLogits)
                teacher_logits = teacher_logits.dense(dtype) if sparse else teacher_logits.astype(dtype)
            elif teacher is not None:
                teacher_logits, _ = teacher(frozen, images, train=False)

            def loss_of(params):
                params, method_params = params
                logits, batch_stats = forward(params, state.student.batch_stats, images, examples, key)
                loss, terms = objective(
                    teacher_logits,
                    logits,
                    labels,
                    epoch=epoch,
                    where=where,
                    second=None if share is None else (rows["other_label"], share),
                    method_params=method_params,
                    last_layer=last_layer(frozen, logits.shape[-1]) if objective.needs_last_layer else None,
                )
                return loss, ({"loss": loss, **terms}, logits, batch_stats)

            gradients, (terms, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(trained)
            metrics = _metrics(terms, teacher_logits, logits, labels, where, compared_depth)
            return gradients, batch_stats, metrics | _extra(extra_metrics, logits, labels, where)

        share = None
        if mixup is not None:
            images, (other, share) = mixup(batch["image"], batch["label"], state.step)
            batch = {**batch, "image": images, "other_label": other}
        key = jax.random.fold_in(jax.random.key(seed), state.step) if student.random else None
        if accumulate == 1:
            gradients, batch_stats, metrics = gradients_of(batch, key)
        else:
            gradients, batch_stats, metrics = _accumulated(gradients_of, batch, key, accumulate, unroll)
        gradients = gradients[0], _scaled(objective, gradients[1], epoch)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params, method_params = optax.apply_updates(trained, updates)
        after = Variables(params, batch_stats)
        ema = state.ema
        if ema_decay is not None:
            # At a decay of 0 nothing is left of the old, not even of a mask of -inf.
            average = lambda old, new: ema_decay * old + (1 - ema_decay) * new if _is_float(new) else new  # noqa: E731
            ema = jax.tree.map(average, ema, after) if ema_decay else after
        taken = _steps_taken(state) if skip_non_finite else state.step
        rate = _hyperparameter(opt_state) if schedule is None else schedule(taken)
        if rate is not None:
            metrics["learning_rate"] = Mean(rate, jnp.ones(()))  # of a step, however many its examples
        new = TrainState(state.step + 1, after, method_params, opt_state, ema)
        finite = jnp.isfinite(metrics["loss"].total) & all_finite((params, method_params))
        finite &= still_finite(state.student.batch_stats, batch_stats)
        if watch_optimizer:
            finite &= still_finite(*(jax.tree.leaves(opt) for opt in (state.opt_state, opt_state)))
        if skip_non_finite:
            return _unless_non_finite(state, new, finite, metrics)
        return new, metrics | {"non_finite": Mean(jnp.where(finite, 0.0, 1.0), jnp.ones(()))}

    return step


def rematerialised(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function with a backward pass that keeps the outputs of convolutions and matrix products only."""
    kept = jax.checkpoint_policies
    products = kept.save_from_both_policies(kept.dots_saveable, kept.save_only_these_names("convolution"))
    return jax.checkpoint(forward, policy=products)


def _is_float(x: jax.Array) -> bool:
    """Returns True for floating-point arrays, which are averaged; others, such as counters, keep their last value."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _accumulated(
    gradients_of: Callable[[Batch, jax.Array | None], tuple[Tree, Tree, Means]],
    batch: Batch,
    key: jax.Array | None,
    accumulate: int,
    unroll: bool,
) -> tuple[Tree, Tree, Means]:
    """Runs `gradients_of` on each microbatch; returns means over all labels kept, and the sums of the metrics."""
    # Strided, not in blocks: a batch that is split over devices is then split alike in each microbatch.
    micro = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), dict(batch))
    keys = None if key is None else jax.random.split(key, accumulate)
    rows = batch["label"].shape[0]
    kept = rows if "mask" not in batch else jnp.sum(batch["mask"], dtype=jnp.int32)

    def body(total: Tree, microbatch: tuple[Batch, jax.Array | None]) -> tuple[Tree, Means]:
        batch, key = microbatch
        gradients, batch_stats, metrics = gradients_of(batch, key)
        own = rows // accumulate if "mask" not in batch else jnp.sum(batch["mask"], dtype=jnp.int32)

        def add(total: jax.Array, x: jax.Array) -> jax.Array:
            if not _is_float(x):
                return x
            # Where no label is kept at all, variables are those that the microbatches leave.
            share = jnp.where(kept > 0, jnp.asarray(own, x.dtype) / jnp.maximum(kept, 1), 1 / accumulate)
            # An empty microbatch adds nothing, also of a variable that is infinite, such as a mask.
            return total + jnp.where(share > 0, x * share, 0)

        return jax.tree.map(add, total, (gradients, batch_stats)), metrics

    shapes = jax.eval_shape(gradients_of, *jax.tree.map(lambda x: x[0], (micro, keys)))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, batch_stats), metrics = jax.lax.scan(body, zeros, (micro, keys), unroll=accumulate if unroll else 1)
    return gradients, batch_stats, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)


def _metrics(
    terms: dict[str, jax.Array],
    teacher_logits: jax.Array | None,
    logits: jax.Array,
    labels: jax.Array,
    where: jax.Array | None,
    depth: int,
) -> Means:
    """Returns the terms of the loss as means over the unmasked rows, with accuracies and agreement."""
    metrics = classification(logits, labels, where)
    if teacher_logits is not None:
        classes, ranks = compared(at_least_float32(teacher_logits), at_least_float32(logits), depth)
        metrics |= agreement(labels, classes=classes, ranks=ranks, where=where)
    count = metrics["top1"].count
    # In float64 runs the losses are compared to 1e-9: they keep their dtype.
    return metrics | {name: Mean(value * count.astype(value.dtype), count) for name, value in terms.items()}


def compared(teacher: jax.Array, student: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """Returns the student's `depth` largest classes and their ranks in the teacher, `[..., depth]`, from `[..., C]`."""
    size = student.shape[-1]

    def of_row(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One more than needed: it is LDRLD's selection, which XLA then computes once for both.
        top = jax.tree.map(lambda x: x[:depth], top_classes(student, min(depth + 1, size)))
        return top.classes, ranks_of(teacher, top)

    found = jax.vmap(of_row)(teacher.reshape(-1, size), student.reshape(-1, size))
    return jax.tree.map(lambda x: x.reshape(*student.shape[:-1], -1), found)


def _extra(metrics: Mapping[str, Metric], logits: jax.Array, labels: jax.Array, where: jax.Array | None) -> Means:
    """Returns a user's metrics as means over the unmasked rows."""
    return {name: mean_of(metric(at_least_float32(logits), labels, where), where) for name, metric in metrics.items()}


def _hyperparameter(opt_state: Tree) -> jax.Array | None:
    """Returns the learning rate in the state of an `optax.inject_hyperparams` optimizer; None for any other."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "hyperparams")
    return found[0][1].get("learning_rate") if found else None


def _steps_taken(state: TrainState) -> jax.Array:
    """Returns the optimizer's own count of steps, which sets its learning rate and leaves out skipped steps."""
    counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
    return counts[-1][1] if counts else state.step


def all_finite(tree: Tree) -> jax.Array:
    """Returns whether all numbers of a tree are finite.

    Checking the weights after an update covers the gradients of SGD: one that is not finite gives no finite weight.
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in _stacked(tree)]))


def still_finite(before: Tree, after: Tree) -> jax.Array:
    """Returns whether all numbers of a tree are finite that were finite before.

    A model's other variables may always hold values that are not finite, such as a mask of -inf.
    """
    pairs = zip(_stacked(before), _stacked(after), strict=True)
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)) for old, new in pairs], bool))


def _stacked(tree: Tree) -> list[jax.Array]:
    """Returns the leaves of a tree, with those that are vectors of one length and dtype as one matrix.

    They are most of a network's leaves, and XLA for CPU takes a fifth of its time for a program with a reduction a
    leaf. Parameters of one shape lie alike on the devices, so none travels.
    """
    vectors, others = dict[Any, list[jax.Array]](), list[jax.Array]()
    for leaf in jax.tree.leaves(tree):
        (vectors.setdefault((leaf.shape, leaf.dtype), []) if leaf.ndim == 1 else others).append(leaf)
    return [jnp.stack(leaves) for leaves in vectors.values()] + others


def _unless_non_finite(old: TrainState, new: TrainState, finite: jax.Array, metrics: Means) -> tuple[TrainState, Means]:
    """Returns the new state and its metrics, or the old state and metrics that count in no mean."""
    kept = jax.tree.map(lambda o, n: jnp.where(finite, n, o), old, new)._replace(step=new.step)
    metrics = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), metrics)
    return kept, metrics | {"skipped": Mean(jnp.where(finite, 0.0, 1.0), jnp.ones(()))}


def last_layer(variables: Variables, classes: int) -> jax.Array:
    """Returns the weights `[C, d]` of a network's last layer: its only matrix with a column for each class.

    Raises:
      UserError: if there is no such matrix, or several.

    Example:
      >>> params = {"conv": {"kernel": jnp.zeros((3, 3, 1, 4))}, "fc": {"kernel": jnp.zeros((4, 10))}}
      >>> last_layer(Variables(params, {}), 10).shape
      (10, 4)
    """
    matrix = variables.params
    for name in last_matrix_path(matrix, classes):
        matrix = matrix[name]
    return matrix.T


def _rows(batch: Batch, views: int) -> Batch:
    """Returns the batch with a row per view of an image."""
    if views == 1:
        return batch
    each = lambda x: jnp.repeat(x, views, axis=0, total_repeat_length=views * len(x))  # noqa: E731
    by_view = ("image", "teacher_logits")
    return {key: x.reshape(-1, *x.shape[2:]) if key in by_view else each(x) for key, x in batch.items()}


def _scaled(objective: Objective, gradients: dict[str, Tree], epoch: jax.Array) -> dict[str, Tree]:
    """Returns the gradients of the methods' own parameters, scaled as each method asks."""
    scaled = {}
    for name, gradient in gradients.items():
        scale = objective.methods[name].method.gradient_scale
        factor = 1.0 if scale is None else scale(epoch)
        scaled[name] = jax.tree.map(lambda g, factor=factor: g * factor, gradient)
    return scaled


def make_eval_step(
    network: Network | Ensemble, extra_metrics: Mapping[str, Metric] = MappingProxyType({})
) -> Callable[[Any, Batch], Means]:
    """Returns `step(variables, batch) -> metrics` over the real examples of a padded batch."""

    def step(variables: Any, batch: Batch) -> Means:
        logits, _ = network(variables, batch["image"], train=False)
        found = logits, batch["label"], batch["mask"]
        return classification(*found) | _extra(extra_metrics, *found)

    return step

"""The training and evaluation steps: pure functions of state, teacher and batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ldrld_jax.losses import METHODS
from ldrld_jax.losses.common import mean_over_rows
from ldrld_jax.metrics import Mean, Means, agreement, classification

Tree = Any
Batch = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """All that training changes. Order and augmentation are functions of the seed and the step."""

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree


class Variables(NamedTuple):
    """A model's weights, for inference."""

    params: Tree
    batch_stats: Tree


@dataclasses.dataclass(frozen=True)
class Network:
    """A pure model together with what its images go through before it.

    Attributes:
      apply: `apply(params, batch_stats, images, train=, where=) -> (logits, batch_stats)`.
      mean, std: per channel, of pixels scaled to 0..1.
      image_size: images are resized to this square; None leaves them as they are.
      dtype: of the computation.
    """

    apply: Callable[..., tuple[jax.Array, Tree]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None
    dtype: Any = jnp.float32

    def __call__(
        self, variables: Any, images: jax.Array, *, train: bool, where: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """Logits `[n, C]` of uint8 images `[n, height, width, channels]`, and the batch statistics after them."""
        x = images.astype(jnp.float64 if self.dtype == jnp.float64 else jnp.float32) / 255
        if self.image_size is not None and x.shape[1:3] != (self.image_size, self.image_size):
            x = jax.image.resize(x, (x.shape[0], self.image_size, self.image_size, x.shape[3]), "bilinear")
        mean, std = (jnp.asarray(values, x.dtype).reshape(1, 1, 1, -1) for values in (self.mean, self.std))
        x = ((x - mean) / std).astype(self.dtype)
        return self.apply(variables.params, variables.batch_stats, x, train=train, where=where)


@dataclasses.dataclass(frozen=True)
class Objective:
    """ce_weight * cross-entropy + kd_weight * warm-up * sum of loss_weight * distillation term.

    Attributes:
      methods: the distillation terms: name to (config, weight).
      ce_weight, kd_weight: see the formula.
      kd_warmup_epochs: the distillation terms grow linearly over these epochs.
      label_smoothing: of the cross-entropy, 0 <= s < 1.
    """

    methods: Mapping[str, tuple[Any, float]]
    ce_weight: float = 1.0
    kd_weight: float = 1.0
    kd_warmup_epochs: int = 0
    label_smoothing: float = 0.0

    def __call__(
        self,
        teacher_logits: jax.Array | None,
        student_logits: jax.Array,
        labels: jax.Array,
        *,
        epoch: jax.Array,
        where: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, a scalar, and its terms by name as they are before the weights around them.

        A term of several parts is there as a whole, `ldrld`, and by part, `ldrld/pairs`.
        """
        terms = {"ce": cross_entropy(student_logits, labels, smoothing=self.label_smoothing, where=where)}
        loss = self.ce_weight * terms["ce"]
        scale = jnp.asarray(self.kd_weight, loss.dtype)
        if self.kd_warmup_epochs:
            scale = scale * jnp.minimum(epoch.astype(loss.dtype) / self.kd_warmup_epochs, 1.0)
        for name, (cfg, weight) in self.methods.items():
            parts = METHODS[name].parts(teacher_logits, student_logits, labels, cfg, where=where)
            terms |= {f"{name}/{part}": value for part, value in parts.items() if part}
            terms[name] = sum(parts.values(), start=jnp.zeros((), loss.dtype))
            loss = loss + scale * weight * terms[name]
        return loss, terms


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0, where: jax.Array | None = None
) -> jax.Array:
    r"""The mean cross-entropy in nats, the labels smoothed as in PyTorch.

    .. math:: -(1 - s) \log p_y - \frac{s}{C} \sum_c \log p_c

    Args:
      logits: `[n, C]`, any float dtype; computed in float32 at least.
      labels: `[n]` integers.
      smoothing: s, 0 <= s < 1.
      where: `[n]` bool; the mean is over the rows it keeps.

    Example:
      >>> round(float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))), 4)
      1.3863
    """
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return mean_over_rows(-(1 - smoothing) * own - smoothing * jnp.mean(log_p, axis=-1), where=where)


def make_train_step(
    student: Network,
    teacher: Network | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: Callable[[jax.Array], jax.Array],
    steps_per_epoch: int,
    depth: int,
) -> Callable[[TrainState, Variables | None, Batch], tuple[TrainState, Means]]:
    """`step(state, teacher_variables, batch) -> (state, metrics)`, to be jitted with the state donated.

    `batch` has `image` `[n, height, width, channels]` uint8, `label` `[n]` and, where it is padded,
    `mask` `[n]`, False for padding, which then counts in nothing. `depth` is that of the diagnostics.
    """

    def step(state: TrainState, teacher_variables: Variables | None, batch: Batch) -> tuple[TrainState, Means]:
        images, labels, where = batch["image"], batch["label"], batch.get("mask")
        epoch = state.step // steps_per_epoch + 1
        teacher_logits = None
        if teacher is not None:
            teacher_logits, _ = teacher(teacher_variables, images, train=False)

        def loss_of(params):
            variables = Variables(params, state.batch_stats)
            logits, batch_stats = student(variables, images, train=True, where=where)
            loss, terms = objective(teacher_logits, logits, labels, epoch=epoch, where=where)
            return loss, (terms, logits, batch_stats)

        (loss, (terms, logits, batch_stats)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        metrics = classification(logits, labels, where)
        if teacher_logits is not None:
            metrics |= agreement(teacher_logits, logits, labels, min(depth, logits.shape[-1]), where)
        count = metrics["top1"].count
        means = {**terms, "loss": loss, "learning_rate": schedule(state.step)}
        # In float64 runs the losses are compared to 1e-9: they keep their dtype.
        metrics |= {name: Mean(value * count.astype(value.dtype), count) for name, value in means.items()}
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return step


def make_eval_step(network: Network) -> Callable[[Variables, Batch], Means]:
    """`step(variables, batch) -> metrics` over the real examples of a padded batch."""

    def step(variables: Variables, batch: Batch) -> Means:
        logits, _ = network(variables, batch["image"], train=False)
        return classification(logits, batch["label"], batch["mask"])

    return step

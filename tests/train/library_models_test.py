"""Models and metrics that `ldrld_jax.Trainer` is given: what they may hold and return, looked at before training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from tests.train.conftest import linear


def weights(classes: int = 10) -> dict[str, np.ndarray]:
    return {"w": np.ones((64, classes), np.float32)}


class Flat(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(64, 10, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))


class Masked(Flat):
    """Holds a mask of minus infinity, as attention does."""

    def __init__(self):
        super().__init__()
        self.mask = nnx.Variable(jnp.where(jnp.tril(jnp.ones((3, 3))) > 0, 0, -jnp.inf))


class Untrained(nnx.Module):
    def __call__(self, x):
        return x.reshape(len(x), -1)[:, :10]


class Dotted(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        inner = nnx.Dict({"b": nnx.Linear(10, 10, rngs=rngs)})
        self.parts = nnx.Dict({"a.b": nnx.Linear(64, 10, rngs=rngs), "a": inner})

    def __call__(self, x):
        return self.parts["a"]["b"](self.parts["a.b"](x.reshape(len(x), -1)))


class Numbered(nnx.Module):
    """Has names that are numbers beside other names, and a list."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.parts = nnx.Dict({"1": nnx.Linear(64, 10, rngs=rngs), "x": nnx.Linear(10, 10, rngs=rngs)})
        self.more = nnx.List([nnx.Linear(10, 10, rngs=rngs)])

    def __call__(self, x):
        return self.more[0](self.parts["x"](self.parts["1"](x.reshape(len(x), -1))))


class Unfinished(Flat):
    def __call__(self, x):
        return self.tail(x)


class Sowing(Flat):
    def __call__(self, x):
        self.sow(nnx.Intermediate, "seen", x.mean())
        return super().__call__(x)


class Counted(Flat):
    def __init__(self):
        super().__init__()
        self.count = nnx.Param(jnp.arange(3))


class Dropped(Flat):
    """Drops with random numbers that nobody gives it."""

    def __init__(self):
        super().__init__()
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x):
        return super().__call__(self.drop(x))


class Passing(nnx.Module):
    """Passes its options to a layer that takes none."""

    def __init__(self):
        self.flat, self.moded = Flat(), Moded()

    def __call__(self, x, **options):
        return self.moded(self.flat(x, **options))


class Moded(nnx.Module):
    def __call__(self, x, *, train=False):
        return x


class Linen(nn.Module):
    sows: bool = False

    @nn.compact
    def __call__(self, x):
        if self.sows:
            self.sow("losses", "size", jnp.mean(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def linen(size: int, **fields) -> tuple[nn.Module, dict]:
    module = Linen(**fields)
    return module, module.init(jax.random.key(0), jnp.zeros((1, size, size, 1)))


def several(v, x, train):
    return linear(v, x, train), 1.0


def several_in_training(v, x, train):
    return several(v, x, train) if train else linear(v, x, train)


def two_layers(v, x, train):
    return linear({"w": v["first"]}, x, train) @ v["second"]


WRONG = {
    "a teacher of other classes": (
        dict(teacher=(linear, weights(7))),
        r"^the model <linear 2> returns float32 \(2, 7\) for 2 images, and must return .* \(2, 10\): .* 10 classes\.$",
    ),
    "an ensemble of other classes": (
        dict(teacher=[(linear, weights()), (linear, weights(7))]),
        r"^the model <linear 3> returns float32 \(2, 7\) for 2 images",
    ),
    "a teacher of two results": (
        dict(teacher=(several, weights())),
        r"^the model <several> returns tuple for 2 images",
    ),
    "a teacher of other images": (
        dict(teacher=(linear, {"w": np.ones((49, 10), np.float32)})),
        r"^the model <linear 2> fails on images \(2, 8, 8, 1\) uint8: TypeError: dot_general requires",
    ),
    "whole numbers": (
        dict(teacher=(lambda v, x, train: linear(v, x, train).astype(int), weights())),
        r"^the model <model> returns int32 \(2, 10\) for 2 images, and must return logits \(2, 10\)",
    ),
    "a student of two results in training": (
        dict(student=(several_in_training, weights())),
        r"^the model <several_in_training> in training returns tuple for 2 images",
    ),
    "no random numbers": (
        dict(student=Dropped()),
        r"^the model <Dropped> fails in training on images \(2, 8, 8, 1\) uint8: ValueError: `deterministic` is",
    ),
    "Linen for other images": (
        dict(student=linen(7)),
        r"^the model <Linen> fails on images \(2, 8, 8, 1\) uint8: ScopeParamShapeError: For parameter \"kernel\"",
    ),
    "an attribute that is not there": (
        dict(student=Unfinished()),
        r"^the model <Unfinished> fails on images \(2, 8, 8, 1\) uint8: AttributeError: .* no attribute 'tail'\.$",
    ),
    "what NNX sows": (
        dict(student=Sowing()),
        r"^the model <Sowing> changes its variables in training: seen/0 is float32 \(\) after a pass, and was",
    ),
    "what Linen sows": (
        dict(student=linen(8, sows=True)),
        r"^the model <Linen> changes its variables in training: losses/size/1 is float32 \(\) after a pass",
    ),
    "nothing to train": (
        dict(student=Untrained()),
        r"^the model <Untrained> has no parameters, so that there is nothing to train",
    ),
    "names with a dot": (
        dict(student=Dotted()),
        r"^the model <Dotted> has two variables of the path params\.parts\.a\.b\.bias, where a name may not hold a dot",
    ),
    "a checkpoint of an object": (
        dict(student=Flat(), config={"student.checkpoint": "/nowhere.pth"}),
        r"^/nowhere\.pth is not a run's workdir, and weights for the object <Flat> are read only from a workdir",
    ),
    "whole numbers to train": (
        dict(student=Counted()),
        r"^the model <Counted> has parameters count of int32, which no gradient changes\. Make them an nnx\.Variable",
    ),
    "options that a layer does not take": (
        dict(student=Passing()),
        r"^the model <Passing> fails .* argument 'train'\. A model that passes \*\*options on must name those that",
    ),
    "a named model on small images": (
        dict(student="vit_tiny_patch16_224"),
        r"^the model vit_tiny_patch16_224 fails on images .*: ValueError: .* multiples of 16, got 8 x 8",
    ),
    "no last layer": (
        dict(method="wkd", teacher=(two_layers, {"first": np.ones((64, 10)), "second": np.ones((10, 10))})),
        r"^the last layer must be the only matrix of 10 columns, and the network has 2\.",
    ),
    "weights that are not finite": (
        dict(student=(linear, {"w": np.full((64, 10), -np.inf, np.float32)})),
        r"^the student <linear> holds weights that are not finite: 640 of 640 numbers of params/w",
    ),
}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")  # models that are older than the warning do it
@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_a_run_cannot_use_is_one_line_before_anything_is_trained(make, tmp_path, wrong):
    arguments, message = WRONG[wrong]
    with pytest.raises(UserError, match=message) as error:
        make(**arguments).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_each_network_is_traced_once_for_its_checks_and_its_cost(make, capsys):
    """Traces are of evaluation, and the student's of training as well; then its steps and evaluations are compiled."""
    calls = []

    def apply(v, x, train):
        calls.append((len(x), train))
        return linear(v, x, train)

    make(student=(apply, weights()), teacher=(apply, weights()), epochs=1).fit()
    assert "student <apply>, 640 parameters, 0.0 MFLOPs per image; teacher <apply 2>, 640 " in capsys.readouterr().out
    assert sorted(call for call in calls if call[0] == 2) == [(2, False), (2, False), (2, True)]
    assert 1 not in {rows for rows, _ in calls}


def test_names_may_be_numbers_beside_others(make, digits):
    trainer = make(student=Numbered(), epochs=1)
    student, images = trainer.fit().student, digits["evaluation"][0]
    assert set(student.parts) == {"1", "x"}
    (mean,), (std,) = trainer.config.data.mean, trainer.config.data.std
    normalised = (images / np.float32(255) - np.float32(mean)) / np.float32(std)
    np.testing.assert_allclose(student(normalised), trainer.predict(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_mask_of_minus_infinity_is_kept_and_stops_no_run(make, decay):
    trainer = make(student=Masked(), method="ce", teacher=None, epochs=1, config={"ema_decay": decay})
    result = trainer.fit()
    assert (result.summary["steps"], result.summary["skipped_steps"]) == (3, 0)
    np.testing.assert_array_equal(result.student.mask[...], Masked().mask[...])
    assert trainer.evaluate()["top1"] == result.summary["best_top1"]


def test_wkd_takes_a_last_layer_of_any_name(make):
    assert make(method="wkd", epochs=1).fit().summary["steps"] == 3


METRICS = {
    "a column": (lambda z, y, where: z.max(-1, keepdims=True), r"returns float32 \(40, 1\) for logits \(40, 10\)"),
    "a mean": (lambda z, y, where: z.mean(), r"returns float32 \(\) for logits \(40, 10\), labels \(40,\) and a mask"),
    "a number of Python": (lambda z, y, where: 1.0, r"returns float32 \(\) for .* for each label, \(40,\)"),
    "nothing": (lambda z, y, where: None, "returns NoneType for "),
    "logits": (lambda z, y, where: z, r"returns float32 \(40, 10\) for "),
    "complex numbers": (lambda z, y, where: 1j * z.max(-1), r"returns complex64 \(40,\) for "),
    "two arguments": (
        lambda z, y: z,
        r"fails on logits \(40, 10\), .* takes 2 positional arguments but 3 were given\.$",
    ),
}


@pytest.mark.parametrize("wrong", METRICS)
def test_a_metric_that_has_no_number_for_each_label_is_one_line_before_anything_is_trained(make, tmp_path, wrong):
    metric, message = METRICS[wrong]
    with pytest.raises(UserError, match=f"^the metric 'own' {message}") as error:
        make(metrics={"own": metric}).fit()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_metric_is_traced_without_a_mask_where_batches_have_none(make):
    masked = {"kept": lambda logits, labels, where: where * 1.0}
    with pytest.raises(UserError, match=r"^the metric 'kept' fails on .* labels \(45,\) and where=None: TypeError"):
        make(metrics=masked, batch_size=45).fit()


def test_a_metric_for_each_text_is_refused_also_where_a_text_has_as_many_labels_as_there_are_texts(make):
    tokens = np.arange(64).reshape(8, 8) % 10
    student = lambda v, x, train: v["w"][x], weights()
    data = dict(train=(tokens, tokens), evaluation=(tokens, tokens), num_classes=10, batch_size=8)
    with pytest.raises(UserError, match=r"^the metric 'text' returns float32 \(8,\) .* for each label, \(8, 8\)"):
        metrics = {"text": lambda logits, labels, where: logits.mean((1, 2))}
        make(student=student, method="ce", teacher=None, metrics=metrics, **data).fit()


def test_a_metric_that_is_given_to_an_evaluation_alone_is_looked_at_there(make):
    make(epochs=1).fit()
    with pytest.raises(UserError, match=r"^the metric 'own' returns float32 \(24, 1\) for logits \(24, 10\)"):
        make(epochs=1, metrics={"own": METRICS["a column"][0]}).evaluate()


def test_the_name_of_a_metric_is_text(make):
    with pytest.raises(UserError, match=r"^the name of a metric must be text, got 1\.$"):
        make(metrics={1: lambda logits, labels, where: labels})

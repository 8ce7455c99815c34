"""Images given to `ldrld_jax.Trainer` that a run would train on in silence, and should not."""

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.data.given import as_source
from ldrld_jax.errors import UserError
from ldrld_jax.train.opening import warnings
from ldrld_jax.train.plan import Run
from tests.data.given_test import Items


class Drawn(Items):
    """A dataset that mirrors its images at random, as torchvision's transforms do."""

    def __getitem__(self, index):
        image, label = self.pairs[index]
        return image[:, :: np.random.default_rng().choice([-1, 1])], label


def test_images_that_are_drawn_anew_each_time_are_not_remembered(make, rng):
    images, labels = rng.integers(0, 256, (90, 8, 8, 1), np.uint8), np.arange(90) % 10
    data = Drawn(images, labels, num_classes=10)
    assert as_source(data).changes
    assert not as_source(Items(images, labels, num_classes=10)).changes
    trainer = make(train=data, evaluation=(images[:9], labels[:9]), num_classes=10)
    batches = plan_of(trainer).batches
    first, second = (batches.source.read(np.arange(90))[0] for _ in range(2))
    assert (first != second).any()
    assert any("differ each time they are read" in warning for warning in trainer.fit().summary["warnings"])
    for wrong, message in (
        (dict(config={"logits.dir": "x"}), "logits.dir keeps a teacher's logits .* differ each time"),
        (dict(config={"data.loader": "resident"}), "data.loader=resident would keep one draw"),
        (dict(evaluation=data), "the images to evaluate on differ each time they are read"),
    ):
        with pytest.raises(UserError, match=message):
            plan_of(make(train=data, **{"evaluation": (images[:9], labels[:9]), **wrong}))


def test_channels_first_is_refused(make, rng):
    labels = np.arange(90) % 10
    for dtype, student in ((np.uint8, None), (np.float32, "resnet8")):
        images = rng.integers(0, 256, (90, 3, 8, 8)).astype(dtype)
        model = student or (lambda v, x, train: x.reshape(len(x), -1) @ v, np.ones((192, 10), np.float32))
        with pytest.raises(UserError, match=r"shape \(3, 8, 8\), which is channels first"):
            plan_of(make(train=(images, labels), evaluation=(images, labels), student=model))
    own = lambda v, x, train: x.reshape(len(x), -1) @ v, np.ones((192, 10), np.float32)
    plan_of(
        make(train=(images, labels), evaluation=(images, labels), student=own, teacher=own)
    )  # raw, to its own model
    for config in ({"data.flip": True}, {"data.pad": 1}):  # which would move channels
        with pytest.raises(UserError, match=r"shape \(3, 8, 8\), which is channels first"):
            plan_of(make(train=(images, labels), evaluation=(images, labels), student=own, teacher=own, config=config))


def test_what_is_done_to_pixels_is_refused_for_raw_images(make, rng):
    images, labels = rng.normal(size=(90, 8, 8, 1)).astype(np.float32), np.arange(90) % 10
    for key, value in {"data.mean": (0.4,), "data.std": (0.2,), "data.resize_size": 9}.items():
        with pytest.raises(UserError, match=rf"{key}=.* is for pixels, and the data are raw"):
            plan_of(make(train=(images, labels), evaluation=(images, labels), config={key: value}))


def plan_of(trainer):
    return Run.plan(config_lib.resolve(trainer.config, trainer.given.methods), trainer.workdir, given=trainer.given)


@pytest.mark.parametrize("kind", ["arrays", "objects"])
def test_an_evaluation_on_the_images_trained_on_is_said(make, rng, kind):
    images, labels = rng.integers(0, 256, (40, 8, 8, 1), np.uint8), np.arange(40) % 10
    of = (lambda x: (x, labels)) if kind == "arrays" else lambda x: Items(x, labels, num_classes=10)
    for evaluation, said in ((images, True), (255 - images, False)):
        run = plan_of(make(train=of(images), evaluation=of(evaluation), num_classes=10))
        assert any("evaluated on images that it is trained on" in line for line in warnings(run)) == said

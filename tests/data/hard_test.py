"""Harder training sets: counts exactly as asked, the same for a seed, and nothing held out is trained on."""

import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.data import hard
from ldrld_jax.data.given import as_source
from ldrld_jax.data.pipeline import make_eval_source, make_train_batches
from ldrld_jax.errors import UserError

LABELS = np.repeat(np.arange(10, dtype=np.int32), 200)


class Labelled:
    """Records that are their own index."""

    def __init__(self, labels):
        self.given = labels

    def __len__(self):
        return len(self.given)

    def __getitems__(self, indices):
        return [{"image": bytes(str(i), "ascii"), "label": int(self.given[i])} for i in indices]

    def name(self, index):
        return str(index)

    def labels(self):
        return self.given


def data(**changes):
    block = config_lib.default().data
    block.update(changes)
    return block


def selected(aside=False, **changes):
    return hard.select(Labelled(LABELS), data(**changes), classes=10, held_out=aside)


def origins(records):
    return [int(record["image"]) for record in records.__getitems__(range(len(records)))]


def test_a_choice_is_of_the_first_examples_of_each_class_in_a_random_order():
    labels = np.random.default_rng(1).integers(-1, 9, 3000).astype(np.int32)  # one out of range on each side
    counts = hard._counts(labels, 8)
    assert counts == [int((labels == c).sum()) for c in range(8)]
    wanted = [count // 3 for count in counts]
    shuffled = np.random.default_rng(2).permutation(len(labels))
    expected = np.sort(np.concatenate([shuffled[labels[shuffled] == c][:n] for c, n in enumerate(wanted)]))
    np.testing.assert_array_equal(hard._first(labels, wanted, np.random.default_rng(2)), expected)


def test_nothing_asked_is_nothing_done():
    records = Labelled(LABELS)
    assert hard.select(records, data(), classes=10) is records


def test_training_and_held_out_images_are_disjoint_and_complete_per_class():
    train, aside = selected(held_out=0.1), selected(True, held_out=0.1)
    assert np.bincount(aside.labels()).tolist() == [20] * 10
    assert np.bincount(train.labels()).tolist() == [180] * 10
    assert sorted(origins(train) + origins(aside)) == list(range(2000))


def test_what_is_held_out_is_the_same_however_hard_the_rest_is():
    plain = origins(selected(True, held_out=0.1))
    assert origins(selected(True, held_out=0.1, label_noise="symmetric", label_noise_rate=0.5, imbalance=10.0)) == plain
    train = selected(held_out=0.1, fraction=0.5, imbalance=10.0)
    assert not set(origins(train)) & set(plain)


def test_a_fraction_is_of_each_class():
    assert np.bincount(selected(fraction=0.25).labels()).tolist() == [50] * 10


def test_a_long_tail_falls_exponentially_from_the_first_class_to_the_last():
    counts = np.bincount(selected(imbalance=100.0).labels())
    assert (counts[0], counts[-1]) == (200, 2)
    np.testing.assert_allclose(counts, 200 * 100 ** -(np.arange(10) / 9), atol=0.5)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_noise_changes_labels_at_the_rate_and_never_images(kind):
    records = selected(label_noise=kind, label_noise_rate=0.4)
    assert origins(records) == list(range(2000))
    wrong = records.labels() != LABELS
    assert wrong.sum() == 800
    offsets = np.bincount((records.labels() - LABELS)[wrong] % 10, minlength=10)
    if kind == "asymmetric":
        assert offsets.tolist() == [0, 800] + [0] * 8
    else:
        assert offsets[0] == 0
        assert (np.abs(offsets[1:] - 800 / 9) < 40).all()  # four standard deviations
    assert [r["label"] for r in records.__getitems__([3, 1999])] == records.labels()[[3, 1999]].tolist()


def test_choices_depend_on_the_data_seed_alone():
    options = dict(fraction=0.3, imbalance=10.0, label_noise="symmetric", label_noise_rate=0.2)
    first, again, other = (selected(**options, seed=seed) for seed in (1, 1, 2))
    assert origins(first) == origins(again) != origins(other)
    np.testing.assert_array_equal(first.labels(), again.labels())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fraction": 1e-9}, "no training image is left"),
        ({"loader": "resident", "rand_augment": 2}, "cannot apply data.augment=pad_crop with data.rand_augment=2"),
        (
            {"loader": "resident", "augment": "rotate"},
            "cannot apply data.augment=rotate with data.rand_augment=0. Set data.augment=pad_crop",
        ),
    ],
)
def test_settings_that_do_not_suit_the_data_are_one_line(changes, expected, data_dir):
    with pytest.raises(UserError, match=expected):
        make_train_batches(data(data_dir=data_dir, **changes), batch_size=8, seed=0)


@pytest.mark.parametrize("changes", [{"held_out": 0.25}, {"fraction": 0.5}, {"imbalance": 2.0}])
def test_a_label_without_a_class_is_named_although_no_part_would_have_it(changes):
    records = Labelled(np.repeat([0, 1, 2, 7, -1], 4))
    with pytest.raises(
        UserError,
        match=r"^12 is broken: its label is 7 or cannot be read, and .* 5 classes\. .*on_error=skip\.$",
    ):
        hard.select(records, data(**changes), classes=5)
    assert len(hard.select(records, data(on_error="skip", **changes), classes=5)) < 12


@pytest.mark.parametrize("label", [2, np.array([2, 0])], ids=["a label", "several"])
def test_an_example_that_raises_while_labels_are_read_has_no_label(label):
    class Once:
        num_classes, failed = 3, False

        def __len__(self):
            return 12

        def __getitem__(self, i):
            if i == 7 and not self.failed:
                self.failed = True
                raise ConnectionResetError("once")
            return np.full((4, 4, 1), i, np.uint8), label

    records = as_source(Once()).records
    records.items.failed = False
    labels = records.labels()
    assert (labels[7] == -1).all() and (np.delete(labels, 7, axis=0) == label).all()
    records.items.failed = False
    if np.ndim(label) == 0:  # several labels are not chosen by
        with pytest.raises(UserError, match=r"\[7\] is broken: its label is -1 or cannot be read"):
            hard.select(records, data(fraction=0.9), classes=3)
        records.items.failed = False
        chosen = hard.select(records, data(fraction=0.9, on_error="skip"), classes=3)
        assert len(chosen) == 10 and 7 not in chosen.indices and set(chosen.labels()) == {2}


def test_labels_of_one_class_cannot_be_made_wrong():
    records, noisy = Labelled(np.zeros(9, np.int32)), data(label_noise="symmetric", label_noise_rate=0.3)
    with pytest.raises(
        UserError, match=r"^data\.label_noise=symmetric needs at least two classes, got 1\. Unset it\.$"
    ):
        hard.select(records, noisy, classes=1)


def test_a_run_with_a_held_out_part_is_evaluated_on_it(data_dir):
    """A tenth of the digits' 1438, class by class: the test split is not looked at."""
    held = data(data_dir=data_dir, held_out=0.1, eval_split="nothing")
    source, batches = make_eval_source(held), make_train_batches(held, batch_size=8, seed=0)
    assert len(source) + len(batches.source) == 1438
    assert len(source) == 144
    train, _ = batches.source.read(np.arange(len(batches.source)))
    images, _ = source.read(np.arange(len(source)))
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in images)

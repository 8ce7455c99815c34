"""Forms of arrays and datasets that are read as others are, or refused in one line that says what to give instead."""

import numpy as np
import pytest

from ldrld_jax.data.given import as_source
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError
from tests.data.given_test import Items, assert_read, png

TAGS = np.eye(5, dtype=int)[[0, 3, 4]]  # one tag a text
TOKENS = np.arange(15, dtype=np.uint8).reshape(3, 5)


def ragged(*rows):
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (
            {"ids": TOKENS, "mask": TOKENS},
            [0, 1, 2],
            r"inputs of the data must be one array .* got a dict of ids, mask\.",
        ),
        (TOKENS, {"a": 1}, r"labels of the data must be one array \[n, \.\.\.\], got a dict of a\. Give one of them"),
        ([[1, 2], [3]], [0, 1], r"inputs of the data must have one shape, got \(1,\) and \(2,\)\. Pad texts"),
        (ragged([1, 2], [3]), [0, 1], r"inputs of the data must have one shape, got \(1,\) and \(2,\)\. Pad texts"),
        (TOKENS[:2].astype(int), [[1, 2], [3]], r"labels of the data must have one shape, .* label the padding -1\."),
        (iter([1]), [0], r"inputs of the data must be one array \[n, \.\.\.\], got list_iterator\. Give an array"),
        (TOKENS, [0, 1, 2], r"images\[\.\.\., None\]; or, for tokens, give them as int32\."),
    ],
)
def test_inputs_that_are_not_one_array_are_refused_in_one_line(inputs, labels, message):
    with pytest.raises(UserError, match=message) as error:
        as_source((inputs, labels), title="data")
    assert "\n" not in str(error.value)


def test_tokens_of_8_bits_are_raw_from_arrays_and_from_a_data_set_object():
    labels = TOKENS.astype(int)[:, ::-1]
    of_arrays, of_items = as_source((TOKENS, labels), num_classes=15), as_source(Items(TOKENS, labels, num_classes=15))
    for source in (of_arrays, of_items):
        assert (source.raw, source.dtype, source.image_shape, source.label_shape) == (True, np.uint8, (5,), (5,))
        assert_read(source, TOKENS, labels)
    pixels = np.zeros((3, 4, 4, 1), np.uint8)
    for data in ((pixels, labels), Items(pixels, labels, num_classes=15)):
        assert not as_source(data, num_classes=15).raw


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, np.array([1, 2])], r"data\[1\] is broken: its labels have shape \(2,\), and the others \(\)"),
        ([np.array([2, 1]), 1], r"data\[1\] is broken: its labels have shape \(\), and the others \(2,\)"),
        ([np.array([2, 1]), np.array([2**32 + 1, 1])], r"data\[1\] is broken: a label is 4294967297, and there are 5"),
        ([1, 2**32 + 1], r"data\[1\] is broken: its label is 4294967297, and there are 5 classes\. Repair"),
    ],
)
def test_labels_of_another_shape_or_beyond_32_bits_are_broken(labels, message):
    source = as_source(Items(TOKENS[:2], labels, num_classes=5))
    with pytest.raises(UserError, match=message):
        source.read(np.arange(2))


def test_encoded_images_that_differ_each_time_are_known_to_change(rng):
    class Shots(Items):
        def __getitem__(self, index):
            return png(rng.integers(0, 256, (8, 8, 3), np.uint8)), index

    still = png(np.zeros((8, 8, 3), np.uint8))
    assert as_source(Shots([still] * 3, [0, 1, 2], num_classes=3)).changes
    assert not as_source(Items([still] * 3, [0, 1, 2], num_classes=3)).changes


def test_names_of_classes_in_an_archive_may_be_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 4), np.float32), y_train=[0, 1], class_names=[b"cat", b"dog"])
    assert open_source(f"arrays:{tmp_path / 'a.npz'}", "train").class_names == ("cat", "dog")


def test_a_single_tag_a_text_is_no_one_hot_label_where_the_classes_are_counted():
    source = as_source((TOKENS.astype(int), TAGS), num_classes=2)
    assert (source.class_names, source.label_shape) == (("0", "1"), (5,))
    assert_read(source, TOKENS, TAGS)
    assert as_source((TOKENS.astype(int), TAGS), num_classes=3).label_shape == (5,)
    for inputs, classes in ((TOKENS, None), (TOKENS, 5), (TOKENS[:, :4], 6)):
        with pytest.raises(UserError, match=r"one-hot\. Convert one-hot labels with argmax"):
            as_source((inputs.astype(int), TAGS), num_classes=classes)


def test_one_hot_labels_of_an_archive_are_refused(tmp_path):
    """Counts its classes from the labels, which says nothing of their form."""
    np.savez(tmp_path / "data.npz", x_train=np.zeros((3, 4, 4, 1), np.uint8), y_train=TAGS)
    with pytest.raises(UserError, match=r"one-hot\. Convert one-hot labels with argmax"):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


@pytest.mark.parametrize("dtype", [">f4", ">i4", ">f8", ">i8", ">u2"])
def test_arrays_of_the_other_byte_order_are_read_as_numbers_of_this_machine(dtype, rng):
    inputs, labels = rng.integers(0, 99, (6, 7)).astype(dtype), np.arange(6).astype(">i8")
    for data in ((inputs, labels), Items(inputs, labels, num_classes=6)):
        source = as_source(data)
        assert source.dtype.isnative and source.dtype.kind == dtype[1]
        assert source.read(np.arange(6))[0].dtype.isnative
        assert_read(source, inputs.astype(int), np.arange(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.with_transform(lambda rows: {"x": rows["image"]}),
            r"have a transform .* with dataset\.map,",
        ),
        (
            lambda data: data.to_iterable_dataset(),
            r"are of type IterableDataset, which has no length .* without streaming\.",
        ),
    ],
    ids=["a transform", "a stream"],
)
def test_a_data_set_of_hugging_face_without_fixed_rows_is_refused_in_one_line(change, message):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [np.zeros((8, 8, 3), np.uint8)] * 2, "label": [0, 1]}
    data = datasets.Dataset.from_dict(rows, features=features)
    for form in (data, data.with_format("arrow"), data.with_format("numpy", columns=["label"])):
        records = as_source(form).records
        assert records.labels().tolist() == [0, 1]
        (record,) = records.__getitems__([1])
        assert (record["label"], type(record["image"])) == (1, bytes)
    with pytest.raises(UserError, match=message) as error:
        as_source(change(data), title="training data")
    assert "\n" not in str(error.value)

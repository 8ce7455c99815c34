"""Data given as arrays, objects, NumPy archives and lists of files are read as they are, or refused in one line."""

import concurrent.futures
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ldrld_jax.data import given
from ldrld_jax.data.given import as_source
from ldrld_jax.data.source import fingerprint
from ldrld_jax.data.sources import open_source
from ldrld_jax.errors import UserError


@pytest.fixture
def arrays(rng):
    return rng.integers(0, 256, (6, 5, 4, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])


class Items:
    """A dataset of pairs, as PyTorch's are."""

    def __init__(self, images, labels, **attributes):
        self.pairs = list(zip(images, labels, strict=True))
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def png(image) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def assert_read(source, images, labels) -> None:
    read = source.read(np.arange(len(source)))
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)


def test_arrays_and_memory_maps_are_read_as_they_are(arrays, tmp_path):
    source = as_source(arrays, num_classes=4)
    assert_read(source, *arrays)
    assert (source.image_shape, source.raw, len(source.class_names)) == ((5, 4, 3), False, 4)
    np.save(tmp_path / "images.npy", arrays[0])
    mapped = as_source((np.load(tmp_path / "images.npy", mmap_mode="r"), arrays[1]), num_classes=4)
    assert isinstance(mapped.records.images, np.memmap)
    assert fingerprint(mapped) == fingerprint(source)
    other = arrays[0].copy()
    other[3, 0, 0, 0] ^= 1
    assert fingerprint(as_source((other, arrays[1]), num_classes=4)) != fingerprint(source)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(np.float64, np.float32), (np.float32, np.float32), (np.int64, np.int32), (np.int8, np.int8)]
)
def test_whatever_is_no_picture_is_raw(rng, dtype, stored):
    inputs = rng.integers(0, 9, (6, 7)).astype(dtype)
    source = as_source((inputs, np.arange(6)))
    assert (source.raw, source.dtype, source.image_shape) == (True, stored, (7,))
    assert_read(source, inputs, np.arange(6))


@pytest.mark.parametrize("kind", [lambda x: x, Image.fromarray, png], ids=["arrays", "pictures", "files"])
def test_an_object_gives_one_example_an_index(arrays, kind):
    items = Items(map(kind, arrays[0]), arrays[1], classes=["a", "b", "c"])
    source = as_source(items)
    assert source.class_names == ("a", "b", "c")
    np.testing.assert_array_equal(source.records.labels(), arrays[1])
    if None in source.image_shape:  # encoded images may differ in size
        source = source.of(source.records, type(source.view)((5, 4, 3)))
    assert_read(source, *arrays)


def test_a_data_set_object_that_does_not_know_its_classes_has_those_that_are_given(arrays):
    items = Items(*arrays, num_classes=None)
    assert len(as_source(items, num_classes=7).class_names) == 7
    with pytest.raises(UserError, match=r"the data do not say how many classes they have\. Set num_classes"):
        as_source(items)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_a_picture_of_any_mode_is_read_as_its_file_is(arrays, mode):
    """A palette's indices are no grey, and a mask is no raw input."""
    picture = Image.fromarray(arrays[0][0]).convert(mode)
    if mode == "P":
        picture = Image.fromarray(arrays[0][0]).quantize(4)
        picture.info["transparency"] = 0
    source = as_source(Items([picture], [0], num_classes=2))
    channels = 1 if mode in ("1", "L", "LA") else 3
    assert (source.image_shape, source.raw) == ((5, 4, channels), False)
    file = io.BytesIO()
    if mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture.save(file, format="png")
    else:
        picture.convert("RGBA" if mode == "PA" else "RGB").save(file, format="png")
    expected = type(source.view)((5, 4, channels))(file.getvalue())
    np.testing.assert_array_equal(source.read(np.array([0]))[0][0], expected)


def test_pictures_of_sixteen_bits_stay_numbers():
    source = as_source(Items([Image.fromarray(np.full((3, 2), 1000, np.uint16))], [0], num_classes=2))
    assert (source.raw, source.read(np.array([0]))[0].max()) == (True, 1000)


def test_an_example_of_another_dtype_is_broken(arrays):
    images = [*arrays[0][:2], arrays[0][2].astype(np.float32) / 255]
    with pytest.raises(UserError, match=r"data\[2\] is broken: its dtype is float32, and the others have uint8"):
        as_source(Items(images, arrays[1][:3], num_classes=3)).read(np.arange(3))
    whole = as_source(Items([np.zeros(3, np.int32), np.zeros(3, np.int64)], [0, 1], num_classes=2))
    assert whole.read(np.arange(2))[0].dtype == np.int32


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_holds_examples_however_few(arrays, count):
    images, labels = arrays
    pairs = [(image, int(label)) for image, label in zip(images[:count], labels, strict=False)]
    for examples in (pairs, list(map(list, pairs)), [{"image": image, "label": label} for image, label in pairs]):
        read, found = as_source(examples, num_classes=3).read(np.arange(count))
        np.testing.assert_array_equal(read, images[:count])
        np.testing.assert_array_equal(found, labels[:count])
    read, _ = as_source([images, labels]).read(np.arange(len(labels)))
    np.testing.assert_array_equal(read, images)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "must be"),
        (3, "must be"),
        (Items([], []), "have no examples"),
        (Items([np.zeros((2, 2, 1), np.uint8)], [0]), "Set num_classes"),
        (Items([np.zeros((2, 2, 1), np.uint8)], ["cat"], num_classes=2), r"\[0\] has the label cat, and"),
        (["an example"], r"\[0\] must be \(image, label\)"),
    ],
)
def test_any_other_object_is_refused_in_one_line(data, message):
    with pytest.raises(UserError, match=message) as error:
        as_source(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", ["x_{}, y_{}", "{}_images, {}_labels"])
def test_a_numpy_archive_has_a_pair_of_arrays_a_split(arrays, tmp_path, names):
    images, labels = (name.format(*[split] * name.count("{}")) for split in ["train"] for name in names.split(", "))
    test = {images.replace("train", "test"): arrays[0][:2], labels.replace("train", "test"): np.array([4, 0])}
    np.savez(tmp_path / "data.npz", **{images: arrays[0], labels: arrays[1]}, **test)
    name = f"arrays:{tmp_path / 'data.npz'}"
    assert_read(open_source(name, "train"), *arrays)
    assert_read(open_source(name, "test"), arrays[0][:2], [4, 0])
    assert len(open_source(name, "train").class_names) == 5  # of all splits
    with pytest.raises(UserError, match="has no x_val with y_val"):
        open_source(name, "val")
    (tmp_path / "data.npz").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read as a NumPy archive"):
        open_source(name, "train")


@pytest.mark.parametrize(
    ("save", "where", "damage", "reason"),
    [
        (np.savez, b"\x07" * 8, b"\x06", "Bad CRC-32 for file 'x_train.npy'"),
        (np.savez, b"PK\1\2", b"??", "Bad magic number for central directory"),
        (np.savez, b"PK\1\2", b"PK\1\2\x2d\3\x2d\0\0\0\x63", "That compression method is not supported"),
        (np.savez_compressed, b"x_train.npy", b"x_train.npy" + b"\xff" * 40, "Error -3 .*: invalid block type"),
    ],
    ids=["a flipped bit", "its list", "its compression", "its stream"],
)
def test_a_damaged_archive_is_one_line_that_names_the_file(tmp_path, save, where, damage, reason):
    file = tmp_path / "data.npz"
    save(file, x_train=np.full((2, 8, 8, 1), 7, np.uint8), y_train=[0, 1])
    start = (whole := file.read_bytes()).index(where)
    file.write_bytes(whole[:start] + damage + whole[start + len(damage) :])
    with pytest.raises(UserError) as error:
        open_source(f"arrays:{file}", "train")
    expected = rf"{re.escape(str(file))} cannot be read as a NumPy archive: {reason}\. Write it with numpy\.savez\."
    assert re.fullmatch(expected, str(error.value))


@pytest.mark.parametrize(("labels", "given"), [(["cat", "dog"], "<U3 (2,)"), ([], "float64 (0,)")])
def test_labels_of_an_archive_that_are_no_numbers_are_one_line(tmp_path, labels, given):
    file = tmp_path / "data.npz"
    np.savez(file, x_train=np.zeros((len(labels), 8, 8, 1), np.uint8), y_train=labels)
    with pytest.raises(UserError) as error:
        open_source(f"arrays:{file}", "train")
    assert str(error.value) == (
        f"the labels of the train split of {file} must be integers [n], or [n, length] for one per token, got {given}. "
        "Convert one-hot labels with argmax(-1)."
    )


@pytest.mark.parametrize(("kept", "reason"), [(0, "No data left in file"), (200, "File is not a zip file")])
def test_a_torn_archive_is_one_line_that_names_the_file(arrays, tmp_path, kept, reason):
    file = tmp_path / "data.npz"
    np.savez(file, x_train=arrays[0], y_train=arrays[1])
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError) as error:
        open_source(f"arrays:{file}", "train")
    assert str(error.value) == f"{file} cannot be read as a NumPy archive: {reason}. Write it with numpy.savez."


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], ["1", "0", "1"]], ids=["names", "numbers"])
def test_a_list_of_files_names_paths_and_labels(arrays, tmp_path, suffix, labels):
    for i in range(3):
        Image.fromarray(arrays[0][i]).save(tmp_path / f"{i}.png")

    def write(split, rows):
        lines = ["path,label", *map(",".join, rows)]
        if suffix == "jsonl":
            lines = [json.dumps({"path": path, "label": label}) for path, label in rows]
        (tmp_path / f"{split}.{suffix}").write_text("\n".join(lines) + "\n")

    write("train", [(f"{i}.png", label) for i, label in enumerate(labels)])
    write("val", [("2.png", labels[1])])
    train, val = (open_source("file_list", split, str(tmp_path)) for split in ("train", "val"))
    assert train.class_names == val.class_names == tuple(sorted(set(labels)))
    np.testing.assert_array_equal(train.records.labels(), [train.class_names.index(label) for label in labels])
    np.testing.assert_array_equal(val.records.labels(), [train.class_names.index(labels[1])])
    source = train.of(train.records, type(train.view)((5, 4, 3)))
    np.testing.assert_array_equal(source.read(np.arange(3))[0], arrays[0][:3])
    write("val", [("2.png", "bird")])
    with pytest.raises(UserError, match="the class 'bird', which no training image has"):
        open_source("file_list", "val", str(tmp_path))
    (tmp_path / f"val.{suffix}").write_text("nonsense\nmore\n")
    with pytest.raises(UserError, match="is not a valid list of images"):
        open_source("file_list", "val", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no .*other\.csv or \.jsonl"):
        open_source("file_list", "other", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.csv", "path,label\na.png,0\nb.png\n", "in image 2, which has no path or no label"),
        ("train.csv", "path,label\na.png,\n", "in image 1, which has no path or no label"),
        ("train.jsonl", '{"path": "a.png", "label": null}\n', "in image 1, which has no path or no label"),
        ("train.csv", "path,label\n", "the list train of .* lists no image"),
    ],
)
def test_an_image_without_a_label_is_no_class_of_its_own(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source("file_list", "train", str(tmp_path))


def test_a_picture_that_does_not_decode_is_named_or_skipped(arrays):
    """Pillow opens a file whose end is missing, and reads its pixels later."""
    whole = io.BytesIO()
    Image.fromarray(np.tile(arrays[0][0], (20, 20, 1))).save(whole, format="png")
    pictures = [Image.open(io.BytesIO(data)) for data in (whole.getvalue(), whole.getvalue()[:200])]
    source = as_source(Items(pictures, [0, 1], num_classes=2))
    with pytest.raises(UserError, match=r"data\[1\] is broken: .* data\.on_error=skip"):
        source.read(np.arange(2))
    np.testing.assert_array_equal(dataclasses.replace(source, on_error="skip").read(np.arange(2))[1], [0, -1])
    with pytest.raises(UserError, match=r"data\[0\] is broken: .* Repair or remove it"):
        as_source(Items(pictures[1:], [1], num_classes=2))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["000", "001", "002"], ("000", "001", "002")), (["0", "2", "1"], ("0", "1", "2")), (["10", "02"], ("02", "10"))],
)
def test_labels_with_leading_zeros_are_names_and_a_byte_order_mark_is_none(arrays, tmp_path, labels, classes):
    for index, image in enumerate(arrays[0][: len(labels)]):
        (tmp_path / f"{index}.png").write_bytes(png(image))
    lines = "".join(f"{index}.png,{label}\n" for index, label in enumerate(labels))
    (tmp_path / "train.csv").write_text(f"path,label\n{lines}", encoding="utf-8-sig")
    source = open_source("file_list", "train", str(tmp_path))
    assert source.class_names == classes
    assert [classes[label] for label in source.records.labels()] == labels


def test_numbers_from_1_are_told_from_folders_without_images(arrays, tmp_path):
    (tmp_path / "0.png").write_bytes(png(arrays[0][0]))
    (tmp_path / "train.csv").write_text("path,label\n0.png,1\n0.png,2\n")
    with pytest.raises(
        UserError, match=r"no image of 0 in .*\. Labels that are numbers count from 0: renumber them, or"
    ):
        open_source("file_list", "train", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,0.0\nb.png,1.0\n", "image 1, whose label '0.0' is neither a name nor a whole number"),
        ("path,label\na.png,  \n", "image 1, which has no path or no label"),
        ("path,label\nmy,pic.png,dog\n", "image 1, which has more fields than the header: quote a path with a comma"),
        ("path,label\na.png,2480528\nb.png,2435098\n", "has 2 labels that are numbers up to 2480528, and numbers"),
    ],
)
def test_labels_that_would_become_other_classes_are_refused(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source("file_list", "train", str(tmp_path))


@pytest.mark.parametrize("labels", [[0, 5, 20_000_000], [2**40]])
def test_identifiers_are_no_labels_of_arrays_either(tmp_path, labels):
    images, labels = np.zeros((len(labels), 4, 4, 1), np.uint8), np.array(labels)
    message = rf"has \d labels that are numbers up to {labels[-1]}, and numbers count from 0\. Renumber them\.$"
    with pytest.raises(UserError, match=message):
        as_source((images, labels))
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels)
    with pytest.raises(UserError, match=message):
        open_source(f"arrays:{tmp_path / 'data.npz'}", "train")


def test_a_label_of_json_is_a_name_or_a_whole_number(tmp_path):
    for value, shown in (("true", "True"), ("1.0", "1.0"), ("null", "no path or no label")):
        (tmp_path / "train.jsonl").write_text(f'{{"path": "a.png", "label": {value}}}\n')
        with pytest.raises(UserError, match=shown):
            open_source("file_list", "train", str(tmp_path))


def test_a_path_of_json_is_text(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"path": 3, "label": "cat"}\n')
    with pytest.raises(UserError, match="image 1, whose path 3 is not text"):
        open_source("file_list", "train", str(tmp_path))


def test_names_that_look_like_large_numbers_are_names(arrays, tmp_path):
    (tmp_path / "train.csv").write_text("path,label\na.png,12e45\nb.png,9f\n")
    assert open_source("file_list", "train", str(tmp_path)).class_names == ("12e45", "9f")


def test_blanks_around_a_label_are_not_part_of_it(arrays, tmp_path):
    for name, image in zip("ab", arrays[0], strict=False):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("path,label\na.png, cat\nb.png,dog \na.png,cat\n")
    source = open_source("file_list", "train", str(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert source.records.labels().tolist() == [0, 1, 0]


@pytest.mark.parametrize("label", [2.9, "1", None])
def test_a_label_of_an_object_is_a_whole_number(label):
    class Data(list):
        num_classes = 3

    with pytest.raises(UserError, match=r"data\[0\] has the label .*, and labels are whole numbers from 0"):
        as_source(Data([(np.zeros((4, 4, 1), np.uint8), label)]))


def test_an_example_that_raises_is_broken(caplog):
    class Data:
        num_classes = 2

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2:
                raise OSError("truncated")
            return np.full((4, 4, 1), index, np.uint8), 1

    source = as_source(Data(), title="data")
    with pytest.raises(OSError, match="truncated"):  # as it was raised, with its traceback
        source.read(np.arange(4))
    images, labels = dataclasses.replace(source, on_error="skip", max_skipped=1.0).read(np.arange(4))
    assert labels.tolist() == [1, 1, -1, 1] and not images[2].any()


def test_numbers_that_no_batch_holds_are_refused():
    inputs = np.array([[1, 2], [156_000_000_000, 3]])
    source = as_source((inputs, np.array([0, 1])), title="data")
    assert source.read(np.array([0]))[0].tolist() == [[1, 2]]
    with pytest.raises(UserError, match="it has numbers beyond those of int32"):
        source.read(np.array([1]))
    items = Items([np.array([1, 2], np.int32), np.array([3_000_000_000, 1], np.uint32)], [0, 1], num_classes=2)
    with pytest.raises(UserError, match="it has numbers beyond those of int32"):
        as_source(items).read(np.array([1]))


@pytest.mark.parametrize(
    "names", [{"z": 2, "a": 0, "b": 1}, {2: "z", 0: "a", 1: "b"}, {0: "a", 1: "b", 2: "z"}.values()]
)
def test_classes_in_a_dict_are_in_the_order_of_their_labels(names):
    class Data(list):
        classes = names

    assert as_source(Data([(np.zeros((4, 4, 1), np.uint8), 2)])).class_names == ("a", "b", "z")


@pytest.mark.parametrize("names", [np.array(["cat", "dog"]), 2])
def test_names_of_classes_may_be_an_array_and_a_number_of_them_is_none(names):
    class Data(list):
        classes, num_classes = names, 2

    expected = ("cat", "dog") if isinstance(names, np.ndarray) else ("0", "1")
    assert as_source(Data([(np.zeros((4, 4, 1), np.uint8), 1)])).class_names == expected


@pytest.mark.parametrize("safe", [False, True])
def test_one_thread_at_a_time_reads_a_data_set_object_that_does_not_say_otherwise(safe):
    """Lets another thread try the lock of all datasets while an example is read."""
    free = []

    def try_lock() -> bool:
        taken = given._ONE_AT_A_TIME.acquire(blocking=False)
        if taken:
            given._ONE_AT_A_TIME.release()
        return taken

    class Shared:
        num_classes, thread_safe = 2, safe

        def __len__(self):
            return 4

        def __getitem__(self, index):
            free.append(threads.submit(try_lock).result())
            return np.zeros((2, 2, 1), np.uint8), index % 2

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        source = as_source(Shared())  # which looks at an example of its own
        free.clear()
        source.read(np.array([1, 2]))
        assert try_lock()
    assert set(free) == {safe}


def test_a_data_set_may_read_another(arrays):
    images, labels = arrays
    inner = as_source(Items(images, labels.tolist(), num_classes=3))

    class Outer:
        num_classes = 3

        def __len__(self):
            return len(inner)

        def __getitem__(self, index):
            (image,), (label,) = inner.read(np.array([index]))
            return 255 - image, int(label)

    np.testing.assert_array_equal(as_source(Outer()).read(np.arange(6))[0], 255 - images)

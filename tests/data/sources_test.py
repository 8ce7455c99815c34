"""Sources of images: TFDS, Tiny-ImageNet and plain folders, and the errors for missing ones."""

import json
import re

import numpy as np
import pytest

from ldrld_jax.data import described
from ldrld_jax.data.source import InMemory, Source
from ldrld_jax.data.sources import open_source
from ldrld_jax.data.tfds_records import open_builder
from ldrld_jax.data.views import CentreCrop
from ldrld_jax.errors import UserError
from tests.data.images import make_image_folder, make_imagenet, make_tiny_imagenet, photograph


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet")
    make_imagenet(path, 4)
    return path


def test_an_imagenet_of_tfds_has_images_of_many_sizes_and_the_class_names(imagenet):
    source = open_source("imagenet2012", "train", str(imagenet))
    assert (len(source), source.image_shape) == (4, (None, None, 3))
    assert source.class_names[:2] == ("n01440764", "n01443537")
    images, labels = source.of(source.records, CentreCrop(32, 24)).read(np.arange(4))
    assert (images.shape, images.dtype) == ((4, 24, 24, 3), np.uint8)
    assert labels.tolist() == source.records.labels().tolist()
    assert source.records.name(2).startswith("record 2 of imagenet2012, train (n0000000")


def test_a_folder_whose_name_is_a_pattern_is_read_as_it_is(imagenet, tmp_path):
    (tmp_path / "data [1]").symlink_to(imagenet)
    assert len(open_source("imagenet2012", "train", str(tmp_path / "data [1]"))) == 4


def test_a_copy_in_tfrecords_gets_the_command_that_converts_it(imagenet, tmp_path):
    version = tmp_path / "imagenet2012" / "5.1.0"
    version.mkdir(parents=True)
    for path in (imagenet / "imagenet2012" / "5.1.0").iterdir():
        text = path.read_bytes().replace(b"array_record", b"tfrecord")
        (version / path.name.replace("array_record", "tfrecord")).write_bytes(text)
    with pytest.raises(
        UserError, match=r"tfds convert_format --dataset_version_dir=\S+5\.1\.0 --out_file_format=array"
    ):
        open_source("imagenet2012", "train", str(tmp_path))


def test_tiny_imagenet_as_its_zip_unpacks(tmp_path):
    make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    train, val = (open_source("tiny_imagenet", split, str(tmp_path)) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("thing 7, object", "thing 8, object", "thing 9, object")
    assert train.records.labels().tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [train.records.name(i).split("/")[-3] for i in (0, 11)] == ["n00000007", "n00000009"]
    # The annotations give val_0 to n00000009, the last class.
    assert {val.records.name(i).rpartition("/")[2]: int(val.records.labels()[i]) for i in range(3)} == {
        "val_0.JPEG": 2,
        "val_1.JPEG": 1,
        "val_2.JPEG": 0,
    }
    assert train.read(np.arange(12))[0].shape == (12, 64, 64, 3)


def test_an_image_folder_sorts_classes_and_takes_images_only(tmp_path):
    make_image_folder(tmp_path, ("dog", "cat", "Ant"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / ".hidden.jpg").write_text("no image")
    source = open_source("image_folder", "train", str(tmp_path))
    assert (len(source), source.class_names) == (9, ("Ant", "cat", "dog"))
    assert source.records.labels().tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_what_is_missing_is_said_with_what_to_do(tmp_path):
    make_image_folder(tmp_path / "mine")
    (tmp_path / "mine" / "val" / "bird").mkdir()
    for name, split, folder, expected in [
        ("image_folder", "train", None, "Set data.data_dir"),
        ("image_folder", "train", tmp_path, r"no folder \S+train\. Lay images out as \S+train/CLASS/"),
        ("image_folder", "test", tmp_path / "mine", r"no folder \S+test\. .* data.eval_split"),
        ("image_folder", "val", tmp_path / "mine", "no class of the training images 'bird'"),
        ("tiny_imagenet", "train", tmp_path, r"no Tiny-ImageNet in .*unzip -q tiny-imagenet-200\.zip"),
        ("tiny_imagenet", "test", tmp_path, "no split of tiny_imagenet 'test'"),
        ("imagenet2012", "train", tmp_path, "tfds build imagenet2012 --file_format array_record --data_dir"),
        ("image_foldr", "train", tmp_path, "Did you mean 'image_folder'"),
        ("file_lst", "train", tmp_path, "Did you mean 'file_list'"),
    ]:
        with pytest.raises(UserError, match=expected):
            open_source(name, split, folder and str(folder))


def test_of_the_many_data_sets_some_are_named():
    with pytest.raises(UserError, match=r"there is no dataset 'cifar11'\. Did you mean .* and \d+ more\.$") as error:
        open_source("cifar11", "train", None)
    assert len(str(error.value)) < 2500


def test_an_empty_class_folder_is_named_or_tolerated(tmp_path, caplog):
    make_image_folder(tmp_path)
    (tmp_path / "train" / "eel").mkdir()
    with pytest.raises(UserError, match=r"no image of eel in \S+train"):
        open_source("image_folder", "train", str(tmp_path))
    assert open_source("image_folder", "train", str(tmp_path), on_error="skip").class_names == ("cat", "dog", "eel")
    assert "no image of eel" in caplog.text


class Counted:
    """Records that count how often they are read."""

    def __init__(self, images, labels):
        self.images, self.given, self.reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        self.reads += len(indices)
        return [{"image": self.images[i], "label": self.given[i]} for i in indices]

    def name(self, index):
        return f"record {index}"


def test_an_image_is_decoded_once_where_it_is_kept(tmp_path):
    make_tiny_imagenet(tmp_path / "tiny", each=2)
    folder = open_source("tiny_imagenet", "train", str(tmp_path / "tiny"))
    counted = Counted([folder.records.__getitems__([i])[0]["image"] for i in range(6)], [0, 0, 1, 1, 2, 2])
    source = Source(counted, folder.class_names, (64, 64, 3))
    kept = InMemory(source)
    first = kept.read(np.array([4, 1, 1]))
    np.testing.assert_array_equal(first[0], folder.read(np.array([4, 1, 1]))[0])
    kept.read(np.array([1, 4, 2]))
    assert counted.reads == 4  # 4, 1, 1 and then only 2


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_an_error(tmp_path, label, caplog):
    make_tiny_imagenet(tmp_path / "tiny", each=1)
    folder = open_source("tiny_imagenet", "train", str(tmp_path / "tiny"))
    image = folder.records.__getitems__([0])[0]["image"]
    source = Source(Counted([image, image], [1, label]), folder.class_names, (64, 64, 3))
    with pytest.raises(UserError, match=f"record 1 is broken: its label is {label}, and there are 3 classes"):
        source.read(np.array([0, 1]))
    skipping = Source(source.records, folder.class_names, (64, 64, 3), on_error="skip")
    for _ in range(2):
        images, labels = skipping.read(np.array([0, 1]))
    assert labels.tolist() == [1, -1]
    assert not images[1].any()
    assert caplog.text.count("skipped record 1") == 1


def test_an_empty_share_of_a_batch_is_read_as_nothing(imagenet, data_dir, tmp_path):
    """The last batch of an epoch may leave a host of several without images."""
    for name, split, folder in (("imagenet2012", "train", str(imagenet)), ("digits", "train[:9]", data_dir)):
        source = open_source(name, split, folder)
        source = source.of(source.records, CentreCrop(32, 24, source.image_shape[-1]))
        images, labels = source.read(np.array([], int))
        assert (images.shape[:1], labels.shape, labels.dtype) == ((0,), (0,), np.int32)
        assert InMemory(source).read(np.array([], int))[1].shape == (0,)


def test_a_split_without_images_is_told_from_one_that_is_not_there(data_dir):
    for split in ("train[5:3]", "train[5:5]", "test[:0%]", "test[:5]+test[9:7]", "train[5:2] + test"):
        with pytest.raises(UserError, match=r"^the split .* of digits has no images\. Choose another slice\.$"):
            open_source("digits", split, data_dir)
    with pytest.raises(UserError, match=r"there is no split of digits 'trian\[:3\]'"):
        open_source("digits", "trian[:3]", data_dir)
    with pytest.raises(UserError, match=r"there is no split of digits 'all\[:3\]'"):
        open_source("digits", "all[:3]", data_dir)
    assert len(open_source("digits", "train[:0%]+test", data_dir)) == 359


@pytest.mark.parametrize("part", ["train[1430:1440]", "train[2000:]", "train[-1500:]", "train[:150%]"])
def test_a_slice_beyond_the_end_is_told_how_many_images_there_are(data_dir, part):
    message = f"the split {part} of digits goes beyond the 1,438 images of train. Choose a slice within them."
    for split in (part, f"test+{part}"):
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            open_source("digits", split, data_dir)


@pytest.mark.parametrize(
    "part", ["train[3]", "train[::2]", "train[-1]", "train[1:9:2]", "train[1.5:9]", "train[:9", "train[:]"]
)
def test_what_is_no_slice_is_told_how_to_write_one(data_dir, part):
    message = f"the split {part} of digits is not a valid slice. Write train[:90%], train[100:200] or"
    with pytest.raises(UserError, match=f"^{re.escape(message)} "):
        open_source("digits", f"test+{part}", data_dir)


@pytest.mark.parametrize(
    "part", ["train[:2shard]", "train[5shard:]", "train[-2shard:]", "train[:-2shard]", "train[1shard]"]
)
def test_a_slice_beyond_the_shards_is_told_how_many_there_are(data_dir, part):
    message = f"the split {part} of digits goes beyond the 1 shard of train. Choose a slice within them."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        open_source("digits", part, data_dir)
    for whole in ("train[:1shard]", "train[-1shard:]", "train[0shard]", "train[-1shard]"):
        assert len(open_source("digits", whole, data_dir)) == 1438


def test_a_builder_that_is_not_prepared_or_has_no_images_is_one_line(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    with pytest.raises(UserError, match=r"^dataset cifar10 is not prepared in \S+\. Set data\.data_dir"):
        open_builder("train", tfds.builder("cifar10", data_dir=tmp_path))
    with pytest.raises(UserError, match=r"^dataset imdb_reviews has text \(Text\), label .*, but needs image"):
        open_builder("train", tfds.builder("imdb_reviews", data_dir=tmp_path))


@pytest.mark.parametrize("split", ["train[9:8]", "train[:0]", "train[50%:10%]", "train+train[5:2]"])
def test_a_slice_without_images_is_refused_where_only_its_size_is_known(split):
    with pytest.raises(UserError, match=r"^split '.*' has no images\. Name a split, or a slice such as"):
        described._count(split, {"train": 10})


def test_a_class_may_end_in_a_tilde(tmp_path):
    make_image_folder(tmp_path)
    (tmp_path / "train/dog").rename(tmp_path / "train/dog~")
    (tmp_path / "val/dog").rename(tmp_path / "val/dog~")
    source = open_source("image_folder", "train", str(tmp_path))
    assert source.class_names == ("cat", "dog~")
    assert set(source.records.labels()) == {0, 1}


@pytest.mark.parametrize("odd", ["-1", "012", "+3", "1e1", "nan", "9" * 5000])
def test_an_odd_number_among_whole_ones_is_named(tmp_path, odd):
    """It made names of all labels, and so renumbered the classes in the order of text."""
    (tmp_path / "train.csv").write_text(
        "path,label\n" + "".join(f"{i}.png,{i}\n" for i in range(11)) + f"b.png,{odd}\n"
    )
    said = f"gives .*b.png the label '{re.escape(odd)}' among" if len(odd) < 9 else "has a label of 5,000 digits, and"
    with pytest.raises(
        UserError, match=f"^the list train of .* {said} .*or make them names, such as id7\\.$"
    ) as raised:
        open_source("file_list", "train", str(tmp_path))
    assert len(str(raised.value)) < 400


def test_a_list_is_read_as_csv_has_it(tmp_path):
    """Reads blank lines, spaces around names and fields, quoted commas and line ends, and Windows' ends of lines."""
    text = '\n \npath , label\r\n\r\n "a,b.png", cat\r\n \t\r\n"c\nd.png",dog \r\n e.png ,"big ""cat"""\n'
    (tmp_path / "train.csv").write_text(text, newline="")
    source = open_source("file_list", "train", str(tmp_path))
    assert source.class_names == ('big "cat"', "cat", "dog")
    assert [path.removeprefix(f"{tmp_path}/") for path in source.records.paths] == ["a,b.png", "c\nd.png", "e.png"]
    assert source.records.labels().tolist() == [1, 2, 0]


def test_a_quotation_mark_that_is_not_closed_loses_no_image(tmp_path):
    for row in ('"b.png,dog', 'b.png,"dog', 'b.png,"dog""'):
        (tmp_path / "train.csv").write_text(f"path,label\na.png,cat\n{row}\nc.png,cat\n")
        with pytest.raises(UserError, match=r"in image 2, (which has no path|whose label has several lines)"):
            open_source("file_list", "train", str(tmp_path))


@pytest.mark.parametrize("key", ["path", "label"])
@pytest.mark.parametrize("wrong", ["a\0b", "a\ud800", "\udfff\ud800"])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, key, wrong):
    rows = [{"path": "a.png", "label": "x"}, {"path": "b.png", "label": "y"} | {key: wrong}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"jsonl is not a valid list of images: .* in image 2, whose path or label has"):
        open_source("file_list", "train", str(tmp_path))


@pytest.mark.parametrize("labels", [["-1", "1", "background"], ["098", "099", "100"], ["1e1", "2e1"], ["12", "1_0"]])
def test_labels_are_names_where_no_whole_number_is_meant(tmp_path, labels):
    for label in labels:
        photograph(np.random.default_rng(0), 8, 8).save(tmp_path / f"{label}.png")
    (tmp_path / "train.csv").write_text("path,label\n" + "".join(f"{label}.png,{label}\n" for label in labels))
    assert open_source("file_list", "train", str(tmp_path)).class_names == tuple(sorted(labels))

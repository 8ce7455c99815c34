"""The logit store: keys, what lies on disk, and what damage looks like."""

import dataclasses
import errno
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.errors import UserError
from ldrld_jax.logit_store import store as logit_store
from ldrld_jax.logit_store.feed import missing_epochs
from ldrld_jax.logit_store.store import LogitStore
from ldrld_jax.logit_store.top import top_logits
from ldrld_jax.train.plan import Run
from ldrld_jax.train.teacher import NetworkTeacher, open_store

KEY = {"dtype": "float16", "classes": 7, "data": {"records": 50}, "teacher": {"model": "resnet20"}}


TEST = {"split": "test", "images": 50, "digest": "f0"}
LOCAL = ["method=ldrld", "loss.ldrld.use_remainder=False"]


@pytest.fixture
def store(tmp_path):
    store = LogitStore(str(tmp_path / "a store"), KEY)
    store.create(teacher_top1=56.93, evaluated=TEST)
    return store


@pytest.fixture
def logits(rng):
    return rng.normal(0, 5, (50, 7)).astype(np.float16)


@pytest.fixture
def planned(tiny, tmp_path):
    """`planned(*overrides)`: the plan of a run with a store, and the store as its key would have it."""

    def make(*overrides: str):
        flags = ["method=bild", "teacher.checkpoint=untrained", f"logits.dir={tmp_path / 'logits'}", "data.pad=1"]
        run = Run.plan(config_lib.resolve(tiny(*flags, *overrides)), tmp_path / "run")
        teacher = NetworkTeacher(*run.networks.random("tiny_net", run.config.teacher.data, seed=0))
        return run, open_store(run, teacher)

    return make


def test_an_epoch_is_there_once_it_is_written_and_comes_back_bit_for_bit(store, logits, monkeypatch):
    monkeypatch.setattr(logit_store, "_CHUNK_BYTES", 16 * 7 * 2)  # four files
    assert 3 not in store
    store.write(3, logits)
    assert 3 in store
    assert store.read(3).dtype == np.float16
    np.testing.assert_array_equal(store.read(3), logits)
    assert len(list(pathlib.Path(store.directory, "00003", "c").rglob("0"))) > 1


@pytest.fixture
def largest(tmp_path, rng):
    """A store of the three largest of seven logits, and an epoch of it."""
    store = LogitStore(str(tmp_path / "largest"), {**KEY, "top_k": 3})
    store.create(teacher_top1=56.93, evaluated=TEST)
    return store, jax.device_get(top_logits(rng.normal(0, 5, (50, 7)), 3, np.float16))


def test_an_epoch_of_the_largest_logits_comes_back_bit_for_bit_and_takes_what_the_formula_says(largest, monkeypatch):
    monkeypatch.setattr(logit_store, "_CHUNK_BYTES", 26 * 3 * 2)
    store, logits = largest
    store.write(3, logits)
    chex.assert_trees_all_equal(store.read(3), logits)
    assert store.bytes_per_epoch == 50 * (3 * (2 + 2) + 4)
    files = [path for path in pathlib.Path(store.directory, "00003").rglob("*") if "c" in path.parts and path.is_file()]
    assert len(files) == 2 + 2 + 2  # of 25 rows
    assert sum(path.stat().st_size for path in files) == store.bytes_per_epoch + 4 * len(files)  # a CRC in each


@pytest.mark.parametrize("array", ["values", "classes", "rest"])
def test_damage_to_each_array_of_the_largest_is_named(largest, array):
    store, logits = largest
    store.write(3, logits)
    chunk = next(path for path in pathlib.Path(store.directory, "00003", array, "c").rglob("*") if path.is_file())
    flip_a_bit(chunk)
    with pytest.raises(UserError, match=r"00003 is damaged: .*igest mismatch.* Delete this folder"):
        store.read(3)
    chunk.unlink()
    with pytest.raises(UserError, match=r"00003 is damaged: a part of it is missing. Delete this folder"):
        store.read(3)


def test_an_epoch_that_was_cut_short_is_not_there_and_is_written_again(store, logits):
    store.write(3, logits)
    pathlib.Path(store.directory, "00003", "whole").unlink()
    pathlib.Path(store.directory, "00003", "c", "0", "0").unlink()
    assert 3 not in store
    store.write(3, logits)
    np.testing.assert_array_equal(store.read(3), logits)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (flip_a_bit, "igest mismatch"),
        (lambda chunk: chunk.write_bytes(chunk.read_bytes()[:100]), ""),
        (lambda chunk: chunk.unlink(), "a part of it is missing"),
        (lambda chunk: (chunk.parents[2] / "zarr.json").unlink(), ""),
    ],
    ids=["a bit", "half a file", "no file", "no shape"],
)
def test_damage_is_named_with_the_folder_to_delete(store, logits, damage, how):
    store.write(3, logits)
    damage(pathlib.Path(store.directory, "00003", "c", "0", "0"))
    with pytest.raises(UserError, match=rf"00003 is damaged: .*{how}.* Delete this folder"):
        store.read(3)


def test_the_first_of_two_writers_sets_the_key(store):
    other = LogitStore(store.directory, {**KEY, "teacher": {"model": "vgg8"}})
    with pytest.raises(
        UserError, match=r"other logits: teacher\.model \('resnet20' there, 'vgg8' here\)\. Set another"
    ):
        other.create(teacher_top1=1.0, evaluated=TEST)
    store.create(teacher_top1=99.0, evaluated=TEST)
    assert store.teacher_top1(TEST) == 56.93
    assert store.teacher_top1(TEST | {"digest": "00"}) is None


def test_a_file_that_is_no_key_is_refused(store):
    whole = {"key": store.key, "teacher_top1": 56.93, "evaluated": TEST}
    partial = [{name: whole[name] for name in whole if name != left_out} for left_out in whole]
    for text in ("{", "[]", '{"key": 3}', *map(json.dumps, [*partial, whole | {"teacher_top1": None}])):
        pathlib.Path(store.directory, "key.json").write_text(text)
        with pytest.raises(UserError, match=r"is not the key\.json of a logit store"):
            store.teacher_top1(TEST)


def test_epochs_without_a_key_are_nobodys(store, logits):
    store.write(3, logits)
    pathlib.Path(store.directory, "key.json").unlink()
    for use in (
        store.check_key,
        lambda: store.teacher_top1(TEST),
        lambda: store.create(teacher_top1=1, evaluated=TEST),
    ):
        with pytest.raises(
            UserError, match=r"a store has stored epochs and no key\.json, which says .* Restore it, or"
        ):
            use()
    assert not pathlib.Path(store.directory, "key.json").exists()


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "UNAVAILABLE", "RESOURCE_EXHAUSTED"])
def test_a_failure_of_the_machine_is_no_damage(store, logits, code, monkeypatch):
    store.write(3, logits)

    def fails(*args, **options):
        raise ValueError(
            f"{code}: Error opening '{store.directory}/key.json' [OS error 13] [source locations='a.cc:1']"
        )

    class Files:
        read = write = list = fails

    monkeypatch.setattr(logit_store, "_files", lambda directory: Files())
    monkeypatch.setattr(logit_store.ts, "open", fails)
    uses = [store.check_key, lambda: store.teacher_top1(TEST), lambda: store.create(teacher_top1=1, evaluated=TEST)]
    for use in (*uses, lambda: 3 in store, lambda: store.read(3), lambda: store.write(4, logits)):
        with pytest.raises(
            UserError, match=rf"store cannot be used: {code}: Error opening '.*key.json'\. This is no sign"
        ):
            use()


def test_a_full_disk_is_one_line(store, logits, monkeypatch):
    def full(*args, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing [No space left on device]\n many lines")

    monkeypatch.setattr(logit_store.ts, "open", full)
    with pytest.raises(OSError, match="no space left for the logit store; its whole epochs are intact") as caught:
        store.write(3, logits)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, store.directory)
    assert 3 not in store


def test_a_disk_that_is_too_small_is_refused_before(planned, monkeypatch, capsys):
    run, store = planned("epochs=3")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(UserError, match=r"needs 5\.4 kB more, and 5\.0 kB are free there"):
        missing_epochs(store, run.batches, run.config.epochs)
    assert "will take 5.4 kB: 3 epochs x 90 images x 10 classes x 2 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("data.pad=2", r"data\.pad \(1 there, 2 here\)"),
        ("data.flip=True", r"data\.flip \(False there, True here\)"),
        ("data.rand_augment=1", r"data\.rand_augment"),
        ("data.fraction=.5", r"data\.fraction .*data\.images .*data\.records \(90 there, 45 here\)"),
        ("data.train_split=train[10:100]", r"data\.images .*data\.train_split"),
        ("data.augment_seed=5", r"augment_seed \(0 there, 5 here\)"),
        ("seed=5", r"augment_seed \(0 there, 5 here\)"),
        ("logits.top_k=8", r"top_k \(None there, 8 here\)"),
        ("logits.dtype=bfloat16", r"dtype \('float16' there, 'bfloat16' here\)"),
        ("precision=bfloat16", r"teacher\.precision"),
        ("teacher.data.mean=(.25,)", r"teacher\.mean \(\[\[0\.305\]\] there, \[\[0\.25\]\] here\)"),
        ("teacher.model=resnet20", r"teacher\.model"),
    ],
)
def test_a_store_of_another_key_is_refused_by_the_parts_that_differ(planned, override, part):
    _, store = planned()
    store.create(teacher_top1=56.93, evaluated=TEST)
    _, other = planned(override)
    with pytest.raises(UserError, match=rf"holds other logits: .*{part}.*\. Set another logits\.dir\."):
        other.teacher_top1(TEST)


def test_other_orders_students_methods_labels_and_loaders_share_a_store(planned):
    _, store = planned()
    _, other = planned(
        *("seed=5", "data.augment_seed=0", "student.model=resnet8", "method=ldrld+dist", "data.label_noise=symmetric"),
        *("data.label_noise_rate=.2", "data.loader=resident", "batch_size=7", "epochs=9", "data.remainder=drop"),
        *("data.mean=(.1,)", "teacher.data.mean=(.305,)", "logits.views=2", "data.workers=2", "data.threads=3"),
    )
    assert other.key == store.key


def test_a_store_of_images_in_another_order_is_refused(planned):
    _, store = planned()
    data = store.key["data"]
    swapped = dataclasses.replace(store, key=store.key | {"data": data | {"listing": "0" * 32}})
    store.create(teacher_top1=12.5, evaluated=TEST)
    with pytest.raises(UserError, match=rf"holds other logits: data\.listing \('{data['listing']}' there, '0"):
        swapped.teacher_top1(TEST)


def test_one_bit_of_a_weight_changes_the_checksum():
    weights = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    before = logit_store.checksum(weights)
    weights["b"].view(np.uint32)[3] ^= 1
    assert logit_store.checksum(weights) != before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.model=ema", "ema_decay=.9"], "teacher.model=ema changes as the student trains"),
        (["data.mixup=.2", "data.remainder=drop"], r"data\.mixup blends"),
        (["method=mlkd", "loss.mlkd.views=2"], "method=mlkd compares 2 views of an image, and one is stored"),
        (["method=wkd"], "method=wkd takes the teacher's last layer, which is not stored"),
        (["logits.top_k=0"], r"logits\.top_k must be at least 1, got 0"),
        (["logits.top_k=4"], r"method=kd reads every logit .* logits\.top_k=4 keeps .*: logits\.spread_rest=True\.$"),
        (["logits.top_k=10", "logits.spread_rest=True"], r"logits\.top_k must be below the number of classes \(10\)"),
        (["logits.spread_rest=True"], r"logits\.top_k is unset\. Set it, or unset logits\.spread_rest"),
        (["logits.top_k=7", "method=ldrld"], "method=ldrld reads every logit"),
        (["logits.top_k=6", *LOCAL], r"method=ldrld compares the 7 largest .* Set it to at least 7\.$"),
        (["logits.top_k=7", *LOCAL, "standardize=True"], "method=ldrld reads every logit"),
        (["logits.top_k=8", "method=bild+dist"], "method=dist reads every logit"),
        (["logits.top_k=7", "method=bild", "logits.spread_rest=True"], "method=bild compares the 8 largest"),
        (["logits.top_k=1", "method=topk_tail", "loss.topk_tail.temperature=2."], "method=topk_tail reads every logit"),
        (["logits.dtype=float8"], "there is no logits.dtype 'float8'"),
        (["logits.views=0"], r"logits\.views must be at least 1, got 0"),
        (["data.augment_seed=-1"], r"data\.augment_seed must be at least 0"),
    ],
)
def test_what_cannot_be_stored_is_refused(tiny, tmp_path, overrides, message):
    flags = ["method=kd", "teacher.checkpoint=untrained", f"logits.dir={tmp_path / 'logits'}"]
    with pytest.raises(UserError, match=message):
        Run.plan(config_lib.resolve(tiny(*flags, *overrides)), tmp_path / "run")
    assert not (tmp_path / "logits").exists()

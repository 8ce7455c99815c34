"""Predictions: the images that are named, one program for all of them, and tables that are whole or not there."""

import builtins
import csv
import io
import json
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldrld_jax import main as main_lib
from ldrld_jax.data.decode import BrokenImageError
from ldrld_jax.deploy import export, predict
from ldrld_jax.deploy.predict import Guess, find
from ldrld_jax.errors import UserError

BEFORE = {"turn_as_exif_says": True, "resize_shorter_side": None}
LABELS = ("dark", "grey", "light, or white", "also dark")
# Logits at a brightness of 0..1; the last class always equals the first.
WEIGHTS, BIAS = np.array([-4.0, 0.0, 4.0, -4.0], np.float32), np.array([2.0, 1.0, -2.0, 2.0], np.float32)


@pytest.fixture
def student():
    """A student that looks at the brightness of an image, and the shapes of the batches that it was traced for."""
    shapes = []

    def call(images):
        shapes.append(images.shape)
        brightness = jnp.mean(images, axis=(1, 2), dtype=jnp.float32) / 255
        return brightness * WEIGHTS[None] + BIAS[None]

    described = {"input": {"shape": ["batch", 2, 2, 1]}, "before": BEFORE}
    logits = jax.ShapeDtypeStruct((1, len(LABELS)), jnp.float32)
    return export.Student(types.SimpleNamespace(call=call, out_avals=(logits,)), described, LABELS), shapes


def softmax(grey: int) -> np.ndarray:
    powers = np.exp(np.float64(grey) / 255 * WEIGHTS + BIAS)
    return powers / powers.sum()


def draw(path, grey: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 2), grey).save(path)
    return str(path)


@pytest.mark.parametrize("count", [1, 64, 70])
def test_one_program_is_compiled_for_any_number_of_images_broken_or_not(count, student, tmp_path):
    paths = [draw(tmp_path / f"{i}.png", 3 * i) for i in range(count)]
    broken = [i for i in (0, 65, 69) if 1 < count > i]
    for i in broken:
        (tmp_path / f"{i}.png").write_bytes(b"junk")
    found = list(predict.predict(student[0], paths, top=2))
    assert student[1] == [(min(count, 64), 2, 2, 1)]
    assert [path for path, _ in found] == paths
    assert [i for i, (_, guesses) in enumerate(found) if isinstance(guesses, BrokenImageError)] == broken
    for i, (_, guesses) in enumerate(found):
        if i not in broken:
            expected = softmax(3 * i)
            assert [guess.label for guess in guesses] == list(np.argsort(-expected, kind="stable")[:2])
            np.testing.assert_allclose([g.probability for g in guesses], sorted(expected)[:-3:-1], rtol=1e-6)


def test_of_equal_classes_the_lower_is_first_and_there_are_no_more_than_all(student, tmp_path):
    ((_, guesses),) = predict.predict(student[0], [draw(tmp_path / "a.png", 0)], top=9)
    assert [(guess.label, guess.name) for guess in guesses] == [
        (0, "dark"),
        (3, "also dark"),
        (1, "grey"),
        (2, "light, or white"),
    ]
    assert guesses[0].probability == guesses[1].probability


def test_a_folder_stands_for_the_images_in_and_below_it_in_sorted_order(tmp_path):
    for name in ("b.png", "a/2.JPG", "a/1.png", "a/b/3.webp", ".hidden/4.png", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a/up").symlink_to(tmp_path)
    names = [str(tmp_path / name) for name in ("a/1.png", "a/2.JPG", "a/b/3.webp", "b.png")]
    assert find([str(tmp_path)]) == names
    assert find([f"{tmp_path}/b.png", f"{tmp_path}/a"]) == [names[3], *names[:3]]
    with pytest.raises(UserError, match=rf"there is no image in {tmp_path}/c\. Supported are \.bmp, "):
        find([f"{tmp_path}/c"])


def test_a_pattern_begins_where_the_folders_that_exist_end(tmp_path, monkeypatch):
    for name in ("x [1]/a/1.png", "x [1]/2.png", "x 1/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find(["x [1]/**/*.png"]) == ["x [1]/2.png", "x [1]/a/1.png"]
    assert find([f"{tmp_path}/x [12]/*.png"]) == [f"{tmp_path}/x 1/3.png"]
    monkeypatch.chdir(tmp_path / "x 1")
    assert find(["*.png"]) == ["3.png"]
    assert find(["../x*1]/*.png"]) == ["../x [1]/2.png"]


def test_standard_input_names_a_path_a_line_as_it_is(monkeypatch):
    lines = b"b c.png\r\n\n/a/[0]*.png\ncaf\xe9.png\nlast"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert find(["-"]) == ["b c.png", "/a/[0]*.png", os.fsdecode(b"caf\xe9.png"), "last"]
    with pytest.raises(UserError, match=r"standard input names no image\."):
        find(["-"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.png\0b.png\0")))
    with pytest.raises(UserError, match=r"^- reads one path per line, but got NUL characters\. Use find -print, not"):
        find(["-"])


GUESSES = [Guess(2, "light, or white", 0.75), Guess(0, 'the "dark"\nside', 0.25)]
ROWS = [("a b.png", 1, 2, "light, or white", 0.75), ("a b.png", 2, 0, 'the "dark"\nside', 0.25)]
CSV = """\
path,rank,class_index,class_name,probability
a b.png,1,2,"light, or white",0.75
a b.png,2,0,"the ""dark""
side",0.25
caf\\udce9.png,1,1,grey,1.0
"""
JSON_LINES = r"""{"path": "a b.png", "rank": 1, "class_index": 2, "class_name": "light, or white", "probability": 0.75}
{"path": "a b.png", "rank": 2, "class_index": 0, "class_name": "the \"dark\"\nside", "probability": 0.25}
{"path": "caf\\udce9.png", "rank": 1, "class_index": 1, "class_name": "grey", "probability": 1.0}
"""


def write(file) -> None:
    with predict.output(str(file)) as add:
        assert not file.exists() or file.read_text() == "old"
        add("a b.png", GUESSES)
        add(os.fsdecode(b"caf\xe9.png"), [Guess(1, "grey", 1.0)])


@pytest.mark.parametrize(("suffix", "text"), [(".csv", CSV), (".jsonl", JSON_LINES)])
def test_a_table_of_text_appears_once_it_is_whole(suffix, text, tmp_path, capsys):
    file = tmp_path / f"found{suffix}"
    write(file)
    assert file.read_text() == text
    assert capsys.readouterr().out == f"{file}: 2 images\n"
    file.write_text("old")
    write(file)
    assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert list(csv.reader(io.StringIO(CSV)))[1:3] == [list(map(str, row)) for row in ROWS]
    assert [tuple(json.loads(line).values()) for line in JSON_LINES.splitlines()[:2]] == ROWS


def test_a_table_in_parquet_has_typed_columns_and_few_groups(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(predict, "_ROWS_IN_A_GROUP", 3)
    write(tmp_path / "found.parquet")
    table = parquet.read_table(tmp_path / "found.parquet")
    assert [f"{field.name}: {field.type}" for field in table.schema] == [
        *("path: string", "rank: int32", "class_index: int32", "class_name: string", "probability: float"),
    ]
    assert [tuple(row.values()) for row in table.to_pylist()] == [*ROWS, ("caf\\udce9.png", 1, 1, "grey", 1.0)]
    with predict.output(str(tmp_path / "none.parquet")):
        pass
    assert parquet.read_table(tmp_path / "none.parquet").num_rows == 0


@pytest.mark.parametrize("suffix", predict._WRITERS)
def test_an_error_leaves_the_table_of_before(suffix, tmp_path):
    file = tmp_path / f"found{suffix}"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), predict.output(str(file)) as add:
        add("a.png", GUESSES)
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_table_is_refused_where_it_cannot_be_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "link.csv").symlink_to(tmp_path / "elsewhere.csv")
    real = builtins.__import__
    absent = lambda name, *rest: (_ for _ in ()).throw(ImportError) if "pyarrow" in name else real(name, *rest)  # noqa: E731
    monkeypatch.setattr(builtins, "__import__", absent)
    for name, line in {
        "found.txt": "--output must end in one of .csv, .jsonl, .parquet, got",
        "link.csv": "link.csv is a link, and nothing is written through one. Remove it.",
        "nowhere/found.csv": "there is no folder .*nowhere for --output. Create it.",
        "found.parquet": "a .parquet file takes pyarrow: pip install pyarrow, or write a .csv or .jsonl file.",
    }.items():
        with pytest.raises(UserError, match=line), predict.output(str(tmp_path / name)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["link.csv"]


@pytest.fixture
def command(student, monkeypatch, tmp_path):
    """`predict` by that student, in a folder of its own."""
    monkeypatch.setattr(export, "is_exported", lambda folder: True)
    monkeypatch.setattr(export, "read_student", lambda folder: student[0])
    monkeypatch.chdir(tmp_path)
    return lambda *argv: main_lib.main(argv, "predict")


def test_unreadable_images_get_a_line_each_and_the_others_are_predicted(command, tmp_path, monkeypatch, capsys):
    for name, grey in (("a/0.png", 0), ("a/2.png", 255), ("a/3.png", 100)):
        draw(tmp_path / name, grey)
    (tmp_path / "a/1.png").write_bytes(b"junk")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"gone.png\na/3.png\n")))
    assert command("a", "-", "--top_k", "1", "--output=found.csv") == 1
    out, err = capsys.readouterr()
    assert out == "found.csv: 4 images\n"
    assert err.splitlines() == [
        "ldrld_jax: a/1.png is broken or not in a supported image format: not an image (4 bytes)",
        "ldrld_jax: gone.png cannot be read: No such file or directory",
    ]
    rows = list(csv.reader(io.StringIO((tmp_path / "found.csv").read_text())))[1:]
    assert [row[:4] for row in rows] == [
        ["a/0.png", "1", "0", "dark"],
        ["a/2.png", "1", "2", "light, or white"],
        ["a/3.png", "1", "1", "grey"],
        ["a/3.png", "1", "1", "grey"],
    ]
    np.testing.assert_allclose([float(row[4]) for row in rows], [softmax(g).max() for g in (0, 255, 100, 100)], 1e-6)
    assert command("a/2.png", "--top_k=2") == 0
    best, second = sorted(softmax(255))[:-3:-1]
    assert capsys.readouterr().out == f"a/2.png  light, or white {100 * best:.2f} %, grey {100 * second:.2f} %\n"


def test_a_standard_input_that_is_closed_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert command("-") == 2
    assert capsys.readouterr().err == (
        "ldrld_jax: - reads the paths of images from standard input, which is closed. Pipe them, or name the images.\n"
    )


def test_if_no_image_is_readable_the_table_of_before_stays(command, tmp_path, capsys):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "found.jsonl").write_text("old")
    assert command("--output", "found.jsonl", "0.png", "1.png") == 2
    out, err = capsys.readouterr()
    assert (out, [line.split()[1] for line in err.splitlines()]) == ("", ["0.png", "1.png"])
    assert (tmp_path / "found.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "found.jsonl"]

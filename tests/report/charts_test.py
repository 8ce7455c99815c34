"""Charts begin where their data do, and their figures carry the data."""

import base64
import html
import json
import re

import pytest

from ldrld_jax.report.charts import Scale
from ldrld_jax.report.groups import compare
from ldrld_jax.report.sections import sections
from tests.report.folders import found


def test_an_axis_starts_and_ends_where_the_data_do():
    scale = Scale([3, 40, 15], 10, 110)
    assert (scale(3), scale(40)) == (10, 110)
    assert scale.ticks == [10, 20, 30, 40]
    assert Scale([3, 6, 9], 0, 1, own=True).ticks == [3, 6, 9]
    assert Scale([0, 1, 100], 0, 1, own=True).ticks == [0, 20, 40, 60, 80, 100]  # 0 and 1 would overlap
    assert Scale([96.0, 96.0], 0, 1)(96.0) == 0.5


@pytest.mark.parametrize("values", [(0.0, 1e308), (-1e308, 1e308), (1e308, 1e308)])
def test_numbers_of_any_size_have_few_ticks(values):
    assert 0 < len(Scale(values, 0, 1).ticks) < 8


def test_the_legend_is_in_the_order_of_the_final_values_and_the_figure_carries_its_numbers():
    curves = {"kd": (50.0, 70.0), "dkd": (60.0, 65.0), "ce": (40.0, 75.0)}
    runs = [found(m, 90.0, ((3.0, a), (6.0, b)), method=m) for m, (a, b) in curves.items()]
    runs.append(found("kd1", 90.0, ((3.0, 52.0), (6.0, 70.0)), seed=1))
    parts = {part.anchor: part for part in sections(compare(runs)[0], {}, 0)}
    content = parts["c0-curves"].content
    assert re.findall(r"<li>.*?</svg>(.*?)</li>", content) == ["ce", "kd", "dkd"]
    [(href, name, file)] = re.findall(
        r'href="data:application/json;base64,(.*?)" aria-label="(.*?)" download="(.*?)"', content
    )
    data = json.loads(base64.b64decode(href))
    assert data["kd"][0] == {"x": 3.0, "y": 51.0, "deviation": pytest.approx(2**0.5)}
    assert html.unescape(name) == "JSON of Learning curves, digits: resnet20 → resnet8"
    assert file == "Learning-curves-digits-resnet20-resnet8.json"


def test_the_papers_table_stands_beside_ours_with_both_protocols():
    pair = dict(data__name="cifar100", student__model="resnet8x4", teacher__model="resnet32x4")
    runs = [found(method="ldrld", seed=s, last=77.0 + s / 2, epochs=240, **pair) for s in (0, 1)]
    runs.append(found(method="ce", last=60.0, epochs=15, data__fraction=0.2, **pair))
    parts = {part.anchor: part.content for part in sections(compare(runs)[0], {}, 0)}
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in parts["c0-papers"].split("<tr>")[2:]]
    cells = {name: others for name, *others in rows}
    assert cells["ldrld"] == [
        *("77.20", "ICCV 2025, 240 epochs, best or last epoch not stated", "77.25 ± 0.35", "240 epochs, 2 runs"),
    ]
    assert cells["ce"][0] == "72.50"
    assert cells["ce"][2:] == ["60.00", "15 epochs, fraction=0.2, 1 run"]
    assert cells["dkd"][2:] == ["", "not trained"]
    assert "c0-papers" not in {part.anchor for part in sections(compare([found()])[0], {}, 0)}


def test_groups_whose_analysis_is_of_an_earlier_version_or_of_other_classes_are_left_out_of_the_classes():
    calibration = {"ece": 1.0, "examples": [1], "confidence": [0.5], "accuracy": [0.5]}
    old = {"calibration": calibration, "embedding": None, "embedded": [], "teacher": None}
    new = old | {"names": ["cat", "dog", "eel"], "class_images": [3, 2, 0], "class_top1": [90.0, 10.0, 0.0]}
    runs = [found(m, last, method=m) for m, last in (("kd", 97.0), ("dkd", 96.0), ("ce", 95.0))]
    analyses = {"kd": old, "dkd": new, "ce": new | {"names": ["a", "b", "c"]}}
    parts = {part.anchor: part.content for part in sections(compare(runs)[0], analyses, 0)}
    assert re.findall(r"<t[hd](?: [^>]*)?>([^<]*)", parts["c0-classes"]) == [
        *("class", "images", "dkd %", "dog", "2", "10.0", "cat", "3", "90.0"),
    ]
    assert "The classes in which dkd is least accurate come first." in parts["c0-classes"]

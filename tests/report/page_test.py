"""The page loads nothing, fits a phone, and can be read without seeing its pictures or colours."""

import base64
import html.parser
import io
import itertools
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ldrld_jax.data.given import as_source
from ldrld_jax.report import Report, pictures
from ldrld_jax.report.groups import compare
from ldrld_jax.report.outputs import Outputs, described, shown_images
from ldrld_jax.report.page import page
from tests.report.folders import found

STYLE = (pathlib.Path(page.__code__.co_filename).parent / "style.css").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def document() -> str:
    """A page with every picture, of made-up runs."""
    rng = np.random.default_rng(0)
    curve = ((1.0, 50.0), (2.0, 60.0), (4.0, 96.0))
    runs = [found(f"{m}{s}", 90 + s, curve, method=m, seed=s) for m in ("kd", "dkd") for s in (0, 1)]
    ldrld = dict(method="ldrld", loss__ldrld__irw_epsilon=1.5)
    runs += [found(f"d{d}", 93 + d / 4, curve, **ldrld, loss__ldrld__depth=d) for d in (3, 5, 7)]
    runs.append(found("ce", 85, method="ce", teacher={}))
    labels = np.arange(120) % 10
    teacher = Outputs(4 * np.eye(10)[labels] + rng.normal(size=(120, 10)), labels, None)
    xy = {"xy": rng.uniform(size=(120, 2)).tolist(), "silhouette": 0.1}
    analyses = {}
    for run in runs:
        student = Outputs(teacher.logits + rng.normal(size=(120, 10)), labels, xy)
        names = tuple(f"class {i} {HOSTILE}" for i in range(10))
        taught = None if run.method == "ce" else teacher
        analyses[run.folder] = described(student, taught, names)
        analyses[run.folder]["images_shown"] = shown_images(student, taught, names, photographs())
    report = Report(runs, [found("folder/running", curve=curve, seed=9)], [f"{HOSTILE}: no run here"])
    return page(report, compare(report.summaries, report.running), analyses)


def photographs():
    """A source of 120 pictures of one colour each."""
    pixels = np.broadcast_to(np.arange(120, dtype=np.uint8)[:, None, None, None], (120, 8, 8, 3))
    return as_source((pixels, np.arange(120) % 10), title="photographs")


class Reader(html.parser.HTMLParser):
    """Parser of what a screen reader goes by, which also checks that tags are closed as they were opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


def test_nothing_is_loaded_and_nothing_of_the_runs_becomes_markup(document):
    assert not re.search(r"https?:|@import|url\(", document)
    reader = Reader(document)
    assert reader.all("script", "link", "img", "iframe", "object") == []
    for tag, attributes in reader.tags:
        places = [attributes.get(name, "#") for name in ("href", "src", "srcset", "action")]
        saved = "data:application/json;base64," if tag == "a" and attributes.get("download") else "#"
        assert all(place.startswith(("#", "data:image/png;base64,", saved)) for place in places)
    assert HOSTILE not in document


def test_it_can_be_read_by_ear_and_by_keyboard(document):
    reader = Reader(document)
    assert reader.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("caption") == tags.count("table") > 3
    assert all(attributes["scope"] in ("row", "col") for attributes in reader.all("th"))
    pictures = [attributes for attributes in reader.all("svg") if attributes.get("aria-hidden") != "true"]
    assert len(pictures) > 20
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)
    scrolling = [attributes for attributes in reader.all("div") if attributes.get("class") == "scroll"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in scrolling)
    anchors = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    assert {link["href"][1:] for link in reader.all("a") if "download" not in link} <= anchors
    assert ":focus-visible" in STYLE


def test_every_picture_is_there(document):
    for name in (
        "overview",
        "curves",
        "sweeps",
        "ranks",
        "closeness",
        "correlation",
        "pairs",
        "classes",
        "confusion",
        "images",
        "features",
        "calibration",
    ):
        assert f'id="c0-{name}"' in document
    assert "ldrld depth=7: 94.75 at 4" not in document
    assert "kd: 96.00 at 4" in document
    assert "running (not finished)" in document


def test_classes_are_ordered_by_what_the_best_method_lost(document):
    table = document.partition('id="c0-classes"')[2].partition("</table>")[0]
    rows = [re.findall(r'"number">([\d.]+)<', row) for row in table.split("<tr>")[2:]]
    lost = [float(teacher) - float(best) for _, teacher, best, *_ in rows]
    assert len(lost) == 10
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > lost[-1]


def test_a_pixel_of_a_heat_map_has_the_colour_of_its_number():
    svg = pictures.heat_map([[0.0, 0.1], [0.2, 0.4]], "title", "", most=0.4)
    [data] = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        found = np.asarray(image.convert("RGB")).reshape(4, 3)
    expected = [pictures.colour(share) for share in (0.0, 0.25, 0.5, 1.0)]
    np.testing.assert_allclose(found, expected, atol=2)  # a step of 256 is at most 4 of a channel


def test_the_numbers_in_coloured_cells_are_legible():
    for share in np.linspace(0, 1, 101):
        text, cell = (luminance(pixel) for pixel in (pictures.ink(share), pictures.hex_colour(share)))
        assert (max(text, cell) + 0.05) / (min(text, cell) + 0.05) >= 4.5


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = np.frombuffer(bytes.fromhex(digits), np.uint8) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme):
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))

    def contrast(*names):
        low, high = sorted(luminance(colours[name]) for name in names)
        return (high + 0.05) / (low + 0.05)

    for paper in ("paper", "card"):
        assert min(contrast(text, paper) for text in ("ink", "soft", "accent")) >= 4.5
        assert min(contrast(mark, paper) for mark in ("over", "under", *(f"c{i}" for i in range(10)))) >= 3


MEASURE = """
<body style="margin:0;display:flex;background:#888"><script>
const text = %s, told = [];
const dark = text.replace("@media (prefers-color-scheme: dark)", "@media all");
const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const rgba = (colour) => {
  paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
  return [...paint.getImageData(0, 0, 1, 1).data];
};
const light = (colour) => {
  const [r, g, b] = rgba(colour).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
for (const [width, shown] of [[390, text], [1400, text], [390, dark], [1400, dark]]) {
  const frame = document.createElement("iframe");
  frame.style = `flex:none;width:${width}px;height:2000px;border:0;margin-right:10px`;
  frame.srcdoc = shown;
  frame.onload = () => {
    const root = frame.contentDocument.documentElement, view = frame.contentWindow;
    const all = (what) => [...root.querySelectorAll(what)];
    const boxes = (what) => all(what).filter(e => !e.closest(".scroll")).map(e => e.getBoundingClientRect());
    const loaded = view.performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length;
    const faded = all("main *:not(svg *)").filter(e => view.getComputedStyle(e).opacity < 1).length;
    const behind = (e) => {
      const colour = view.getComputedStyle(e).backgroundColor;
      return rgba(colour)[3] == 255 || e == root ? colour : behind(e.parentElement);
    };
    const read = all("body *").filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
      .filter(e => !e.closest("svg title, svg desc") && !e.style.fill);  // the cells of a matrix have their own test
    const contrasts = read.map(e => {
      const style = view.getComputedStyle(e);
      const [low, high] = [light(behind(e)), light(e.closest("svg") ? style.fill : style.color)].sort((a, b) => a - b);
      return (high + .05) / (low + .05);
    });
    all("details").forEach(e => e.open = true);
    const scrolling = all("*").filter(e => e != root && /auto|scroll/.test(view.getComputedStyle(e).overflowX)
                                      && e.scrollWidth > e.clientWidth);
    told.push({width, loaded, faded, scroll: root.scrollWidth, contrast: Math.min(...contrasts), read: read.length,
               scrolling: scrolling.length, unreachable: scrolling.filter(e => e.tabIndex < 0).length,
               paper: rgba(view.getComputedStyle(frame.contentDocument.body).backgroundColor)[0],
               right: Math.max(...boxes("main *").map(box => box.right)),
               small: Math.min(...boxes("details[open] svg text, .comparison > * svg text").map(box => box.height))});
    if (told.length == 4) console.log("MEASURED " + JSON.stringify(told).replaceAll('"', "'"));
  };
  document.body.append(frame);
}
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here: apt-get install chromium")
def test_chromium_shows_it_whole_and_legibly_on_a_phone_and_on_a_desk_in_light_and_dark(document, tmp_path):
    (tmp_path / "all.html").write_text(MEASURE % json.dumps(document).replace("</", "<\\/"))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += ["--window-size=3620,2000", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += [f"--screenshot={tmp_path / 'all.png'}", (tmp_path / "all.html").as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    [measured] = re.findall(r"MEASURED (\[.*?\])", done.stderr)
    views = json.loads(measured.replace("'", '"'))
    assert sorted((view["width"], view["paper"] > 128) for view in views) == [
        (width, light) for width in (390, 1400) for light in (False, True)
    ]
    for view in views:
        assert view["scroll"] == view["width"]
        assert view["right"] <= view["width"]
        assert view["loaded"] == 0
        assert view["faded"] == 0  # parts of the page that a rule for parts of a chart has caught
        assert view["small"] >= 8  # pixels of a line of text in a chart
        assert view["contrast"] >= 4.5
        assert view["read"] > 300
        assert view["unreachable"] == 0  # by the keyboard
        assert view["scrolling"] > 0 or view["width"] > 390  # the tables, within themselves
    with Image.open(tmp_path / "all.png") as shot:
        assert shot.size == (3620, 2000)
        for left, right in ((0, 390), (400, 1800)):
            pixels = np.asarray(shot.convert("L").crop((left, 0, right, 2000)), float)
            assert np.median(pixels) > 200  # paper
            assert 0.01 < np.mean(pixels < 128) < 0.5  # ink

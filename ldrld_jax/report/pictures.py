"""Pictures of matrices, features and calibration, as inline SVG."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from ldrld_jax.report.charts import marker, svg
from ldrld_jax.report.markup import Markup, join, scrolling, tag

# Dark to light, and evenly so: it reads in grey as well.
_COLOURS = ((13, 8, 35), (87, 16, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))
_PNG = "data:image/png;base64,"


def matrix(values: Sequence[Sequence[float]], title: str) -> Markup:
    """Draws a small matrix of weights by rank with its numbers, above the diagonal only."""
    size, cell, most = len(values), 44, max(map(max, values))
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    cells = [_cell(values[i][j], i, j - 1, cell, most, written=size <= 10) for i, j in pairs]
    ranks = [tag("text", "rank", x=4, y=16, class_="axis")]
    ranks += [tag("text", i + 1, x=22, y=(i + 1.1) * cell, text_anchor="middle") for i in range(size - 1)]
    ranks += [tag("text", j + 1, x=(j + 0.3) * cell - 1, y=16, text_anchor="middle") for j in range(1, size)]
    told = ", ".join(f"ranks {i + 1} and {j + 1}: {values[i][j]:.3f}" for i, j in pairs[:40])
    picture = svg((size - 0.1) * cell, (size - 0.3) * cell, title, f"Weights of pairs: {told}", *ranks, *cells)
    return tag("div", picture, style=f"max-width:{(size - 0.1) * cell:.0f}px")  # no larger than its numbers


def _cell(value: float, row: int, column: int, cell: int, most: float, *, written: bool) -> Markup:
    x, y = (column + 0.8) * cell, (row + 0.6) * cell
    share = value / most if most else 0.0
    text = tag("text", f"{value:.2f}".removeprefix("0"), x=x + cell / 2, y=y + cell / 2 + 5, text_anchor="middle",
               style=f"fill:{ink(share)}")  # fmt: skip
    box = tag("rect", x=x, y=y, width=cell - 2, height=cell - 2, rx=3, fill=hex_colour(share))
    return join([box, text if written else None])


def heat_map(values: Sequence[Sequence[float]], title: str, description: str, *, most: float) -> Markup:
    """Draws a large matrix as pixels, from 0 to `most`."""
    size = len(values)
    return svg(size, size, title, description, _pixels([value / (most or 1) for row in values for value in row], size))


def colour_bar(most: float, label: str) -> Markup:
    """Draws the colours of `heat_map` with their numbers."""
    bar = _pixels([i / 59 for i in range(60)], 60, transform="translate(20 4) scale(4 14)")
    texts = [
        tag("text", f"{share * most:.2f}", x=20 + 240 * share, y=34, text_anchor="middle") for share in (0, 0.5, 1)
    ]
    return svg(280, 40, label, f"From 0, dark, to {most:.2f}, light.", bar, *texts)


def _pixels(shares: Sequence[float], width: int, **attributes: Any) -> Markup:
    """Encodes an image of numbers from 0 to 1, row by row, a pixel each, in 256 colours."""
    from PIL import Image

    numbers = bytes(round(255 * min(max(share, 0.0), 1.0)) for share in shares)
    image = Image.frombytes("P", (width, len(shares) // width), numbers)
    image.putpalette([part for i in range(256) for part in colour(i / 255)])
    return tag(
        "image", href=f"{_PNG}{_encoded(image)}", width=width, height=image.height, class_="pixels", **attributes
    )


def thumbnail(image: Any, largest: int = 64) -> str:
    """Encodes an image `[height, width, 1 or 3]` uint8 as a PNG of at most so many pixels a side, in base64."""
    from PIL import Image

    small = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    small.thumbnail((largest, largest))
    return _encoded(small)


def photograph(png: str, name: str) -> Markup:
    """Draws a `thumbnail`, with a name for those who do not see it."""
    picture = tag("image", href=f"{_PNG}{png}", width=64, height=64, class_="pixels")
    return tag("svg", picture, viewBox="0 0 64 64", role="img", aria_label=name)


def _encoded(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def class_table(found: dict[str, Any], caption: str, *, most: float, digits: int) -> Markup:
    """Draws a matrix of classes as a table of coloured numbers, from 0 to `most`; rows and columns have names.

    Args:
      found: `names` of n classes, and `values` `[n, n]`.
      caption: of the table.
      most: the number with the lightest colour.
      digits: of each number.
    """
    names = [str(name).replace("_", " ") for name in found["names"]]
    head = tag("tr", tag("td"), *(tag("th", tag("span", name), scope="col") for name in names))
    rows = [
        tag("tr", tag("th", name, scope="row"), *(_shade(value, most, digits) for value in row))
        for name, row in zip(names, found["values"], strict=True)
    ]
    table = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *rows), class_="heat")
    return scrolling(table, caption)


def _shade(value: float, most: float, digits: int) -> Markup:
    share = value / most if most else 0.0
    return tag("td", f"{value:.{digits}f}", style=f"background:{hex_colour(share)};color:{ink(share)}")


def ink(share: float) -> str:
    """Returns black or white, whichever is easier to read on the colour of a number from 0 to 1.

    References:
      WCAG 2.2, relative luminance; the contrast with the two is the same at .179.
    """
    channels = [part / 255 for part in colour(share)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"


def colour(share: float) -> tuple[int, int, int]:
    """Returns the colour of a number from 0 to 1.

    Example:
      >>> colour(0.0), colour(0.125), colour(1.0)
      ((13, 8, 35), (50, 12, 72), (252, 255, 164))
    """
    place = min(max(share, 0.0), 1.0) * (len(_COLOURS) - 1)
    left = min(int(place), len(_COLOURS) - 2)
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in zip(*_COLOURS[left : left + 2], strict=True))
    return red, green, blue


def hex_colour(share: float) -> str:
    """Formats a colour for CSS."""
    return "#" + bytes(colour(share)).hex()


def scatter(embedding: dict[str, Any], names: Sequence[str], title: str) -> Markup:
    """Draws a t-SNE with a colour and a marker for each class, in the order of `styles`."""
    places = dict.fromkeys(names, "")
    style = {name: i for i, name in enumerate(places)}
    for name, (x, y) in zip(names, embedding["xy"], strict=True):
        places[name] += marker(style[name], 8 + 284 * x, 8 + 284 * y, 3.4)
    dots = [tag("path", tag("title", name), d=d, class_=f"mark s{style[name] % 10}") for name, d in places.items()]
    told = f"{len(names)} images of {len(places)} classes, silhouette {embedding['silhouette']:.3f}."
    return svg(300, 300, title, told, *dots)


def reliability(found: dict[str, Any], title: str) -> Markup:
    """Draws accuracy by confidence: bars that end on the diagonal belong to a calibrated classifier."""
    bins, size, left, bottom = len(found["examples"]), 200, 46, 210
    width, parts = size / len(found["examples"]), [tag("path", d=f"M{left} 10V{bottom}H{left + size}", class_="rule")]
    for i in (i for i in range(bins) if found["examples"][i]):
        x, sure, right = left + i * width, found["confidence"][i], found["accuracy"][i]
        parts.append(tag("rect", x=x + 1, y=bottom - size * right, width=width - 2, height=size * right, class_="fill"))
        gap = {"y": bottom - size * max(sure, right), "height": size * abs(sure - right)}
        parts.append(tag("rect", x=x + 1, width=width - 2, class_="over" if sure > right else "under", **gap))
    parts.append(tag("path", d=f"M{left} {bottom}L{left + size} 10", class_="diagonal"))
    for share in (0.0, 0.5, 1.0):
        parts.append(tag("text", f"{100 * share:g}", x=left + size * share, y=bottom + 16, text_anchor="middle"))
        parts.append(tag("text", f"{100 * share:g}", x=left - 6, y=bottom - size * share + 4, text_anchor="end"))
    parts.append(tag("text", "confidence %", x=left + size / 2, y=bottom + 32, text_anchor="middle", class_="axis"))
    parts.append(tag("text", "accuracy %", transform=f"translate(11 {bottom - size / 2}) rotate(-90)",
                     text_anchor="middle", class_="axis"))  # fmt: skip
    told = ", ".join(f"{s:.2f}: {a:.2f}" for s, a, n in
                     zip(found["confidence"], found["accuracy"], found["examples"], strict=True) if n)  # fmt: skip
    return svg(
        256, 246, title, f"Expected calibration error {found['ece']:.2f} %. Accuracy by confidence: {told}.", *parts
    )

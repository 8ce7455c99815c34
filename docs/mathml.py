"""Formulas as MathML, which browsers draw themselves: Sphinx's own way fetches a script from elsewhere."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(writer, node):
    """Within a line."""
    writer.body.append(convert(node.astext()))
    raise SkipNode


def block(writer, node):
    """A line of its own, which scrolls on a narrow screen."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True}

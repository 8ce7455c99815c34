"""Renders formulas as MathML, which browsers display natively; Sphinx's default fetches an external script."""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def inline(writer, node):
    """Writes an inline formula."""
    writer.body.append(convert(node.astext()))
    raise SkipNode


def block(writer, node):
    """Writes a display formula, which scrolls on a narrow screen."""
    writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True}

"""Generates parts of pages from the code when the site is built, so that they never go stale.

`python docs/generated.py` writes docs/keys.md anew, which a code host shows as well.
"""

import contextlib
import io
import pathlib
import re
from collections.abc import Callable

from ldrld_jax import main
from ldrld_jax.config.describe import Key, comments, described
from ldrld_jax.models import MODELS
from ldrld_jax.report.table import Table, markdown

KEYS = pathlib.Path(__file__).parent / "keys.md"
_HEAD = """\
# All config keys

`ldrld-jax help KEY` shows a key's type, default, range and meaning, and `--config.KEY=VALUE` sets it ([how configs
work](configs.md)). "unset" means that the key has no value by default. A resumed run must have the same value of a key
that is marked "yes" under identity; only `epochs` may grow, before the first decay of the learning rate,
so never with `optim.schedule=cosine` or an optimizer that is an object.
`python docs/generated.py` writes this page from `ldrld_jax/config/keys.py` and the methods' configs.
"""


def keys() -> str:
    """Returns docs/keys.md: a table of the keys outside of a block, and one for each block."""
    blocks: dict[str, list[Key]] = {}
    for key in described().values():
        block = key.name.rpartition(".")[0]
        blocks.setdefault("loss" if block.startswith("loss.") else block, []).append(key)
    meanings = {**dict(comments()), "loss": "the methods' own keys; their defaults are those published for CIFAR-100"}
    parts = [_HEAD]
    for block, rows in sorted(blocks.items()):
        parts.append(f"## {block or 'Keys outside of blocks'}\n")
        if meanings.get(block):
            parts.append(f"{meanings[block][0].upper()}{meanings[block][1:].rstrip('.')}.\n")
        cells = [[f"`{k.name}`", k.type, k.default, k.range, k.meaning, "yes" if k.identity else "no"] for k in rows]
        parts.append(markdown(Table(["key", "type", "default", "range", "meaning", "identity"], cells)) + "\n")
    return "\n".join(parts)


def command_line() -> str:
    """Returns the output of `--help`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main.parse(["--help"])
    return f"```text\n{printed.getvalue()}```"


def models() -> str:
    """Returns the names of all models."""
    return ", ".join(f"`{name}`" for name in MODELS)


def contents() -> str:
    """Returns a hidden table of contents for each section of the index, with the pages that it links."""
    sections = re.findall(r"^## (.*)\n([^#]*)", (KEYS.parent / "index.md").read_text(), re.MULTILINE)
    trees = [(caption, re.findall(r"\]\((\w+)\.md\)", text)) for caption, text in sections]
    return "\n\n".join(
        "\n".join(["```{toctree}", f":caption: {caption}", ":hidden:", "", *pages, "```"]) for caption, pages in trees
    )


MADE: tuple[Callable[[], str], ...] = (command_line, contents, models)


def fill(app, page: str, source: list[str]) -> None:
    """Replaces each line `<!-- generated: NAME -->` of a page by the result of the function NAME of `MADE`."""
    for make in MADE:
        marker = f"<!-- generated: {make.__name__} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, make())


def setup(app):
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    KEYS.write_text(keys())

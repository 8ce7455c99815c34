"""Generates parts of pages from the code when the site is built, so that they never go stale."""

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from ldrld_jax import config as config_lib
from ldrld_jax import main
from ldrld_jax.config import keys
from ldrld_jax.identity import NOT_IDENTITY
from ldrld_jax.losses import METHODS
from ldrld_jax.models import MODELS


def key_comments() -> Iterator[tuple[str, str]]:
    """Yields every key of `config/keys.py` with its comment: behind it, or in the line above it."""
    source = inspect.getsource(keys)
    comments, own_line = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept = own_line if token.line.lstrip().startswith("#") else comments
            kept[token.start[0]] = token.string.lstrip("# ")
    blocks = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def of_block(block: type, prefix: str) -> Iterator[tuple[str, str]]:
        for field, node in zip(dataclasses.fields(block), _fields(blocks[block.__name__]), strict=True):
            yield prefix + field.name, comments.get(node.lineno, own_line.get(node.lineno - 1, ""))
            if dataclasses.is_dataclass(field.type) and block is not keys.Teacher:
                yield from of_block(field.type, f"{prefix}{field.name}.")

    yield from of_block(keys.Config, "")


def _fields(block: ast.ClassDef) -> list[ast.AnnAssign]:
    return [node for node in block.body if isinstance(node, ast.AnnAssign)]


def config_keys() -> str:
    """Returns a table of all keys except the methods' own."""
    rows, config = [], config_lib.default()
    for key, comment in key_comments():
        value = _value(config, key)
        if not isinstance(value, ConfigDict):
            allowed = keys.allowed(key)
            rows.append((f"`{key}` {_shown(config, key)}", allowed, comment, "yes" if _identifies(key) else "no"))
        elif comment:
            rows.append((f"`{key}.*`", "", comment, ""))
    return _table(("key and default", "allowed", "what it is", "identity"), rows)


def method_keys() -> str:
    """Returns a table of each method's own keys."""
    rows = []
    for name, method in METHODS.items():
        texts = attributes(method.config)
        for field in dataclasses.fields(method.config):
            rows.append((f"`loss.{name}.{field.name}` = {field.default}", texts.get(field.name, "")))
    return _table(("key and default", "what it is"), rows)


def attributes(config: type) -> dict[str, str]:
    """Returns the description of each field from a config's docstring."""
    _, _, block = inspect.getdoc(config).partition("Attributes:\n")
    block = block.partition("\n\n")[0]
    lines = re.findall(r"^  (\w+): (.+(?:\n   .+)*)", block, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in lines}


def command_line() -> str:
    """Returns the output of `--help`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main.parse(["--help"])
    return f"```text\n{printed.getvalue()}```"


def models() -> str:
    """Returns the names of all models."""
    return ", ".join(f"`{name}`" for name in MODELS)


def _value(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _shown(config: ConfigDict, key: str) -> str:
    *path, last = key.split(".")
    block = _value(config, ".".join(path)) if path else config
    return f"({block.get_type(last).__name__})" if block[last] is None else f"= {block[last]}"


def _identifies(key: str) -> bool:
    return not f"{key}.".startswith(NOT_IDENTITY)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


MADE: tuple[Callable[[], str], ...] = (config_keys, method_keys, command_line, models)


def fill(app, page: str, source: list[str]) -> None:
    """Replaces each line `<!-- generated: NAME -->` of a page by the result of the function NAME of `MADE`."""
    for make in MADE:
        marker = f"<!-- generated: {make.__name__} -->"
        if marker in source[0]:
            source[0] = source[0].replace(marker, make())


def setup(app):
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}

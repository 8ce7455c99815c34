"""Descriptions of all config keys, read off `keys.py` and the docstrings of the methods' configs.

The comment of a key in `keys.py`, behind it or in the line above it, is its meaning. `ldrld-jax help KEY`,
`docs/keys.md` and the completion of a shell show it.
"""

import ast
import dataclasses
import functools
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from ml_collections import ConfigDict

from ldrld_jax.config import keys
from ldrld_jax.config.load import find_key
from ldrld_jax.identity import NOT_IDENTITY
from ldrld_jax.losses import METHODS
from ldrld_jax.losses.common import Positive, bounds_of


class Key(NamedTuple):
    """A config key, described for a reader.

    Attributes:
      name: dotted.
      type: of its values, such as "int" or "tuple of float".
      default: as Python writes it, or "unset".
      range: the values that it may have.
      meaning: one line.
      identity: whether a resumed run must have the same value.
    """

    name: str
    type: str
    default: str
    range: str
    meaning: str
    identity: bool


@functools.cache
def described() -> dict[str, Key]:
    """Returns every key by its name, sorted.

    Example:
      >>> described()["optim.momentum"][:5]
      ('optim.momentum', 'float', '0.9', 'at least 0 and below 1', 'momentum of sgd, and b1 of adamw')
    """
    config, meanings = keys.default(), dict(comments())
    return {name: _described(name, config, meanings) for name, _ in keys.leaves(config)}


def explain(name: str) -> str:
    """Describes a key in five lines; a block in a line per key.

    Raises:
      UserError: if there is no such key; it names the nearest.

    Example:
      >>> print(explain("optim.momentum"))
      optim.momentum
        type     float
        default  0.9
        range    at least 0 and below 1
        meaning  momentum of sgd, and b1 of adamw
    """
    found = described()
    if name in found:
        parts = zip(Key._fields[1:5], found[name][1:5], strict=True)
        return "\n".join([name, *(f"  {part:9}{text}" for part, text in parts)])
    block = [key for key in found.values() if key.name.startswith(f"{name}.")]
    if not block:
        find_key(keys.default(), name)  # raises
    width = max(len(key.name) for key in block)
    return "\n".join(f"{key.name:{width}}  {key.meaning}" for key in block)


def _described(name: str, config: ConfigDict, meanings: dict[str, str]) -> Key:
    block, last = find_key(config, name)
    default, identity = block[last], not f"{name}.".startswith(NOT_IDENTITY)
    if name.startswith("loss."):
        method = METHODS[name.split(".")[1]].config
        field = next(field for field in dataclasses.fields(method) if field.name == last)
        default, allowed, meaning = field.default, _allowed(field.type), attributes(method).get(last, "")
    elif name.startswith("loss_weight."):
        meaning = "weight of this term besides kd_weight; unset: 1 for a method alone, in a sum its published kd_weight"
        allowed = keys.allowed(name)
    elif name.startswith(("teacher.data.", "teacher.optim.")):
        inherited = "teacher.seed" if last == "augment_seed" else "the student's"
        meaning = f"the teacher's {name.removeprefix('teacher.')}; unset: {inherited}"
        allowed = keys.allowed(name)
    else:
        allowed, meaning = keys.allowed(name), meanings[name]
    kind = block.get_type(last)
    items = f" of {keys.plain_type(keys.items_of(name)).__name__}" if kind is tuple else ""
    return Key(
        name, f"{kind.__name__}{items}", "unset" if default is None else repr(default), allowed, meaning, identity
    )


def _allowed(kind: Any) -> str:
    """Describes the values that a field of a method's config may have, as `MethodConfig` checks them."""
    if type(None) in get_args(kind):
        return _allowed(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if bounds := bounds_of(kind):
        return str(bounds)
    return "True | False" if kind is bool else "above 0" if kind is Positive else "at least 0"


def comments() -> Iterator[tuple[str, str]]:
    """Yields every key and block of `config/keys.py` with its comment."""
    source = inspect.getsource(keys)
    behind, above = dict[int, str](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kept = above if token.line.lstrip().startswith("#") else behind
            kept[token.start[0]] = token.string.lstrip("# ")
    blocks = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}

    def of_block(block: Any, prefix: str) -> Iterator[tuple[str, str]]:
        nodes = [node for node in blocks[block.__name__].body if isinstance(node, ast.AnnAssign)]
        for field, node in zip(dataclasses.fields(block), nodes, strict=True):
            yield prefix + field.name, behind.get(node.lineno, above.get(node.lineno - 1, ""))
            if dataclasses.is_dataclass(field.type) and block is not keys.Teacher:
                yield from of_block(field.type, f"{prefix}{field.name}.")

    yield from of_block(keys.Config, "")


def attributes(config: type) -> dict[str, str]:
    """Returns the description of each field from the docstring of a config."""
    _, _, block = (inspect.getdoc(config) or "").partition("Attributes:\n")
    lines = re.findall(r"^  (\w+): (.+(?:\n   .+)*)", block.partition("\n\n")[0], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in lines}

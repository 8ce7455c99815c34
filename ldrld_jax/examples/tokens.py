"""A small causal language model and the texts that it learns, for configs/tokens.py.

Nothing of ldrld_jax is used here: a config names these functions as it names a user's own, `module:function`.

The texts are those that Python's `help("assert")` shows, about 400,000 characters that ship with it (pydoc_data).
Each record is a piece of one: the title as a prompt, the text after it, and padding if it ends early. The model
predicts each next character. The labels of prompt and padding are -1, which leaves them out of loss and metrics.
"""

from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LENGTH = 64  # tokens of a record
VOCABULARY = 128  # ASCII; 0 is padding


class Texts:
    r"""A dataset of pieces of texts, each with its title.

    Args:
      pieces: pairs of a title and a text, which fit into `LENGTH` + 1 characters together.

    Example:
      >>> tokens, labels = Texts([("pi", "3.14")])[0]
      >>> bytes(tokens[:10].tolist())
      b'pi: 3.14\x00\x00'
      >>> [chr(label) if label >= 0 else "-" for label in labels[:10].tolist()]
      ['-', '-', '-', '3', '.', '1', '4', '-', '-', '-']
    """

    class_names = tuple(map(chr, range(VOCABULARY)))

    def __init__(self, pieces: list[tuple[str, str]]):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and labels, `[LENGTH]` int32 each."""
        title, text = self.pieces[index]
        prompt = f"{title}: "
        characters = np.frombuffer(f"{prompt}{text}".encode("ascii"), np.uint8)
        tokens = np.zeros(LENGTH + 1, np.int32)
        tokens[: len(characters)] = characters
        position = np.arange(1, LENGTH + 1)
        counts = (position >= len(prompt)) & (position < len(characters))
        return tokens[:-1], np.where(counts, tokens[1:], -1)


def texts(split: str) -> Texts:
    """Returns every tenth piece of the texts as the split "test", and the others as "train"."""
    pieces = []
    for title, text in sorted(topics.items()):
        characters = " ".join(text.encode("ascii", "ignore").decode().split())
        room = LENGTH + 1 - len(f"{title}: ")
        pieces += [(title, characters[start : start + room]) for start in range(0, len(characters), room)]
    return Texts([piece for i, piece in enumerate(pieces) if (i % 10 == 9) == (split == "test")])


class Block(nnx.Module):
    """Causal self-attention and an MLP, each after a normalisation and with a residual connection."""

    def __init__(self, width: int, **common):
        self.norm1, self.norm2 = nnx.LayerNorm(width, **common), nnx.LayerNorm(width, **common)
        self.qkv, self.out = nnx.Linear(width, 3 * width, **common), nnx.Linear(width, width, **common)
        self.up, self.down = nnx.Linear(width, 4 * width, **common), nnx.Linear(4 * width, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, length, 3, width // 16, 16)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        x = x + self.out(jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(n, length, width))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A causal transformer: tokens `[n, length]` to the logits `[n, length, V]` of each next token.

    Padding follows the text, so that no token of it sees any.

    Args:
      vocabulary: V.
      width: of a token, 16 per head.
      depth: number of blocks.
      common: rngs, dtype and param_dtype.

    Example:
      >>> Transformer(VOCABULARY, 32, 1, rngs=nnx.Rngs(0))(jnp.zeros((2, 5), int)).shape
      (2, 5, 128)
    """

    def __init__(self, vocabulary: int, width: int, depth: int, **common):
        self.token = nnx.Embed(vocabulary, width, **common)
        self.near = nnx.Conv(width, width, 4, padding="CAUSAL", **common)
        self.blocks = nnx.List(Block(width, **common) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, **common)
        self.head = nnx.Linear(width, vocabulary, **common)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.near(self.token(tokens))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def small(num_classes: int = VOCABULARY, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32):
    """Returns a transformer of one block."""
    return Transformer(num_classes, 32, 1, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


def large(num_classes: int = VOCABULARY, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32):
    """Returns a transformer of two blocks of twice the width."""
    return Transformer(num_classes, 64, 2, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

"""Harder training sets made from an easy one: fewer images, a long tail, wrong labels, held-out images.

All are functions of the labels and a seed, so they are the same on every machine.
"""

import numpy as np
from ml_collections import ConfigDict

from ldrld_jax.data.source import Records, Selected
from ldrld_jax.errors import UserError


def select(records: Records, data: ConfigDict, *, classes: int, held_out: bool = False) -> Records:
    """Selects the training records that the config's `data` block requests.

    First, `held_out` of each class is put aside unchanged. Of the rest, `fraction` is kept, then the tail
    is thinned by `imbalance`, then labels are changed at `label_noise_rate`. Records with several labels each, as texts
    have, count as one class.

    Args:
      records: the whole training split.
      data: a block with `held_out`, `fraction`, `imbalance`, `label_noise`, `label_noise_rate`, `seed` and
        `on_error`.
      classes: C.
      held_out: return the records put aside instead.

    Raises:
      UserError: if no record is left, a label is not of the classes and `on_error` is "raise", or records with several
        labels each cannot be selected so.
    """
    noisy = data.label_noise != "none"
    if noisy and classes < 2:
        raise UserError(f"data.label_noise={data.label_noise} needs at least two classes, got {classes}. Unset it.")
    if data.held_out == 0 and data.fraction == 1 and data.imbalance == 1 and not noisy:
        return records  # without reading the labels
    labels = records.labels()
    several = labels.ndim > 1
    if several:
        for key, unset in (("imbalance", 1), ("label_noise", "none")):
            if data[key] != unset:
                raise UserError(
                    f"data.{key}={data[key]} goes by the one label of an image, and these records have labels of "
                    f"shape {labels.shape[1:]}. Unset it."
                )
        labels, classes = np.zeros(len(labels), np.int32), 1
    outside = np.flatnonzero((labels < 0) | (labels >= classes))  # which no part below would have
    if len(outside) and data.on_error == "raise":
        raise UserError(
            f"{records.name(int(outside[0]))} is broken: its label is {labels[outside[0]]} or cannot be read, and "
            f"there are {classes} classes. Repair or remove it, or set data.on_error=skip."
        )
    aside = stratified(labels, data.held_out, classes, _rng(data.seed, 0))
    if held_out:
        return Selected(records, aside, None if several else labels[aside])
    kept = np.setdiff1d(np.arange(len(labels)), aside)
    kept = kept[stratified(labels[kept], data.fraction, classes, _rng(data.seed, 1))]
    kept = kept[long_tail(labels[kept], data.imbalance, classes, _rng(data.seed, 2))]
    if not len(kept):
        raise UserError("no training image is left. Raise data.fraction, or lower data.held_out or data.imbalance.")
    if several:
        return Selected(records, kept)
    chosen = labels[kept]
    if noisy:
        chosen = with_noise(chosen, data.label_noise, data.label_noise_rate, classes, _rng(data.seed, 3))
    return Selected(records, kept, chosen)


def stratified(labels: np.ndarray, share: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the sorted positions of a random `share` of each class, rounded to whole images.

    Example:
      >>> labels = np.repeat([0, 1], [10, 20])
      >>> np.bincount(labels[stratified(labels, 0.1, 2, np.random.default_rng(0))]).tolist()
      [1, 2]
    """
    return _first(labels, [round(share * count) for count in _counts(labels, classes)], rng)


def long_tail(labels: np.ndarray, imbalance: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    r"""Returns the sorted positions of a subset whose class sizes decay exponentially.

    .. math:: n_c = n_{\max} \, \mathrm{imbalance}^{-c / (C - 1)}

    A class with fewer images keeps all of them, and every class keeps at least one.

    References:
      Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, section 5.1.

    Example:
      >>> labels = np.repeat([0, 1, 2], 100)
      >>> np.bincount(labels[long_tail(labels, 100, 3, np.random.default_rng(0))]).tolist()
      [100, 10, 1]
    """
    counts = _counts(labels, classes)
    wanted = max(counts) * imbalance ** -(np.arange(classes) / max(classes - 1, 1))
    return _first(labels, [min(n, max(1, round(w))) for n, w in zip(counts, wanted.tolist(), strict=True)], rng)


def with_noise(labels: np.ndarray, kind: str, rate: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the labels with `rate` of them made wrong, rounded to whole images.

    Args:
      labels: `[n]` int32.
      kind: "symmetric": any other class with equal probability; "asymmetric": the next class, cyclically.
      rate: 0..1.
      classes: C.
      rng: selects the changed labels and their new classes.

    Example:
      >>> labels = np.repeat([0, 1], 50)
      >>> int((with_noise(labels, "symmetric", 0.2, 2, np.random.default_rng(0)) != labels).sum())
      20
    """
    chosen = rng.permutation(len(labels))[: round(rate * len(labels))]
    offsets = rng.integers(1, classes, len(chosen)) if kind == "symmetric" else 1
    noisy = labels.copy()
    noisy[chosen] = (labels[chosen] + offsets) % classes
    return noisy


def _counts(labels: np.ndarray, classes: int) -> list[int]:
    """Returns the number of examples of each class; ignores labels out of range."""
    return np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes).tolist()


def _first(labels: np.ndarray, counts: list[int], rng: np.random.Generator) -> np.ndarray:
    """Returns the sorted positions of `counts[c]` random examples of each class c; ignores labels out of range."""
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(len(counts)))
    chosen = [by_class[start : start + count] for start, count in zip(starts, counts, strict=True)]
    return np.sort(np.concatenate(chosen))


def _rng(seed: int, use: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, use))))

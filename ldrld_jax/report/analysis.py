"""Analysis of logits beyond accuracy: calibration, and the differences of student and teacher. Plain NumPy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BINS = 15
_LARGEST = 100  # classes a side of a matrix that is drawn: of more, blocks are averaged


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Computes the calibration of logits `[n, C]` against labels `[n]`, in bins of equal width of the confidence.

    Returns:
      `ece`, the expected calibration error: the mean distance of confidence and accuracy over all examples, in percent;
      `examples`, `confidence` and `accuracy`: `[bins]`, the last two from 0 to 1, and 0 where there is no example.

    Example:
      >>> logits = np.log(np.array([[0.9, 0.1], [0.7, 0.3]]))
      >>> calibration(logits, np.array([0, 1]), bins=5)["ece"]  # .1 off and .7 off
      40.0

    References:
      Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: 15 bins.
    """
    sure = np.exp(log_softmax(logits).max(axis=1))
    right = logits.argmax(axis=1) == labels
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    count, confidence, accuracy = (np.bincount(bin_of, w, bins) for w in (None, sure, right))
    ece = np.abs(confidence - accuracy).sum() / len(labels) * 100
    filled = np.maximum(count, 1)
    return {
        "ece": round(float(ece), 4),
        "examples": count.tolist(),
        "confidence": (confidence / filled).round(4).tolist(),
        "accuracy": (accuracy / filled).round(4).tolist(),
    }


def agreement(teacher: np.ndarray, student: np.ndarray) -> float:
    """Returns the percentage of the rows of `[n, C]` in which both have the same first class."""
    return round(float(np.mean(teacher.argmax(axis=1) == student.argmax(axis=1))) * 100, 4)


def correlation_difference(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Returns |corr(teacher) - corr(student)| of the classes' logits `[n, C]` over the examples: `[C, C]`, 0 to 2.

    A class whose logits are all the same correlates with nothing.
    """
    return np.abs(_correlation(teacher) - _correlation(student))


def _correlation(logits: np.ndarray) -> np.ndarray:
    centred = logits - logits.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    # By their range: the mean of equal numbers may be another in the last digit.
    unit = np.where(np.ptp(logits, axis=0) > 0, centred / np.where(norm > 0, norm, 1), 0)
    return unit.T @ unit


def shrunk(matrix: np.ndarray, largest: int = _LARGEST) -> np.ndarray:
    """Shrinks a square matrix to a number of rows, by means over blocks of neighbours.

    Example:
      >>> shrunk(np.arange(16.0).reshape(4, 4), largest=2).tolist()
      [[2.5, 4.5], [10.5, 12.5]]
    """
    blocks = np.linspace(0, len(matrix), min(len(matrix), largest) + 1).astype(int)
    sizes = np.diff(blocks)
    sums = np.add.reduceat(np.add.reduceat(matrix, blocks[:-1], axis=0), blocks[:-1], axis=1)
    return sums / (sizes[:, None] * sizes[None, :])


class PairMeans(NamedTuple):
    """Means over the images of two classes i and j, at `[i, j]`, all `[C, C]` and symmetric.

    Attributes:
      kl: of the teacher's and the student's choice between the two, in nats.
      teacher, student: what each gives the true one of the two, 0 to 1.
    """

    kl: np.ndarray
    teacher: np.ndarray
    student: np.ndarray


def pair_means(teacher: np.ndarray, student: np.ndarray, labels: np.ndarray) -> PairMeans:
    r"""Computes how differently teacher and student tell every two classes apart.

    Over the images of the two classes i and j alone, the mean of

    .. math:: \mathrm{KL}\big(\sigma(z^t_i, z^t_j) \,\|\, \sigma(z^s_i, z^s_j)\big)

    in nats: the pairs' term of LDRLD, unweighted and at temperature 1.

    Args:
      teacher, student: logits `[n, C]`.
      labels: `[n]`.
    """
    classes = teacher.shape[1]
    count = np.bincount(labels, minlength=classes)
    sums = np.zeros((3, classes, classes))  # KL, teacher's and student's share of the true class: [label, other]
    for label in np.flatnonzero(count):
        rows = labels == label
        t, s = (logits[rows, label, None] - logits[rows] for logits in (teacher, student))
        log_p, log_p_not, log_q, log_q_not = (-np.logaddexp(0, -x) for x in (t, -t, s, -s))
        p = np.exp(log_p)
        kl = p * (log_p - log_q) + np.exp(log_p_not) * (log_p_not - log_q_not)
        sums[:, label] = kl.sum(axis=0), p.sum(axis=0), np.exp(log_q).sum(axis=0)
    return PairMeans(*(sums + sums.swapaxes(1, 2)) / np.maximum(count[:, None] + count[None, :], 1))


def disagreeing_pairs(means: PairMeans, names: Sequence[str], most: int = 10) -> list[dict[str, Any]]:
    """Returns the pairs of classes that both tell apart most differently, the worst first, with their means."""
    i, j = np.triu_indices(len(means.kl), k=1)
    worst = np.argsort(-means.kl[i, j], kind="stable")[:most]
    return [
        {"first": names[a], "second": names[b]}
        | {key: round(float(matrix[a, b]), 4) for key, matrix in means._asdict().items()}
        for a, b in zip(i[worst], j[worst], strict=True)
    ]


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns in percent how many images of each class (row) are taken for which (column), `[C, C]`.

    Example:
      >>> confusion(np.eye(2)[[0, 1, 1]], np.array([0, 0, 1])).tolist()
      [[50.0, 50.0], [0.0, 100.0]]
    """
    counts = np.zeros((logits.shape[1], logits.shape[1]))
    np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def striking(matrix: np.ndarray, most: int = 12) -> np.ndarray:
    """Returns the classes of the largest entries off the diagonal of `[C, C]`, in order: all of them if they are few.

    Example:
      >>> striking(np.array([[9, 0, 1], [0, 9, 0], [0, 0, 9]]), most=2).tolist()
      [0, 2]
    """
    pairs = np.argwhere(~np.eye(len(matrix), dtype=bool))
    worst = pairs[np.argsort(-matrix[tuple(pairs.T)], kind="stable")].ravel()
    return np.sort(np.array(list(dict.fromkeys(worst.tolist()))[:most], int))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the probabilities, `[n, C]`."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.logaddexp.reduce(shifted, axis=1)[:, None]


def divergence(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Returns KL(teacher || student) of each row of logits `[n, C]`, in nats, at temperature 1."""
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def chosen(labels: np.ndarray, *, classes: int = 20, each: int = 25) -> np.ndarray:
    """Chooses the first examples of some classes, spread over all that occur; labels below 0 are left out.

    Example:
      >>> chosen(np.array([0, 1, 2, 0, -1, 2]), classes=2, each=1).tolist()
      [0, 2]
    """
    known = np.unique(labels[labels >= 0])
    some = known[np.linspace(0, len(known) - 1, min(classes, len(known))).astype(int)]
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in some]))


def embedding(features: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    """Computes a t-SNE of features `[n, F]`, seeded: `xy` from 0 to 1, and the `silhouette` of the features, -1 to 1.

    The silhouette is of the features themselves: 1 for classes that lie apart, 0 for overlapping ones.

    Returns:
      Both; or None for a single class, for one example of each, and for features that are all the same, as a collapsed
      model's are: the silhouette or the t-SNE is not defined then.
    """
    if not 1 < len(np.unique(labels)) < len(labels) or not np.ptp(features, axis=0).any():
        return None
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    from threadpoolctl import threadpool_limits

    scaled = (features - features.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-12)
    # A perplexity must be below the number of points; scikit-learn's own default is 30.
    tsne = TSNE(init="pca", random_state=0, perplexity=min(30, (len(scaled) - 1) / 3))
    with threadpool_limits(limits=1):  # so few points: its threads would only wait for each other, 30 s instead of 3
        xy = tsne.fit_transform(scaled)
    low, high = xy.min(axis=0), xy.max(axis=0)
    return {
        "xy": ((xy - low) / np.maximum(high - low, 1e-12)).astype(float).round(3).tolist(),
        "silhouette": round(float(silhouette_score(scaled, labels)), 4),
    }

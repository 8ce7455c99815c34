"""Draws the figures of docs/concepts.md from the code: `python docs/figures.py`; needs matplotlib."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ldrld_jax import LDRLDConfig, rank_weights
from ldrld_jax.losses import METHODS, ldrld_parts

HERE = pathlib.Path(__file__).parent
CFG = LDRLDConfig(depth=4)
CLASSES = ("cat", "dog", "fox", "wolf", "deer", "frog", "ship", "car", "truck", "plane")
# One photograph of a cat: the student ranks the dog first, and swaps the wolf and the fox.
TEACHER = np.array([9.0, 7.5, 6.0, 4.5, 2.5, 1.5, 0.0, -0.5, -1.0, -2.0])
STUDENT = np.array([6.5, 8.0, 3.5, 5.0, 3.0, 0.5, 0.5, -1.5, 0.0, -1.0])
COLOURS = {"pairs": "#1f77b4", "integrity": "#2ca02c", "remainder": "#d62728", "kd": "#7f7f7f"}


def save(figure, name: str) -> None:
    """Writes an SVG without a date, so that redrawing changes nothing, and with text kept as text."""
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name}
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def draw_pairs() -> None:
    """Draws the compared classes: all pairs of the student's d largest, and the rest."""
    ranked = np.argsort(-STUDENT)
    figure, axis = plt.subplots(figsize=(7.5, 3.2), layout="constrained")
    place = np.arange(len(CLASSES))
    axis.bar(place - 0.2, TEACHER[ranked], 0.4, label="teacher", color="black")
    axis.bar(place + 0.2, STUDENT[ranked], 0.4, label="student", color="darkgray")
    weights = np.asarray(rank_weights(CFG))
    for i in range(CFG.depth):
        for j in range(i + 1, CFG.depth):
            level = {1: 0, 2: 1 + i, 3: 3}[j - i]  # no two brackets overlap
            top, middle = 10.3 + 1.1 * level, (i + j) / 2
            bow = "angle,angleA=90,angleB=0,rad=8"
            for end in (i, j):
                arrow = dict(arrowstyle="-", connectionstyle=bow, color=COLOURS["pairs"], lw=4 * weights[i, j])
                axis.annotate("", xy=(middle, top), xytext=(end + 0.07 * (middle - end), 9.4), arrowprops=arrow)
            axis.text(middle, top + 0.1, f"{weights[i, j]:.2f}", ha="center", fontsize=8, color=COLOURS["pairs"])
    axis.axvspan(-0.5, CFG.depth - 0.5, color=COLOURS["integrity"], alpha=0.1)
    axis.axvspan(CFG.depth - 0.5, len(CLASSES) - 0.5, color=COLOURS["remainder"], alpha=0.1)
    axis.text(1.5, -2.8, "integrity: one softmax over these", ha="center", fontsize=9, color=COLOURS["integrity"])
    axis.text(6.5, -2.8, "remainder: one softmax over these", ha="center", fontsize=9, color=COLOURS["remainder"])
    axis.set(xlim=(-0.5, 9.5), ylim=(-3.3, 15.2), ylabel="logit", xlabel="class, in the student's order")
    axis.set_xticks(place, [CLASSES[c] for c in ranked])
    axis.legend(loc="upper right", fontsize=8, frameon=False)
    axis.axhline(0, color="black", linewidth=0.5)
    save(figure, "concepts_pairs")


def draw_weights() -> None:
    """Draws the weight of every pair of ranks at d = 7, and its two factors."""
    pictures = (
        ("inverse rank", LDRLDConfig(use_erd=False)),
        ("exponential decay", LDRLDConfig(use_irw=False)),
        ("their product", LDRLDConfig()),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
    for axis, (title, cfg) in zip(axes, pictures, strict=True):
        weights = np.asarray(rank_weights(cfg))
        axis.imshow(np.where(weights > 0, weights, np.nan), cmap="Blues", vmin=0)
        for i, j in zip(*np.nonzero(weights), strict=True):
            colour = "white" if weights[i, j] > 0.6 * weights.max() else "black"
            axis.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(f"{title}, sum {weights.sum():.2f}", fontsize=10)
        axis.set_xticks(range(7), range(1, 8))
        axis.set_yticks(range(7), range(1, 8))
        axis.set_xlabel("rank j", fontsize=9)
    axes[0].set_ylabel("rank i", fontsize=9)
    save(figure, "concepts_weights")


def steps() -> dict[str, np.ndarray]:
    """Returns the negative gradient in the student's logits of each part of LDRLD and of plain KD."""
    teacher, student = jnp.asarray(TEACHER)[None], jnp.asarray(STUDENT)[None]
    kd = METHODS["kd"]
    losses = {name: lambda s, name=name: ldrld_parts(teacher, s, CFG)[name] for name in list(COLOURS)[:3]}
    losses["kd"] = lambda s: kd.loss(teacher, s, jnp.array([0]), kd.config())
    return {name: -np.asarray(jax.grad(loss)(student))[0] for name, loss in losses.items()}


def draw_gradient() -> None:
    """Draws the gradients of the parts for the example of the first figure."""
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), layout="constrained")
    ranked = np.argsort(-STUDENT)
    for axis, (name, step) in zip(axes, steps().items(), strict=True):
        axis.bar(range(len(CLASSES)), step[ranked], color=COLOURS[name])
        axis.axhline(0, color="black", linewidth=0.5)
        axis.set_title({"kd": "plain KD"}.get(name, name), fontsize=10)
        axis.set_xticks(range(len(CLASSES)), [CLASSES[c] for c in ranked], rotation=90, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
    axes[0].set_ylabel("step of the student's logit", fontsize=9)
    save(figure, "concepts_gradient")


if __name__ == "__main__":
    draw_pairs()
    draw_weights()
    draw_gradient()

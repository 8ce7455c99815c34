"""The methods of 2024 to 2026 against the published code's numbers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldrld_jax.losses import METHODS, wkd_cost
from ldrld_jax.losses.entropy import entropy_weight, log_of_max, log_of_sum

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "methods_2026_official.npz")

# The published name: our method, and its fields from the case's params.
CASES = {
    "ea_kd": ("kd", lambda T, t, h: dict(temperature=T, **weighting(h, t))),
    "ea_kd_ls": ("kd", lambda T, h: dict(temperature=T, standardize=True, **weighting(h))),
    "ea_dkd": (
        "dkd",
        lambda T, a, b, h, z: dict(temperature=T, alpha=a, beta=b, standardize=bool(z), **weighting(h)),
    ),
    "abkd": ("abkd", lambda T, a, b: dict(temperature=T, alpha=a, beta=b)),
    "abkd_token": ("abkd", lambda a, b: dict(temperature=1, alpha=a, beta=b)),
    "skd": (
        "skd",
        lambda T, r, w: dict(temperature=T, ridge=r, kl_weight=w, direction_weight=w, batch_masks=True),
    ),
    "skd_direction": ("skd", lambda r: dict(ridge=r, kl_weight=0)),
    "wkd_l": ("wkd", lambda T, g, r, n, sharpen: dict(temperature=T, gamma=g, regularization=r, iterations=n)),
    "luminet": ("luminet", lambda a, T: dict(alpha=a, temperature=T)),
    "crld": (
        "crld",
        lambda T, weak, strong, w, c: dict(
            temperature=T, weak_threshold=weak, strong_threshold=strong, within_weight=w, cross_weight=c
        ),
    ),
    "sld": ("sld", lambda on: dict(student_swap=on)),
    "deepkd": ("dkd", lambda T, a, b, flag, k: dict(temperature=T, alpha=a, beta=b, top_k=k)),
    "bild": ("bild", lambda k, T: dict(top_k=k, temperature=T)),
    "topk_tail": ("topk_tail", lambda k, T, b, tail: dict(top_k=k, temperature=T, beta=b, tail=bool(tail))),
}
# Where our value is another on purpose: the divergence's true limit, and the exact bucket.
NOT_OURS = {"abkd_code_limits", "topk_tail_clamped"}


def weighting(bound, temperature=3.0):
    return dict(entropy_weighting=True, entropy_temperature=temperature, entropy_bound=bound)


def stored(name, case):
    prefix = f"{name}/{case}/"
    return {key.removeprefix(prefix): GOLDEN[key] for key in GOLDEN.files if key.startswith(prefix)}


def cases():
    """Name and number of every stored case that a method of ours is to agree with."""
    found = sorted({tuple(key.split("/")[:2]) for key in GOLDEN.files})
    # DeepKD's other flag multiplies two means over the batch: none of our losses.
    return [(name, n) for name, n in found if name in CASES and not (name == "deepkd" and not flag(n))]


def flag(case):
    return GOLDEN[f"deepkd/{case}/params"][3]


def prepared(name, case, dtype):
    """The method, its config, and the arguments of its loss."""
    arrays = stored(name, case)
    method, fields = CASES[name]
    cfg = METHODS[method].config(**fields(*arrays["params"]))
    logits = [arrays[side].astype(dtype) for side in ("teacher", "student")]
    rows = {}
    if logits[0].ndim == 3 and METHODS[method].views(cfg) == 1:  # tokens
        rows["where"] = arrays["labels"] != -100
    if method == "wkd":
        rows["params"] = (arrays["cost"] if arrays["params"][4] else arrays["dist"]).astype(dtype)
    return METHODS[method], cfg, (*logits, arrays["labels"]), rows


@functools.cache
def compiled(method, cfg):
    """Returns the loss with its parts, and the gradient with respect to the student, compiled once a shape."""

    def loss(student, teacher, labels, rows):
        parts = method.parts(teacher, student, labels, cfg, **rows)
        return sum(parts.values()), parts

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_close(got, want, tolerance, floor=1e-9):
    """Max-norm relative; losses of near-equal logits are 1e-6, hence a floor."""
    assert np.max(np.abs(np.asarray(got, np.float64) - want)) <= tolerance * np.max(np.abs(want)) + floor


def test_every_stored_method_is_checked():
    assert {key.split("/")[0] for key in GOLDEN.files} == {*CASES, *NOT_OURS}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-5)])
@pytest.mark.parametrize(("name", "case"), cases())
def test_value_and_gradient_are_those_of_the_published_code(name, case, dtype, tolerance, x64):
    method, cfg, (teacher, student, labels), rows = prepared(name, case, dtype)
    (loss, _), gradient = compiled(method, cfg)(student, teacher, labels, rows)
    arrays = stored(name, case)
    assert loss.dtype == gradient.dtype == dtype
    # A divergence is a sum that cancels: near-equal logits leave the rounding of float32 numbers near 1, times T^2.
    floors = (1e-6, 1e-7) if dtype == "float32" and arrays["loss"] < 1e-5 else (1e-9, 1e-9)
    assert_close(loss, arrays["loss"], tolerance, floors[0])
    assert_close(gradient, arrays["grad"], tolerance, floors[1])


# Stored as they add up to the loss, weights, factors and T^2 included.
PARTS = {
    "skd": ("0123", {"kl": "kl", "direction": "direction"}),
    "deepkd": ("123", {"target": "tckd", "non_target": "nckd"}),
    "bild": ("0123", {"teacher_led": "teacher_led", "student_led": "student_led"}),
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (numbers, _) in PARTS.items() for case in numbers])
def test_each_part_is_that_of_the_published_code(name, case, x64):
    method, cfg, (teacher, student, labels), rows = prepared(name, case, "float64")
    ((_, parts), _), arrays = compiled(method, cfg)(student, teacher, labels, rows), stored(name, case)
    for part, stored_name in PARTS[name][1].items():
        assert_close(parts[part], arrays[stored_name], 1e-9)


@pytest.mark.parametrize("name", ["ea_kd", "ea_kd_ls", "ea_dkd"])
def test_each_entropy_weight_is_that_of_the_published_code(name, x64):
    log = log_of_max if name == "ea_dkd" else log_of_sum
    for case in ("0", "1", "2", "3"):
        _, cfg, (teacher, student, _), _ = prepared(name, case, "float64")
        weight = entropy_weight(
            jnp.asarray(teacher), jnp.asarray(student), cfg.entropy_temperature, cfg.entropy_bound, log
        )
        assert_close(weight, stored(name, case)["weight"], 1e-9)


@pytest.mark.parametrize("case", ["0", "2", "3"])
def test_wkds_cost_is_that_of_the_published_code(case, x64):
    arrays = stored("wkd_l", case)
    sharpen = arrays["params"][4]
    assert_close(
        wkd_cost(jnp.asarray(arrays["prototypes"]), sharpen=sharpen), arrays["cost" if sharpen else "dist"], 1e-9
    )

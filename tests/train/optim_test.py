"""Learning rates at the epochs that matter, and SGD as PyTorch writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldrld_jax import config as config_lib
from ldrld_jax.train.optim import first_decay_epoch, make_optimizer, make_schedule, unread


def optim(**changes):
    block = config_lib.default().optim
    block.update(changes)
    return block


def rates(block, epochs_from_1, steps_per_epoch=782):
    schedule = make_schedule(block, steps_per_epoch=steps_per_epoch, epochs=240)
    return [float(schedule((epoch - 1) * steps_per_epoch + within)) for epoch in epochs_from_1 for within in (0, 781)]


def test_the_official_warmup_never_reaches_the_full_rate_before_the_first_decay():
    epochs = [1, 2, 19, 20, 21, 150, 151, 180, 181, 210, 211, 240]
    factors = [1 / 20, 2 / 20, 19 / 20, 0.95, 0.95, 0.95, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    expected = np.repeat(0.05 * np.array(factors), 2)  # constant within the epoch
    np.testing.assert_allclose(rates(optim(warmup="official"), epochs), expected, rtol=1e-6)


def test_the_official_warmup_of_one_epoch_is_none_and_any_decay_ends_a_longer_one():
    assert rates(optim(warmup="official", warmup_epochs=1), [1, 2, 150]) == rates(optim(), [1, 2, 150])
    for rate, after in ((1.0, 0.05), (2.0, 0.1), (0.0, 0.0)):
        block = optim(warmup="official", warmup_epochs=4, decay_rate=rate, decay_epochs=(6,))
        np.testing.assert_allclose(rates(block, [3, 6, 7]), np.repeat([0.0375, 0.0375, after], 2), rtol=1e-6)


@pytest.mark.parametrize("x64", [False, True])
def test_the_last_rates_of_a_cosine_keep_their_digits(x64):
    steps = np.array([0, 1, 360, 717, 718, 719, 720, 800])
    exact = np.float64(0.05) * np.sin(np.pi / 2 * np.maximum(720 - steps, 0) / 720) ** 2
    with jax.enable_x64(x64):
        schedule = make_schedule(optim(schedule="cosine"), steps_per_epoch=3, epochs=240)
        found = [np.float64(schedule(step)) for step in steps]
    np.testing.assert_allclose(found, exact, rtol=1e-15 if x64 else 5e-7)


def test_step_decays_after_its_epochs():
    expected = np.repeat([0.05, 0.05, 0.005, 0.0005, 0.00005], 2)
    np.testing.assert_allclose(rates(optim(), [1, 150, 151, 181, 211]), expected, rtol=1e-6)


def test_linear_warmup_rises_with_each_step():
    schedule = make_schedule(optim(warmup="linear", warmup_epochs=2), steps_per_epoch=5, epochs=240)
    np.testing.assert_allclose(
        [schedule(s) for s in range(11)], [0.05 * min((s + 1) / 10, 1) for s in range(11)], rtol=1e-6
    )


def test_cosine_falls_to_zero_over_the_run():
    schedule = make_schedule(optim(schedule="cosine"), steps_per_epoch=10, epochs=4)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 10, 20, 40)], [0.05, 0.05 * (1 + np.sqrt(0.5)) / 2, 0.025, 0], atol=1e-8
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    """v = m v + (g + w p); p -= lr v, or lr (g + w p + m v) with Nesterov; three steps written out."""
    momentum, decay, rate = 0.9, 5e-4, 0.05
    optimizer = make_optimizer(optim(nesterov=nesterov), lambda step: jnp.float32(rate))
    params, velocity = np.array([1.0, -2.0], np.float32), np.zeros(2)
    ours, state = jnp.asarray(params), optimizer.init(jnp.asarray(params))
    for gradient in np.array([[0.5, 1.0], [-1.0, 0.25], [2.0, 0.0]], np.float32):
        decayed = gradient + decay * params
        velocity = momentum * velocity + decayed
        params = params - rate * (decayed + momentum * velocity if nesterov else velocity)
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours + updates
    np.testing.assert_allclose(ours, params, rtol=1e-6)


def test_adamws_first_step_is_the_rate_and_its_decay():
    optimizer = make_optimizer(optim(name="adamw", weight_decay=0.1), lambda step: jnp.float32(0.01))
    params = jnp.array([2.0])
    updates, _ = optimizer.update(jnp.array([3.0]), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-0.01 * (1 + 0.1 * 2)], rtol=1e-5)


def test_weight_decay_acts_on_all_parameters():
    optimizer = make_optimizer(optim(), lambda step: jnp.float32(1.0))
    params = {"bn": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "fc": {"bias": jnp.ones(2)}}
    zero = {"bn": {"scale": jnp.zeros(3), "bias": jnp.zeros(3)}, "fc": {"bias": jnp.zeros(2)}}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for update in (updates["bn"]["scale"], updates["bn"]["bias"], updates["fc"]["bias"]):
        np.testing.assert_allclose(update, -5e-4, rtol=1e-6)


def test_the_first_decay():
    assert first_decay_epoch(optim()) == 150
    assert first_decay_epoch(optim(schedule="cosine")) == 0
    assert first_decay_epoch(optim(schedule="constant")) == float("inf")


def test_gradients_are_clipped_by_their_norm_together():
    """Two gradients of norm 5 together: at clip_norm 1 a fifth of each, at 10 untouched, before the weight decay."""
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    for clip_norm, share in ((1.0, 0.2), (10.0, 1.0), (None, 1.0)):
        block = optim(clip_norm=clip_norm, learning_rate=1.0, schedule="constant")
        optimizer = make_optimizer(block, make_schedule(block, steps_per_epoch=1, epochs=1))
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-3 * share, -4 * share], rtol=1e-6)


def test_nadam_is_adam_with_nesterov_and_keeps_it():
    params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
    ours, optaxs = make_optimizer(optim(name="nadam", nesterov=False), lambda step: 0.1), optax.nadam(lambda step: 0.1)
    updates = [made.update(gradient, made.init(params), params)[0] for made in (ours, optaxs)]
    np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", []),
        ("adamw", []),
        ("adam", ["momentum", "weight_decay"]),
        ("rmsprop", ["weight_decay"]),
        ("nadamw", ["momentum", "nesterov"]),
        ("<optimizer>", []),
    ],
)
def test_keys_that_an_optimizer_does_not_take_are_known(name, expected):
    assert unread(optim(name=name)) == expected

"""The steps by themselves: padding counts in nothing, the objective's weights, what the diagnostics mean."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ldrld_jax.errors import UserError
from ldrld_jax.losses import METHODS, SLDConfig, wkd_cost
from ldrld_jax.losses.top import top_mask
from ldrld_jax.metrics import mean_of
from ldrld_jax.models import MODELS
from ldrld_jax.models.purify import purify
from ldrld_jax.train.objective import Objective, Term, cross_entropy
from ldrld_jax.train.state import TrainState, Variables
from ldrld_jax.train.step import (
    Ensemble,
    Mixup,
    Network,
    _accumulated,
    all_finite,
    last_layer,
    make_eval_step,
    make_train_step,
    still_finite,
)
from tests.tiny_net import TinyNet


@pytest.fixture(scope="module")
def network():
    with jax.enable_x64(True):
        model = TinyNet(10, 1, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)
        apply, *variables = purify(model)
    return Network(apply, mean=(0.3,), std=(0.4,), dtype=jnp.float64), Variables(*variables)


def batch_of(rng, rows, padding=0):
    images = rng.integers(0, 256, (rows, 8, 8, 1), np.uint8)
    labels = rng.integers(0, 10, rows).astype(np.int32)
    if not padding:
        return {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    noise = rng.integers(0, 256, (padding, 8, 8, 1), np.uint8)
    return {
        "image": jnp.asarray(np.concatenate([images, noise])),
        "label": jnp.asarray(np.concatenate([labels, np.zeros(padding, np.int32)])),
        "mask": jnp.arange(rows + padding) < rows,
    }


def term(name: str, weight: float = 1.0) -> Term:
    return Term(METHODS[name], METHODS[name].config(), weight)


def stepped(network, objective, batch, *, teacher=True, **options):
    network, variables = network
    optimizer = optax.sgd(0.1)
    state = TrainState.first(variables, optimizer, method_params=objective.init(), averaged=False)
    step = make_train_step(
        network,
        network if teacher else None,
        objective,
        optimizer,
        schedule=lambda step: jnp.float32(0.1),
        steps_per_epoch=10,
        **options,
    )
    frozen = Variables(jax.tree.map(lambda x: x * 1.1, variables.params), variables.batch_stats)
    return jax.jit(step)(state, frozen if teacher else None, batch)


def test_padding_reaches_neither_the_weights_nor_the_statistics_nor_the_metrics(network, x64):
    objective = Objective({name: term(name) for name in ("ldrld", "dist")})
    plain = stepped(network, objective, batch_of(np.random.default_rng(1), 6))
    padded = stepped(network, objective, batch_of(np.random.default_rng(1), 6, padding=3))
    chex.assert_trees_all_close(padded[0], plain[0], rtol=1e-10, atol=1e-14)
    for name, mean in plain[1].items():
        np.testing.assert_allclose(padded[1][name].value, mean.value, rtol=1e-6, err_msg=name)


def test_each_weight_of_the_objective_is_pinned(rng, x64):
    teacher, student = (jnp.asarray(z) for z in rng.normal(size=(2, 5, 10)))
    labels, epoch = jnp.arange(5), jnp.int32(3)
    terms = {name: METHODS[name].loss(teacher, student, labels, METHODS[name].config()) for name in ("kd", "ldrld")}
    ce = cross_entropy(student, labels)

    def loss(**changes):
        methods = {name: term(name, changes.pop(name, 0.0)) for name in ("kd", "ldrld")}
        objective = Objective(methods, **({"ce_weight": 0.0} | changes))
        return objective(teacher, student, labels, epoch=epoch)[0]

    np.testing.assert_allclose(loss(), 0.0)
    np.testing.assert_allclose(loss(ce_weight=1.0), ce)
    np.testing.assert_allclose(loss(kd=1.0), terms["kd"])
    np.testing.assert_allclose(loss(ldrld=1.0, kd_weight=2.5), 2.5 * terms["ldrld"])
    np.testing.assert_allclose(loss(kd=0.5, ldrld=1.0, ce_weight=2.0), 2 * ce + 0.5 * terms["kd"] + terms["ldrld"])
    np.testing.assert_allclose(loss(kd=1.0, kd_warmup_epochs=12), terms["kd"] * 3 / 12)
    np.testing.assert_allclose(loss(kd=1.0, kd_warmup_epochs=2), terms["kd"])


@pytest.mark.parametrize(
    "name", ["resnet8", "ResNet50", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV2", "imagenet_mobilenetv1"]
)
def test_the_last_layer_is_the_one_matrix_with_a_column_for_each_class(name):
    """One network of each family; its last layer gives the logits, so it has a row of the same size as the features."""
    common = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    params = jax.eval_shape(lambda: purify(MODELS[name](7, 3, rngs=nnx.Rngs(0), **common))[1])
    (matrix,) = (leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    rows = jax.eval_shape(lambda params: last_layer(Variables(params, {}), 7), params)
    assert rows.shape == (7, matrix.shape[0])


def test_a_teacher_without_a_last_layer_is_named(network):
    with pytest.raises(UserError, match="the only matrix of 11 columns, and the network has 0"):
        last_layer(network[1], 11)


def test_the_objective_gives_a_method_what_it_does_not_learn(rng, x64):
    teacher, student = (jnp.asarray(z) for z in rng.normal(size=(2, 6, 10)))
    labels, rows = jnp.arange(6), jnp.asarray(rng.normal(size=(10, 4)))
    methods = {name: term(name) for name in ("wkd", "sld")}
    objective = Objective(methods, ce_weight=0.0)
    assert objective.views == 2 and objective.needs_last_layer
    at = lambda epoch: objective(teacher, student, labels, epoch=jnp.int32(epoch), last_layer=rows)[1]  # noqa: E731
    want = METHODS["wkd"].loss(teacher, student, labels, METHODS["wkd"].config(), params=wkd_cost(rows))
    np.testing.assert_allclose(at(1)["wkd"], want, rtol=1e-12)
    views = lambda z: jnp.stack([z[::2], z[1::2]])  # noqa: E731
    own = METHODS["sld"].parts(*map(views, (teacher, student, labels)), SLDConfig())["student"]
    np.testing.assert_allclose([at(150)["sld/student"], at(151)["sld/student"]], [0, own], rtol=1e-12)
    assert own > 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(rng, x64, smoothing):
    logits, labels = rng.normal(size=(7, 4)), rng.integers(0, 4, 7)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    target = np.full((7, 4), smoothing / 4)
    target[np.arange(7), labels] += 1 - smoothing
    expected = -(target * log_p).sum(axis=-1).mean()
    ours = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize(("classes", "depth"), [(5, 2), (5, 5), (30, 7)])
def test_student_and_teacher_are_compared_as_two_selections_would(classes, depth, rng):
    """Compares with masks of each side's largest classes, bit for bit, with ties, ruled-out classes and masked rows."""
    teacher, student = np.round(rng.normal(size=(2, 60, classes)), 1).astype(np.float32)
    teacher[rng.random(teacher.shape) < 0.3] = student[rng.random(student.shape) < 0.3] = -np.inf
    teacher[30:50] = student[30:50]
    teacher[:2], student[1:3], where = np.nan, np.nan, jnp.arange(60) > 2
    labels = jnp.asarray(rng.integers(0, classes, 60), jnp.int32)
    given = lambda params, stats, images, train, where, key: (params["z"], stats)  # noqa: E731
    network = Network(given, mean=(0.0,), std=(1.0,), raw=True)
    step = make_train_step(
        network, network, Objective({}, 1.0), optax.sgd(0.0), schedule=None, steps_per_epoch=1, compared_depth=depth
    )
    variables = [Variables({"z": jnp.asarray(z)}, {}) for z in (student, teacher)]
    state = TrainState.first(variables[0], optax.sgd(0.0), method_params={}, averaged=False)
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    found = quick(step)(state, variables[1], {"image": jnp.zeros(60), "label": labels, "mask": where})[1]

    @quick
    def defined(teacher, student):
        largest, own = top_mask(teacher, depth), top_mask(student, depth)
        shares = {
            "agreement": jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1),
            "top_d_overlap": jnp.sum(largest & own, axis=-1),
            "label_in_top_d": own[jnp.arange(60), labels],
        }
        return {name: mean_of(100 * share.astype(float), where) for name, share in shares.items()}

    want = defined(teacher, student)
    want["top_d_overlap"] = want["top_d_overlap"]._replace(count=want["top_d_overlap"].count * depth)
    assert all(20 < mean.value < 90 for name, mean in want.items() if name == "agreement" or depth < classes)
    chex.assert_trees_all_equal({name: found[name] for name in want}, want)


def test_an_ensemble_averages_logits_or_probabilities(rng):
    outputs = [jnp.asarray(z, jnp.float32) for z in rng.normal(size=(2, 3, 4))]
    networks = tuple(lambda variables, images, train, z=z: (z, ()) for z in outputs)
    mean, _ = Ensemble(networks)((None, None), None, train=False)
    np.testing.assert_allclose(mean, (outputs[0] + outputs[1]) / 2, rtol=1e-6)
    log_p, _ = Ensemble(networks, "probabilities")((None, None), None, train=False)
    expected = (jax.nn.softmax(outputs[0]) + jax.nn.softmax(outputs[1])) / 2
    np.testing.assert_allclose(jnp.exp(log_p), expected, rtol=1e-6)


def test_images_are_normalised_and_resized_before_the_model():
    seen = []
    network = Network(lambda p, s, x, train, where, key: (seen.append(x), s), mean=(0.5,), std=(0.25,), image_size=4)
    network(Variables({}, {}), jnp.full((1, 2, 2, 1), 255, jnp.uint8), train=False)
    np.testing.assert_allclose(seen[0], np.full((1, 4, 4, 1), 2.0))


def test_evaluation_counts_real_rows_only(network, x64):
    step = make_eval_step(network[0])
    plain = {**batch_of(np.random.default_rng(3), 5), "mask": jnp.ones(5, bool)}
    padded = batch_of(np.random.default_rng(3), 5, padding=4)
    one, other = (step(network[1], batch) for batch in (plain, padded))
    assert float(other["top1"].count) == 5
    for name in one:
        np.testing.assert_allclose(other[name].value, one[name].value, rtol=1e-6)


def test_mixup_blends_neighbours_and_their_cross_entropies(rng):
    images = jnp.asarray(rng.integers(0, 256, (4, 2, 2, 1), np.uint8))
    labels, logits = jnp.arange(4), jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    shares = []
    for step in range(200):
        blended, (other, share) = Mixup(alpha=0.5, seed=1)(images, labels, jnp.int32(step))
        shares.append(float(share))
    assert 0 <= min(shares) < 0.01
    assert 0.45 < max(shares) <= 0.5
    # The mean of min(b, 1 - b) of Beta(1/2, 1/2) is 1/2 - 1/pi; its deviation .16, of the mean of 200 .011.
    assert abs(np.mean(shares) - (0.5 - 1 / np.pi)) < 0.04
    expected = [(1 - share) * np.asarray(images[i], np.float64) + share * np.asarray(images[i - 1]) for i in range(4)]
    np.testing.assert_allclose(blended, expected, rtol=1e-5)
    assert other.tolist() == [3, 0, 1, 2]
    _, terms = Objective({})(None, logits, labels, epoch=jnp.int32(1), second=(other, share))
    np.testing.assert_allclose(
        terms["ce_term"], (1 - share) * cross_entropy(logits, labels) + share * cross_entropy(logits, other), rtol=1e-6
    )


def test_a_number_that_is_not_finite_is_found_in_every_leaf_by_one_reduction_a_length():
    tree = {
        name: jnp.zeros(shape) for name, shape in {"a": 3, "b": 3, "c": (3, 2), "d": 2, "e": (3, 2), "f": ()}.items()
    }
    found = jax.jit(all_finite)
    assert found(tree)
    assert not any(found(tree | {name: x.at[(0,) * x.ndim].set(jnp.inf)}) for name, x in tree.items())
    assert found.lower(tree).as_text().count("stablehlo.reduce(") == 6  # of 3, of 2, c, e, f; and of these


def test_what_was_not_finite_before_need_not_be_after():
    before = {"mask": jnp.array([0.0, -jnp.inf]), "mean": jnp.zeros(2), "count": jnp.int32(3)}
    assert still_finite(before, before)
    assert still_finite(before, before | {"mask": jnp.zeros(2)})
    assert not still_finite(before, before | {"mask": jnp.full(2, -jnp.inf)})
    assert not still_finite(before, before | {"mean": jnp.array([0.0, jnp.nan])})
    assert still_finite({}, {})


@pytest.mark.parametrize(("kept", "expected"), [([1, 1, 0, 0], 5.0), ([0, 0, 0, 0], 6.0), ([1, 0, 1, 1], 19 / 3)])
def test_an_empty_microbatch_adds_nothing_and_nothing_at_all_leaves_variables_as_they_are(kept, expected):
    """Two microbatches of rows 0 and 2, and 1 and 3; the statistic of one is 5 or 7, and a mask is infinite."""

    def gradients_of(batch, key):
        stats = {"mask": jnp.array([0.0, -jnp.inf]), "mean": jnp.where(batch["image"][0] == 0, 5.0, 7.0)}
        return jnp.float32(1.0), stats, {"rows": mean_of(batch["image"], batch["mask"])}

    mask = jnp.array(kept, bool)[jnp.array([0, 2, 1, 3])]
    batch = {"image": jnp.array([0.0, 1.0, 0.0, 1.0]), "label": jnp.zeros(4, jnp.int32), "mask": mask}
    gradients, stats, metrics = _accumulated(gradients_of, batch, None, 2, unroll=True)
    np.testing.assert_array_equal(stats["mask"], [0.0, -np.inf])
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-6)
    np.testing.assert_allclose(gradients, 1.0, rtol=1e-6)
    assert float(metrics["rows"].count) == sum(kept)


def test_a_step_that_is_not_finite_is_skipped_and_counted(network, x64):
    """One image is not a number in float: the gradient is not finite, and nothing moves but the step."""
    good = batch_of(np.random.default_rng(4), 6)
    bad = {**good, "image": good["image"].astype(jnp.float64).at[2].set(jnp.nan)}
    kept, metrics = stepped(network, Objective({}), bad, teacher=False, skip_non_finite=True)
    assert (int(kept.step), float(metrics["skipped"].total), float(metrics["loss"].count)) == (1, 1.0, 0.0)
    chex.assert_trees_all_equal(kept.student, network[1])
    assert all(np.isfinite(mean.total) for mean in metrics.values())
    moved, metrics = stepped(network, Objective({}), good, teacher=False, skip_non_finite=True)
    assert float(metrics["skipped"].total) == 0
    chex.assert_trees_all_close(moved, stepped(network, Objective({}), good, teacher=False)[0], rtol=1e-12)


def test_the_rate_that_is_logged_is_the_one_that_is_applied_after_a_skipped_step_too(network, x64):
    """The optimizer's schedule counts the steps that it takes."""
    good = batch_of(np.random.default_rng(4), 6)
    bad = {**good, "image": good["image"].astype(jnp.float64).at[2].set(jnp.nan)}
    net, variables = network
    schedule = lambda step: 0.1 * 0.5 ** jnp.asarray(step, jnp.float64)  # noqa: E731
    optimizer = optax.sgd(schedule)
    options = dict(schedule=schedule, steps_per_epoch=10, skip_non_finite=True)
    step = jax.jit(make_train_step(net, None, Objective({}), optimizer, **options))
    first = TrainState.first(variables, optimizer, method_params={}, averaged=False)
    logged, states = [], [first]
    for batch in (bad, {**good, "image": good["image"].astype(jnp.float64)}) * 2:
        state, metrics = step(states[-1], None, batch)
        states.append(state)
        logged.append(float(metrics["learning_rate"].total))
    assert logged == [0.0, 0.1, 0.0, 0.05]  # a skipped step has none

    def weight(state):
        return state.student.params["fc"]["bias"]

    plain = jax.jit(make_train_step(net, None, Objective({}), optax.sgd(1.0), schedule=schedule, steps_per_epoch=10))
    for before, after, rate in ((states[1], states[2], 0.1), (states[3], states[4], 0.05)):
        fresh = before._replace(opt_state=optax.sgd(1.0).init(before.student.params))
        whole = weight(plain(fresh, None, {**good, "image": good["image"].astype(jnp.float64)})[0]) - weight(before)
        np.testing.assert_allclose(weight(after) - weight(before), rate * whole, rtol=1e-9)

"""Runs are grouped by all that they compute but the seed, named by what differs, and compared with the right ones."""

import json

from ldrld_jax.report.collect import collect
from ldrld_jax.report.curves import learning, overview, rank_matrices, sweeps
from ldrld_jax.report.groups import compare
from ldrld_jax.report.published import published
from ldrld_jax.report.table import results, table
from tests.report.folders import found, write


def column(runs, name):
    cells = results(compare(runs))
    return [row[cells.header.index(name)] for row in cells.rows]


def test_seeds_are_averaged_and_the_best_last_epoch_comes_first():
    runs = [found(seed=seed, last=last) for seed, last in ((0, 95.0), (1, 97.0), (2, 96.0))]
    runs += [found(method="ldrld", last=98.25), found(method="ce", teacher={}, last=90.0)]
    assert column(runs, "method") == ["ldrld", "kd", "ce"]
    assert column(runs, "last top-1 %") == ["98.25", "96.00 ± 1.00", "90.00"]  # the deviation of 95, 96, 97
    assert column(runs, "seeds") == ["1", "3", "1"]
    assert column(runs, "teacher") == ["resnet20", "resnet20", "none"]
    assert column(runs, "against our kd") == ["+2.25", "", "-6.00"]
    assert "published" not in table(runs)


def test_runs_that_differ_in_a_key_are_rows_of_their_own_named_by_it():
    switch = dict(method="ldrld", loss__ldrld__use_irw=True, loss__ldrld__depth=7)
    runs = [found(seed=s, **switch) for s in (0, 1)] + [found(**switch | dict(loss__ldrld__use_irw=False), last=95.0)]
    assert column(runs, "setting") == ["", "use_irw=False"]
    assert compare(runs)[0].usual == {"use_irw": True}
    assert column(runs, "seeds") == ["2", "1"]


def test_where_a_run_lay_and_what_the_teacher_inherits_make_no_difference():
    places = [found(data__data_dir=place, seed=seed) for seed, place in enumerate("ab")]
    assert column(places, "seeds") == ["2"]
    runs = [found(data__fraction=f, teacher__data__fraction=f, last=90 + f) for f in (0.1, 0.5)]
    assert column(runs, "setting") == ["fraction=0.5", "fraction=0.1"]


def test_own_kd_is_the_best_one_under_the_same_conditions():
    runs = [found(method="dkd", last=97.0), found(last=96.0, loss__kd__temperature=4.0)]
    runs += [found(last=95.0, loss__kd__temperature=2.0), found(last=80.0, data__fraction=0.1)]
    cells = dict(zip(column(runs, "last top-1 %"), column(runs, "against our kd"), strict=True))
    assert cells == {"97.00": "+1.00", "96.00": "", "95.00": "", "80.00": ""}


def test_a_sweep_is_a_line_by_the_number_that_differs_noise_of_rate_0_being_of_any_kind():
    runs = [found(method=m, last=last, seed=s) for m, last in (("kd", 90.0), ("ldrld", 92.0)) for s in (0, 1)]
    for kind, rate, last in (("symmetric", 0.2, 80.0), ("asymmetric", 0.2, 70.0), ("symmetric", 0.4, 60.0)):
        runs.append(found(last=last, data__label_noise=kind, data__label_noise_rate=rate))
    [(key, lines)] = sweeps(compare(runs)[0].groups)
    assert key == "data.label_noise_rate"
    points = {line.label: [(point.x, point.y) for point in line.points] for line in lines}
    assert points == {
        "kd asymmetric": [(0.0, 90.0), (0.2, 70.0)],
        "kd symmetric": [(0.0, 90.0), (0.2, 80.0), (0.4, 60.0)],
    }


def test_a_learning_curve_is_the_mean_over_seeds_where_all_were_evaluated():
    curves = ((1.0, 50.0), (2.0, 60.0)), ((1.0, 54.0),)
    [line] = learning(compare([found(seed=s, curve=curve) for s, curve in enumerate(curves)])[0])
    assert [(point.x, point.y) for point in line.points] == [(1.0, 52.0)]
    assert abs(line.points[0].deviation - 8**0.5) < 1e-12


def test_published_figures_stand_beside_the_recipe_they_belong_to_and_no_other():
    whole = dict(data__name="cifar100", epochs=240, student__model="resnet8x4", teacher__model="resnet32x4")
    shown = lambda **changes: published(found(**whole | changes).config)  # noqa: E731
    assert shown(method="ldrld") == "77.20"
    assert (shown(), shown(standardize=True), shown(method="dkd")) == ("73.33", "76.62", "76.32")
    assert shown(method="ce", teacher={}) == "72.50"
    for changes in (
        *(dict(epochs=15), dict(data__fraction=0.2), dict(data__train_split="train[:10%]"), dict(kd_weight=0.0)),
        *(dict(method="ldrld", loss__ldrld__use_erd=False), dict(method="ldrld", loss__ldrld__alpha=0.0)),
    ):
        assert shown(**changes) == ""
    pair = dict(student__model="imagenet_resnet18", teacher__model="imagenet_resnet34", data__name="imagenet2012")
    assert shown(**pair, epochs=100) == "70.66 to 71.37"
    [row] = overview(compare([found(**whole)])[0])
    assert (row.label, row.published) == ("kd", 73.33)


def test_rank_matrices_are_the_factors_and_their_product():
    ldrld = dict(method="ldrld", loss__ldrld__irw_epsilon=1.5, loss__ldrld__erd_scale=2.0, loss__ldrld__erd_decay=0.05)
    runs = [found(**ldrld, loss__ldrld__depth=depth, seed=depth) for depth in (7, 3)]
    runs += [found(**ldrld, loss__ldrld__depth=depth) for depth in (0, 10**7)]  # what no config or no page may have
    runs += [found()]
    matrices = {tuple(map(len, weights)): weights for _, weights in rank_matrices(compare(runs)[0].groups)}
    assert set(matrices) == {(7, 7, 7), (3, 3, 3)}
    irw, erd, product = matrices[7, 7, 7]
    assert (round(irw[0][1], 4), round(erd[0][1], 4), round(product[0][1], 4)) == (0.4, 1.7214, 0.6886)


def test_a_schedule_of_a_methods_numbers_is_part_of_the_method():
    runs = [found(loss_schedule__gamma=None), found(method="wkd", loss_schedule__gamma="cosine:600@9:0@15", last=97.0)]
    assert column(runs, "against our kd") == ["+1.00", ""]


def test_runs_on_other_images_under_one_name_are_neither_averaged_nor_compared(tmp_path):
    runs = [("a", "kd", 95.0, "f1"), ("b", "kd", 50.0, "c1"), ("c", "dkd", 60.0, "c1"), ("d", "kd", 52.0, "c1")]
    for seed, (name, method, last, digest) in enumerate(runs):
        note = {split: {"images": 90, "digest": 16 * two} for split, two in (("train", digest), ("eval", "e0"))}
        workdir = write(tmp_path, name, last, method=method, seed=seed, data__name="image_folder")
        (workdir / "data.json").write_text(json.dumps(note | {"classes": ["x"], "form": {}, "weights": {}}))
    found = collect([tmp_path]).summaries
    assert column(found, "last top-1 %") == ["95.00", "60.00", "51.00 ± 1.41"]
    assert column(found, "against our kd") == ["", "+9.00", ""]
    assert column(found, "setting") == ["images=f1f1f1f1", "", ""]
    (tmp_path / "a/data.json").write_text((tmp_path / "b/data.json").read_text())
    alike = collect([tmp_path]).summaries
    assert column(alike, "last top-1 %") == ["65.67 ± 25.42", "60.00"]
    assert not any(run.config.keys() & {"data.images", "data.eval_images"} for run in alike)


def test_a_second_run_of_a_seed_is_in_no_mean_and_no_baseline(tmp_path):
    for name, method, seed, last in (
        *[("a", "kd", 0, 80.0), ("b", "kd", 1, 82.0), ("z", "kd", 1, 90.0)],
        *[("x", "ldrld", 0, 83.0), ("y", "ldrld", 1, 83.0)],
    ):
        write(tmp_path, name, last, method=method, seed=seed)
    found = collect([tmp_path])
    assert column(found.summaries, "last top-1 %") == ["90.00", "83.00", "81.00 ± 1.41"]
    assert column(found.summaries, "setting") == ["copy=2", "", ""]
    assert column(found.summaries, "seeds") == ["1", "2", "2"]
    assert column(found.summaries, "against our kd") == ["", "+2.00", ""]
    assert len({group.label for group in compare(found.summaries)[0].groups}) == 3
    assert found.notes == [f"{tmp_path}/z: it has the config and the seed of {tmp_path}/b, and is in no mean with it"]

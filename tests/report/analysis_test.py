"""Analysis of logits beyond accuracy, against values worked out by hand or by numpy."""

import numpy as np
import pytest

from ldrld_jax.report import analysis


def test_ece_is_the_mean_distance_of_confidence_and_accuracy_by_bin():
    # Confidences .8, .8 (one of them right), .55 (right), 1 (right): bins [.5, .75), [.75, 1].
    rows = [[0.8, 0.2], [0.2, 0.8], [0.55, 0.45], [1.0, 1e-30]]
    found = analysis.calibration(np.log(np.array(rows)), np.array([0, 0, 0, 0]), bins=4)
    assert found["examples"] == [0, 0, 1, 3]
    assert found["accuracy"][2:] == [1.0, 0.6667]
    np.testing.assert_allclose(found["confidence"][2:], [0.55, 2.6 / 3], atol=1e-4)
    assert found["ece"] == pytest.approx(100 * (0.45 * 1 + abs(2.6 - 2)) / 4, abs=1e-3)


def test_correlations_differ_as_numpy_says_and_a_constant_class_correlates_with_nothing(rng):
    teacher, student = rng.normal(size=(2, 50, 6))
    expected = np.abs(np.corrcoef(teacher.T) - np.corrcoef(student.T))
    np.testing.assert_allclose(analysis.correlation_difference(teacher, student), expected, atol=1e-12)
    student[:, 2] = 3.0
    np.testing.assert_allclose(
        analysis.correlation_difference(teacher, student)[2], np.abs(np.corrcoef(teacher.T)[2]), atol=1e-12
    )
    constant = np.full((1000, 3), 0.1, np.float32)  # the mean of equal numbers is not always the number
    constant[:, 2] = rng.normal(size=1000)
    np.testing.assert_allclose(analysis._correlation(constant), np.diag([0.0, 0.0, 1.0]), atol=1e-6)


def test_the_pair_that_teacher_and_student_tell_apart_differently_comes_first(rng):
    labels = np.arange(40) % 4
    teacher = 4 * np.eye(4)[labels]
    student = teacher.copy()
    student[labels == 1, 3] = 4.0  # of two images of four the student cannot tell 3 from 1
    first, second = analysis.disagreeing_pairs(analysis.pair_means(teacher, student, labels), "abcd", most=2)
    assert (first["first"], first["second"]) == ("b", "d")
    p = 1 / (1 + np.exp(-4))
    kl = p * np.log(p / 0.5) + (1 - p) * np.log((1 - p) / 0.5)
    assert first["kl"] == pytest.approx(kl / 2, abs=1e-4)  # images of b; those of d agree
    assert first["teacher"] == pytest.approx(p, abs=1e-4)
    assert first["student"] == pytest.approx((p + 0.5) / 2, abs=1e-4)
    assert second["kl"] == 0


def test_extreme_logits_give_finite_figures():
    teacher, student = np.array([[1e4, 0.0, -1e4]] * 3), np.array([[-1e4, 0.0, 1e4]] * 3)
    labels = np.array([0, 0, 2])
    assert analysis.calibration(teacher, labels)["ece"] == pytest.approx(100 / 3, abs=1e-3)
    assert analysis.agreement(teacher, student) == 0.0
    pairs = analysis.disagreeing_pairs(analysis.pair_means(teacher, student, labels), "abc")
    assert all(np.isfinite(pair["kl"]) for pair in pairs)


def test_classes_that_lie_apart_stay_apart_in_the_embedding(rng):
    labels = np.repeat(np.arange(4), 10)
    features = 50 * np.eye(4)[labels] + rng.normal(size=(40, 4))
    found = analysis.embedding(features, labels)
    xy = np.array(found["xy"])
    assert (xy.min(), xy.max()) == (0.0, 1.0)
    centres = np.array([xy[labels == label].mean(axis=0) for label in range(4)])
    nearest = np.linalg.norm(xy[:, None] - centres[None], axis=2).argmin(axis=1)
    assert (nearest == labels).all()
    assert found["silhouette"] > 0.9


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (np.eye(5), [0, 1, 2, 3, 4]),
        (np.eye(5), [3] * 5),
        (np.eye(1), [0]),
        (np.ones((5, 4)), [0, 0, 1, 1, 1]),
    ],
    ids=["an image of each class", "a single class", "a single image", "a collapsed model"],
)
def test_where_no_silhouette_is_defined_there_is_no_embedding(features, labels):
    assert analysis.embedding(features, np.array(labels)) is None


def test_three_images_are_enough_for_an_embedding(rng):
    found = analysis.embedding(rng.normal(size=(3, 4)), np.array([0, 0, 1]))
    assert np.shape(found["xy"]) == (3, 2)
    assert -1 <= found["silhouette"] <= 1


def test_the_divergence_of_rows_is_that_of_their_probabilities(rng):
    teacher, student = rng.normal(size=(2, 5, 4))
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) for logits in (teacher, student))
    np.testing.assert_allclose(analysis.divergence(teacher, student), (p * np.log(p / q)).sum(axis=1), rtol=1e-12)


def test_the_classes_that_are_confused_most_are_kept():
    labels = np.repeat(np.arange(30), 4)
    said = labels.copy()
    said[4 * 17], said[4 * 3 : 4 * 3 + 2] = 2, 28  # 17 for 2 once, 3 for 28 twice
    matrix = analysis.confusion(np.eye(30)[said], labels)
    assert (matrix[17, 2], matrix[3, 28], matrix[3, 3], matrix[0, 0]) == (25, 50, 50, 100)
    assert analysis.striking(matrix, most=4).tolist() == [2, 3, 17, 28]
    assert analysis.striking(matrix[:5, :5]).tolist() == [0, 1, 2, 3, 4]

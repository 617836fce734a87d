"""Figures of merit and their intervals, against loops."""

import numpy as np
import pytest

from vlm.evaluation.reliability import (
    BINS,
    accuracy_interval,
    calibration_error,
    confidence_and_correctness,
    reliability_bins,
    reliability_figures,
)


def drawn(count=200, classes=4, seed=0, sharpness=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=share) for share in shares])
    logits = logits * sharpness
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels


def slow_error(confidence, correct):
    """Sort, cut into bins of equal mass, and add up."""
    pairs = sorted(zip(confidence, correct, strict=True), key=lambda pair: pair[0])
    bins = min(BINS, len(pairs))
    total = 0.0
    for b in range(bins):
        part = pairs[b * len(pairs) // bins : (b + 1) * len(pairs) // bins]
        mean_confidence = sum(c for c, _ in part) / len(part)
        accuracy = sum(bool(right) for _, right in part) / len(part)
        total += len(part) / len(pairs) * abs(mean_confidence - accuracy)
    return total


def slow_figures(log_probabilities, labels):
    rows = [np.exp(row) for row in log_probabilities]
    return {
        "accuracy": np.mean([row.argmax() == label for row, label in zip(rows, labels, strict=True)]),
        "nll": np.mean([min(100, -np.log(row[label])) for row, label in zip(rows, labels, strict=True)]),
        "brier": np.mean(
            [sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for row, label in zip(rows, labels, strict=True)]
        ),
        "ece": slow_error(
            [row.max() for row in rows], [row.argmax() == label for row, label in zip(rows, labels, strict=True)]
        ),
    }


@pytest.mark.parametrize("count", [1, 7, 15, 16, 200])
def test_the_figures_are_those_of_a_loop(count):
    log_probabilities, labels = drawn(count)
    found = reliability_figures(log_probabilities, labels, resamples=20)
    expected = slow_figures(log_probabilities, labels)
    assert {name: value[0] for name, value in found.items()} == pytest.approx(expected, abs=1e-12)
    assert calibration_error(*confidence_and_correctness(log_probabilities, labels)) == pytest.approx(
        expected["ece"], abs=1e-12
    )
    assert all(low <= value + 1e-12 and value <= high + 1e-12 for value, low, high in found.values())


def test_the_intervals_are_those_of_a_bootstrap_by_a_loop():
    """With other draws, so they agree to the noise of some hundred of them."""
    log_probabilities, labels = drawn(150, sharpness=2.0)
    found = reliability_figures(log_probabilities, labels, resamples=1000, seed=1)
    rng = np.random.default_rng(99)
    samples = []
    for _ in range(400):
        picked = [int(rng.integers(150)) for _ in range(150)]
        samples.append(slow_figures(log_probabilities[picked], labels[picked]))
    for name in ("nll", "brier"):
        low, high = np.quantile([sample[name] for sample in samples], [0.025, 0.975])
        np.testing.assert_allclose(found[name][1:], [low, high], atol=0.2 * (high - low), err_msg=name)
    value, (below, above) = found["ece"][0], np.quantile([sample["ece"] for sample in samples], [0.025, 0.975])
    expected = [max(0, min(value, 2 * value - above)), max(value, 2 * value - below)]
    np.testing.assert_allclose(found["ece"][1:], expected, atol=0.2 * (above - below))


def test_the_interval_of_an_honest_model_s_error_reaches_far_down():
    """If the probabilities are the true ones, the value is only noise; a percentile interval would lie above it."""
    ends = [reliability_figures(*drawn(300, seed=seed), resamples=300)["ece"] for seed in range(10)]
    assert sum(low < 0.02 for _, low, _ in ends) >= 8 and all(value > 0.02 for value, _, _ in ends)
    sure = [reliability_figures(*drawn(300, seed=seed, sharpness=4.0), resamples=300)["ece"] for seed in range(10)]
    assert all(low > 0.05 for _, low, _ in sure)


def test_the_same_seed_gives_the_same_intervals_whatever_the_confidences(monkeypatch):
    log_probabilities, labels = drawn(100)
    sharper = drawn(100, sharpness=3.0)[0]
    before, after = (reliability_figures(values, labels, seed=5) for values in (log_probabilities, sharper))
    assert before["accuracy"] == after["accuracy"] and before["nll"] != after["nll"]
    monkeypatch.setattr("vlm.evaluation.reliability.ELEMENTS_AT_ONCE", 1)
    blocks = reliability_figures(log_probabilities, labels, resamples=50, seed=5)
    assert blocks["nll"] != reliability_figures(log_probabilities, labels, resamples=50, seed=6)["nll"]
    monkeypatch.undo()
    assert blocks == reliability_figures(log_probabilities, labels, resamples=50, seed=5), "in blocks or at once"


@pytest.mark.parametrize("right", [True, False])
def test_few_images_that_are_all_right_or_all_wrong_prove_little(right):
    """A bootstrap of equal values has no width. An ECE is not above 1, however few the images."""
    log_probabilities = np.log(np.array([[0.9, 0.1]] * 8))
    figures = reliability_figures(log_probabilities, [0 if right else 1] * 8)
    assert figures["accuracy"] == accuracy_interval(np.array([right] * 8)) and figures["accuracy"][0] == right
    assert figures["accuracy"][2] - figures["accuracy"][1] > 0.3
    assert figures["ece"][1] <= figures["ece"][0] <= figures["ece"][2] <= 1


def test_one_mistake_more_lowers_both_ends():
    ends = [accuracy_interval(np.arange(20) < right)[1:] for right in range(21)]
    assert ends == sorted(ends) and sorted(high for _, high in ends) == [high for _, high in ends]


def test_equal_confidences_do_not_make_an_error_of_the_order():
    """Sorted by class, one bin would hold images that are all right, and the next one none."""
    right = np.arange(3000) < 1500
    confidence = np.full(3000, 0.5)
    assert calibration_error(confidence, right) < 0.06 and calibration_error(confidence, ~right) < 0.06
    assert max(abs(accuracy - 0.5) for _, accuracy, _ in reliability_bins(confidence, right)) < 0.15
    figures = reliability_figures(np.log(np.full((3000, 2), 0.5)), (~right).astype(int).tolist(), resamples=50)
    assert figures["ece"][0] < 0.06 and figures["ece"][1] < 0.03
    two = np.where(np.arange(3000) % 2, 0.4, 0.8)
    assert calibration_error(two, np.random.default_rng(0).random(3000) < two) < 0.06


def test_an_interval_of_the_error_ends_at_1():
    value, _, high = reliability_figures(np.log(np.array([[1 - 1e-12, 1e-12]] * 4)), [0, 1, 1, 1])["ece"]
    assert value == pytest.approx(0.75) and high == 1


def test_the_bins_hold_every_image_once_and_add_up_to_the_error():
    confidence, correct = confidence_and_correctness(*drawn(100))
    bins = np.array(reliability_bins(confidence, correct))
    assert len(bins) == BINS and bins[:, 2].sum() == 100 and set(bins[:, 2]) == {6, 7}
    assert (np.diff(bins[:, 0]) >= 0).all()
    assert (np.abs(bins[:, 0] - bins[:, 1]) * bins[:, 2]).sum() / 100 == pytest.approx(
        calibration_error(confidence, correct)
    )
    assert len(reliability_bins(confidence[:3], correct[:3])) == 3


def test_an_impossible_truth_does_not_make_the_figures_infinite():
    with np.errstate(divide="ignore"):
        log_probabilities = np.log(np.array([[1.0, 0.0], [0.5, 0.5]]))
    found = reliability_figures(log_probabilities, [1, 0], resamples=50)
    assert found["nll"][0] == pytest.approx((100 + np.log(2)) / 2) and found["brier"][0] == pytest.approx((2 + 0.5) / 2)
    assert np.isfinite(list(found.values())).all()


def test_the_interval_of_an_accuracy():
    """Against the roots of |p - share| = z * sqrt(p (1 - p) / n), by which Wilson's interval is defined."""
    for right, total in ((0, 5), (3, 7), (252, 269), (40, 40)):
        share, low, high = accuracy_interval(np.arange(total) < right)
        shares = np.linspace(0, 1, 200_001)
        inside = shares[np.abs(shares - right / total) <= 1.959964 * np.sqrt(shares * (1 - shares) / total)]
        assert (share, low, high) == pytest.approx((right / total, inside.min(), inside.max()), abs=1e-5)

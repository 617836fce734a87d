"""The temperature is the best one, never changes the ranking, and goes with its prompts alone; abstaining keeps what it
promises."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_prompts

from vlm.classifier.calibration import Calibration, key_of
from vlm.evaluation.fit_calibration import (
    COLDEST,
    HOTTEST,
    MIN_IMAGES,
    coverage_and_accuracy,
    fit_bias,
    fit_calibration,
    fit_temperature,
    pick_threshold,
)


def drawn(count=400, classes=5, temperature=1.0, seed=0, offset=-30.0):
    """Scores whose softmax at `temperature` is the true distribution of the labels, as log-probabilities of long
    responses."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=share) for share in shares])
    return torch.tensor(logits * temperature + offset), labels


def nll(scores, labels, temperature, bias=0.0):
    """One image after the other."""
    total = 0.0
    for row, label in zip(np.asarray(scores), labels, strict=True):
        logits = row / temperature + bias
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return total / len(labels)


@pytest.mark.parametrize("true", [0.3, 1.0, 3.0])
def test_the_temperature_is_that_of_a_grid_search(true):
    scores, labels = drawn(150, temperature=true)
    calibration, remarks = fit_calibration(scores, labels, "temperature")
    grid = np.geomspace(true / 2, true * 2, 140)
    best = grid[np.argmin([nll(scores, labels, t) for t in grid])]
    assert remarks == [] and calibration.bias is None
    assert calibration.temperature == pytest.approx(best, rel=0.01) and calibration.temperature == pytest.approx(
        true, rel=0.4
    )


def test_none_fits_nothing():
    scores, labels = drawn(temperature=3)
    assert fit_calibration(scores, labels, "none") == (Calibration(), [])


PRIOR = tuple(np.random.default_rng(1).normal(-80, 5, 20).tolist())


@pytest.mark.parametrize("temperature", [COLDEST, 0.37, 1.0, 13.3, HOTTEST])
def test_a_temperature_never_changes_the_ranking_of_another_score(temperature):
    sums, _ = drawn(300, 20, offset=-80.0)
    calibration = Calibration(temperature, prior=PRIOR)
    scores, result = calibration.scores(sums), calibration.log_probabilities(sums)
    assert torch.equal(result.argsort(1), scores.argsort(1)) and not torch.equal(scores.argsort(1), sums.argsort(1))
    torch.testing.assert_close(result.exp().sum(1), torch.ones(300, dtype=torch.float64))


@pytest.mark.parametrize("bias", [None, (0.3, -2.0, 0.0)])
def test_each_score_by_hand(bias):
    sums, prior, temperature = [-7.0, -9.5, -8.0], (-6.0, -10.0, -9.0), 0.7
    by_hand = {"sum": sums, "prior": [s - p for s, p in zip(sums, prior, strict=True)]}
    for kind in (Calibration(), Calibration(prior=prior)):
        calibration = replace(kind, temperature=temperature, bias=bias)
        weights = np.exp(np.array(by_hand[kind.score]) / temperature + np.array(bias or 0.0))
        found = calibration.log_probabilities(torch.tensor([sums])).exp()
        np.testing.assert_allclose(found[0], weights / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [COLDEST, 0.37, 1.0, 1.7, 13.3, HOTTEST])
def test_a_temperature_never_changes_the_ranking(temperature):
    """Nor makes it equal: float32 scores that are neighbors among the floats stay apart."""
    scores, _ = drawn(1000, 20, offset=-80.0)
    scores = scores.float()
    scores[:, 1] = torch.nextafter(scores[:, 0], torch.tensor(0.0))
    result = Calibration(temperature).log_probabilities(scores)
    assert result.dtype == torch.float64
    assert torch.equal(result.argsort(1), scores.argsort(1)) and torch.equal(result.argmax(1), scores.argmax(1))
    assert (result[:, 1] > result[:, 0]).all()
    torch.testing.assert_close(result.exp().sum(1), torch.ones(1000, dtype=torch.float64))


def test_without_calibration_the_probabilities_are_the_softmax_of_the_scores():
    scores, _ = drawn()
    torch.testing.assert_close(Calibration().log_probabilities(scores), scores.log_softmax(1), rtol=1e-12, atol=0)


def test_where_no_image_is_wrong_the_temperature_is_bounded_and_says_so():
    labels = np.arange(50) % 4
    scores = np.eye(4)[labels] * 2
    temperature, remark = fit_temperature(scores, labels)
    confidence = np.exp(2 / temperature) / (np.exp(2 / temperature) + 3)
    assert temperature < 1 and confidence == pytest.approx(51 / 52, abs=1e-6)
    assert "validation has no mistakes" in remark and "0.9808" in remark
    assert fit_temperature(scores * 10, labels)[0] == 1, "one that is sure already is not made less so"
    calibration, remarks = fit_calibration(torch.tensor(scores), labels, "bias")
    assert calibration == Calibration(temperature) and "No biases" in remarks[1], (
        "they would go on where the temperature is bounded"
    )
    scores[0] = scores[1]  # one mistake, and there is a best temperature
    temperature, remark = fit_temperature(scores, labels)
    assert remark is None and nll(scores, labels, temperature) < min(
        nll(scores, labels, temperature * f) for f in (0.98, 1.02)
    )


def test_scores_that_say_nothing_take_the_bound():
    labels = np.arange(40) % 4
    for scores in (np.zeros((40, 4)), -np.eye(4)[labels]):
        temperature, remark = fit_temperature(scores, labels)
        assert temperature == HOTTEST and "say nothing about the class" in remark


def test_too_few_images_are_not_calibrated_and_nan_is_left_out():
    scores, labels = drawn(MIN_IMAGES - 1, temperature=3)
    calibration, remarks = fit_calibration(scores, labels, "temperature")
    assert (
        calibration == Calibration() and f"{MIN_IMAGES - 1} validation images are fewer than {MIN_IMAGES}" in remarks[0]
    )
    scores, labels = drawn(100, temperature=3)
    broken = scores.clone()
    broken[7, 2] = float("nan")
    calibration, remarks = fit_calibration(broken, labels, "temperature")
    others = np.arange(100) != 7
    assert calibration == fit_calibration(scores[others], labels[others], "temperature")[0]
    assert remarks == ["1 of 100 validation images have NaN as a score and are left out of the calibration."]
    assert fit_calibration(scores * float("nan"), labels, "bias")[0] == Calibration()


def test_an_impossible_class_is_no_obstacle():
    scores, labels = drawn(temperature=2)
    scores[labels != 0, 0] = -torch.inf
    calibration, _ = fit_calibration(scores, labels, "temperature")
    assert calibration.temperature == pytest.approx(2, rel=0.2)


def test_biases_are_where_the_slope_is_zero_and_find_what_was_added():
    scores, labels = drawn(600, 4, temperature=2)
    scores = scores + 2 * torch.tensor([1.5, 0, 0, -1.0])  # classes that the model prefers, or avoids
    calibration, _ = fit_calibration(scores, labels, "bias")
    bias = np.array(calibration.bias)
    np.testing.assert_allclose(bias - bias[1], [-1.5, 0, 0, 1.0], atol=0.5)
    start = fit_temperature(scores.numpy(), labels)[0]

    def penalized(parameters):
        size = (parameters**2).sum() / (2 * len(labels))
        return nll(scores, labels, start / (1 + parameters[0]), parameters[1:]) + size

    ours = np.concatenate([[start / calibration.temperature - 1], bias])
    slope = [
        (penalized(ours + step) - penalized(ours - step)) / 2e-4 for step in 1e-4 * np.eye(5)
    ]  # the function is convex
    np.testing.assert_allclose(slope, 0, atol=1e-5)
    assert nll(scores, labels, calibration.temperature, bias) < nll(scores, labels, start) - 0.05


def test_the_bias_of_a_class_without_images_stays_small():
    scores, labels = drawn(100, 4)
    some = labels != 3
    temperature, bias = fit_bias(scores.numpy()[some], labels[some], 1.0)
    assert np.abs(bias).max() < 4 and 0.2 < temperature < 5


def test_a_calibration_is_stored_and_found_again():
    prompts = tiny_prompts()
    for kind in ({}, {"prior": tuple(-1.5 * i for i in range(7))}):
        calibration = Calibration(1.7, tuple(range(7)), 0.4, **kind)
        metadata = {"calibration": json.loads(json.dumps(calibration.to_json(prompts)))}
        assert Calibration.from_metadata(metadata, prompts) == calibration
    assert Calibration.from_metadata({}, prompts) == Calibration()


def test_a_calibration_stored_before_there_were_scores_means_the_sum(capsys):
    prompts = tiny_prompts()
    older = {"temperature": 1.7, "bias": None, "abstain_below": 0.4, "key": key_of(prompts)}
    calibration = Calibration.from_metadata({"calibration": older}, prompts)
    assert calibration == Calibration(1.7, None, 0.4) and calibration.score == "sum"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [{"system": "other"}, {"question": "other"}, {"class_names": tuple("abcdefg")}, {"responses": tuple("abcdefg")}],
)
def test_other_prompts_or_classes_have_another_key_and_no_calibration(change, capsys):
    prompts = tiny_prompts()
    metadata = {"calibration": Calibration(1.7, None, 0.4).to_json(prompts)}
    assert Calibration.from_metadata(metadata, replace(prompts, **change)) == Calibration()
    assert "fitted with other prompts or classes" in capsys.readouterr().err
    assert key_of(prompts) != key_of(replace(prompts, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0},
        {"temperature": None},
        {"temperature": "1"},
        {"bias": [1, 2]},
        {"bias": ["x"] * 7},
        {"abstain_below": "x"},
        {"score": "product"},
        {"score": "prior", "prior": [None] * 7},
        {"score": "prior", "prior": "-1"},
        {"prior": [-1] * 7},
    ],
)
def test_a_damaged_calibration_is_left_out_with_a_note(change, capsys):
    prompts = tiny_prompts()
    assert Calibration.from_metadata({"calibration": Calibration().to_json(prompts) | change}, prompts) == Calibration()
    assert "is damaged" in capsys.readouterr().err


def test_a_model_with_the_score_mean_of_an_earlier_version_is_not_calibrated_and_that_is_said(capsys):
    prompts = tiny_prompts()
    stored = Calibration(1.7).to_json(prompts) | {"score": "mean", "lengths": [3] * 7}
    assert Calibration.from_metadata({"calibration": stored}, prompts) == Calibration()
    assert "is for the score mean, which this version does not have" in capsys.readouterr().err


def test_the_threshold_keeps_the_most_images_at_the_wanted_precision():
    rng = np.random.default_rng(0)
    for seed in range(20):
        confidence = np.random.default_rng(seed).integers(1, 30, 60) / 30  # many are equal
        correct = rng.random(60) < confidence
        for target in (0.3, 0.8, 0.95):
            found = pick_threshold(confidence, correct, target)
            kept = [(confidence >= t).sum() for t in [0, *confidence] if correct[confidence >= t].mean() >= target]
            assert (found is None) == (not kept)
            if kept:
                assert (confidence >= found).sum() == max(kept) and correct[confidence >= found].mean() >= target
                assert not len(confidence) or np.abs(confidence - found).min() > 1e-3, "rounding should not matter"


def test_everything_or_nothing_may_be_kept():
    confidence = np.array([0.9, 0.5, 0.7])
    assert pick_threshold(confidence, np.array([True, True, True]), 0.95) == 0
    assert pick_threshold(confidence, np.array([False, True, True]), 0.95) is None
    assert pick_threshold(confidence, np.array([True, False, False]), 0.95) == pytest.approx(0.8)
    assert coverage_and_accuracy(confidence, np.array([True, False, True]), 0.7) == {
        "coverage": pytest.approx(2 / 3),
        "accuracy": 1.0,
    }
    assert coverage_and_accuracy(confidence, np.array([True, False, True]), 0.95) == {"coverage": 0.0, "accuracy": None}


def test_abstaining_is_below_the_threshold_and_off_without_one():
    assert not Calibration().abstains(0.0)
    assert [Calibration(abstain_below=0.5).abstains(p) for p in (0.49, 0.5, 0.51)] == [True, False, False]
    assert not Calibration(abstain_below=0.0).abstains(0.0)

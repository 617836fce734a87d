"""Which score is taken: by the likelihood of validation, and not without a clear difference; where there is a prior,
and where not."""

import math

import numpy as np
import pytest
import torch
from tiny import batch_of, tiny_classifier

from vlm.classifier.calibration import Calibration
from vlm.config import resolve
from vlm.evaluation import calibrating, score_choice
from vlm.evaluation.calibrating import calibrate
from vlm.evaluation.evaluate import Parts
from vlm.evaluation.fit_calibration import MIN_IMAGES, fit_temperature
from vlm.evaluation.score_choice import better_score, choose_score, measure_prior
from vlm.inference.predictor import load_model_and_metadata, predict_batch

COUNT = 300
KINDS = ("sum", "prior")


@pytest.fixture(scope="module")
def classifier(tiny_model):
    return tiny_classifier(tiny_model).eval()


def drawn(classifier, kind, seed=0):
    """Sums and labels, which were drawn by one kind of score; by the other they are something else."""
    rng = np.random.default_rng(seed)
    prior = np.array(measure_prior(classifier)[0])
    logits = rng.normal(0, 2, (COUNT, len(classifier.class_names)))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = [int(rng.choice(len(share), p=share)) for share in shares]
    sums = {"sum": logits, "prior": logits + prior}[kind] + rng.normal(-5, 3, (COUNT, 1))
    return torch.tensor(sums), labels


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_found_by_which_the_labels_were_drawn(classifier, kind):
    scores, labels = drawn(classifier, kind)
    calibration, compared, remarks, _ = choose_score(classifier, scores, labels, "temperature", "auto")
    assert calibration.score == kind and remarks == [] and list(compared) == list(KINDS)
    assert calibration.temperature == pytest.approx(1, rel=0.2)
    rows = range(COUNT)
    for name, figures in compared.items():
        one = {"prior": measure_prior(classifier)[0]} if name == "prior" else {}
        values = Calibration(**one).scores(scores).numpy()
        assert figures["temperature"] == pytest.approx(fit_temperature(values, np.array(labels))[0], rel=1e-6)
        scaled = values / figures["temperature"]
        losses = [math.log(sum(math.exp(x - scaled[i, labels[i]]) for x in scaled[i])) for i in rows]
        assert figures["nll"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert figures["accuracy"] == np.mean(values.argmax(1) == np.array(labels))


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_asked_for_is_taken(classifier, kind):
    scores, labels = drawn(classifier, "sum")
    calibration, compared, remarks, _ = choose_score(classifier, scores, labels, "bias", kind)
    assert calibration.score == kind and len(compared) == 2
    assert (calibration.bias is None) == any("No biases" in remark for remark in remarks)
    assert calibration.bias is None or len(calibration.bias) == len(classifier.class_names)
    calibration, compared, *_ = choose_score(classifier, scores, labels, "none", kind)
    assert (calibration.score, calibration.temperature, calibration.bias, compared) == (kind, 1.0, None, {})


def test_another_score_needs_a_difference_of_more_than_its_error():
    rng = np.random.default_rng(0)
    losses = {"sum": rng.exponential(1, COUNT)}
    error = 0.2 / math.sqrt(COUNT)  # of the mean of the differences below
    noise = rng.normal(0, 1, COUNT)
    noise = 0.2 * (noise - noise.mean()) / noise.std(ddof=1)
    assert better_score(losses | {"prior": losses["sum"] - noise - 0.9 * error}) == "sum"
    assert better_score(losses | {"prior": losses["sum"] - noise - 1.1 * error}) == "prior"
    assert better_score(losses | {"prior": losses["sum"] - 1e-12}) == "sum", "that is rounding"
    for broken in (np.nan, np.inf):
        assert better_score(losses | {"prior": np.append(losses["sum"][:-1] - 1, broken)}) == "sum"
    assert better_score({}) == "sum"


def test_few_images_or_no_fit_leave_the_sum_and_measure_nothing(classifier, monkeypatch):
    scores, labels = drawn(classifier, "prior")
    monkeypatch.setattr(score_choice, "measure_prior", None)
    assert choose_score(classifier, scores[: MIN_IMAGES - 1], labels[: MIN_IMAGES - 1], "temperature", "auto")[:2] == (
        Calibration(),
        {},
    )
    assert choose_score(classifier, scores, labels, "none", "auto") == (Calibration(), {}, [], {})


def test_rows_with_nan_are_left_out_of_the_comparison(classifier):
    scores, labels = drawn(classifier, "prior")
    expected = choose_score(classifier, scores[1:], labels[1:], "temperature", "auto")
    scores[0, 2] = float("nan")
    found = choose_score(classifier, scores, labels, "temperature", "auto")
    assert found[:2] == expected[:2] and "1 of 300 validation images have NaN" in found[2][0]


def test_a_model_that_needs_a_image_has_no_prior_and_says_so(classifier, monkeypatch):
    scores, labels = drawn(classifier, "prior")

    def refuse(*_, **__):
        raise ValueError("pixel_values are missing")

    monkeypatch.setattr(score_choice, "classify", refuse)
    calibration, compared, remarks, _ = choose_score(classifier, scores, labels, "temperature", "prior")
    assert calibration.score == "sum" and list(compared) == ["sum"]
    assert (
        "cannot be read without an image (ValueError: pixel_values are missing)" in remarks[0]
        and "the score is sum" in remarks[1]
    )


def test_a_stored_score_is_that_of_the_inference(demo_run):
    """The search against sums of the whole tree and the formula."""
    model, processor, metadata = load_model_and_metadata(demo_run / "best_model", device="cpu")
    batch = batch_of(model, [0, 1, 2], with_response=False)
    exact = model.search(model.read(batch), 0.0)
    prior = measure_prior(model)[0]
    model.calibration = Calibration(0.4, prior=prior)
    found = model.search(model.read(batch))
    expected = ((exact.scores.double() - torch.tensor(prior, dtype=torch.float64)) / 0.4).softmax(1)
    ours = model.calibration.log_probabilities(found.scores).exp()
    assert ((ours - expected).abs().max(1).values <= found.unexplored + 1e-6).all() and (found.unexplored <= 1e-4).all()
    image = sorted((demo_run / "demo_images").iterdir())[0]
    result = predict_batch(model, processor, [image], metadata, explain=False)[str(image)]
    whole = predict_batch(model, processor, [image], metadata, explain=False, exhaustive=True)[str(image)]
    for name, probability in result["probabilities"].items():
        assert probability == pytest.approx(whole["probabilities"][name], abs=result["error_bound"] + 1e-6)


def test_the_choice_stands_in_the_results_and_in_the_calibration(classifier, monkeypatch):
    scores, labels = drawn(classifier, "prior")
    monkeypatch.setattr(calibrating, "score_parts", lambda *_, **__: Parts(scores, None))
    validation = type("Validation", (), {"labels": labels, "readable": list(range(len(labels)))})
    settings = resolve({"target_precision": 0.5})
    try:
        result = calibrate(classifier, validation, settings)
        assert (
            result["score"] == classifier.calibration.score == "prior"
            and result["scores"]["prior"]["nll"] < result["scores"]["sum"]["nll"]
        )
        assert result["temperature"] == result["scores"]["prior"]["temperature"]
        assert result["abstention"]["validation"]["accuracy"] >= 0.5
    finally:
        classifier.calibration = Calibration()

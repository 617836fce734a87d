"""Honest probabilities: what is taken as the score of a class; a temperature, and a bias per class where asked for,
fitted on validation data; and the confidence below which there is no answer. All belong to one conversation and one
list of classes, and are stored with a key.

N = images, C = classes. The sums (N, C) are log-probabilities of the responses, as `vlm/evaluation/evaluate.py` gives
them.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from vlm.common.progress import note
from vlm.conversation.prompts import Prompts

MIN_IMAGES = 20  # below, a temperature would say more about these images than about the model
COLDEST, HOTTEST = 0.01, 100.0  # bounds of the temperature
LOWEST_SCORE = -1e4  # relative to the best class; a class that is impossible counts as this


class Scores(NamedTuple):
    """What a model says of N images. sums: (N, C) log-probability of each class's scored text (see
    vlm/conversation/responses.py). openings: (N,) that of the tokens which all scored texts begin with, a part of each
    sum."""

    sums: Tensor
    openings: Tensor


@dataclass(frozen=True)
class Calibration:
    """What turns scores into probabilities: softmax of scores / temperature + bias.

    A score is the sum of a class, or one of two others. lengths: the tokens of each class's scored text behind the
    opening; the score is the mean over them. prior: the sums of the same conversation without an image, which are
    subtracted. bias: one number a class, or None. abstain_below: a prediction whose probability is smaller is none.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None
    abstain_below: float | None = None
    lengths: tuple[int, ...] | None = None
    prior: tuple[float, ...] | None = None

    @property
    def score(self) -> str:
        """What is taken as a score: sum, mean or prior."""
        return "mean" if self.lengths is not None else "prior" if self.prior is not None else "sum"

    def scores(self, sums: Tensor, openings: Tensor | None = None) -> Tensor:
        """(N, C) what is divided by the temperature, on the CPU, in float64. What is given: see `Scores`; only a mean
        needs the openings.

        The opening cancels in sum and prior, but would dilute a mean, and differently for each length: it is in neither
        of its two parts.
        """
        scores = sums.detach().cpu().double()
        if self.lengths is not None:
            return (scores - openings.detach().cpu().double().unsqueeze(-1)) / scores.new_tensor(self.lengths)
        return scores if self.prior is None else scores - scores.new_tensor(self.prior)

    def log_probabilities(self, sums: Tensor, openings: Tensor | None = None) -> Tensor:
        """(N, C) log-probabilities, in float64 on the CPU: so the temperature makes no two classes equal by rounding.
        Given: `Scores`."""
        scaled = self.scores(sums, openings) / self.temperature
        if self.bias is not None:
            scaled = scaled + scaled.new_tensor(self.bias)
        return scaled.log_softmax(-1)

    @property
    def is_temperature(self) -> bool:
        """Whether the sums are divided by a temperature, and no more."""
        return self.score == "sum" and self.bias is None

    def weighting(self) -> tuple[np.ndarray, np.ndarray]:
        """What a search compares classes by: sums behind the opening are divided by the first, and the second is added;
        one number or (C,).

        A temperature alone is taken as 1 at least, so that the sums are as exact without it. What is left out of the
        search with the larger
        one is left out rightly: the true weights are the a-th power, a > 1, of those there, which makes a small share
        of the total smaller, as long as there are fewer classes than 1 / tolerance.
        """
        if self.is_temperature:
            return np.array(max(1.0, self.temperature)), np.array(0.0)
        temperature = self.temperature * np.array(self.lengths or 1.0)
        return temperature, np.array(self.bias or 0.0) - np.array(self.prior or 0.0) / self.temperature

    def abstains(self, confidence: float) -> bool:
        return self.abstain_below is not None and confidence < self.abstain_below

    def to_json(self, prompts: Prompts) -> dict[str, Any]:
        """What stands in `training_metadata.json`."""
        bias = None if self.bias is None else list(self.bias)
        kind = {
            name: None if values is None else list(values)
            for name, values in (("lengths", self.lengths), ("prior", self.prior))
        }
        fitted = {"temperature": self.temperature, "bias": bias, "abstain_below": self.abstain_below}
        return {"score": self.score, **kind, **fitted, "key": key_of(prompts)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], prompts: Prompts) -> "Calibration":
        """The calibration that is stored with a model, or none, with a note, where it does not belong to these texts
        and classes."""
        stored = metadata.get("calibration")
        if stored is None:
            return cls()
        if not _is_whole(stored, len(prompts.class_names)):
            note(
                "the calibration in training_metadata.json is damaged: the probabilities are the model's own (temperature 1)."
            )
            return cls()
        if stored.get("key") != key_of(prompts):
            note(
                "the calibration in training_metadata.json was fitted with other prompts or classes than stand there now: the "
                "probabilities are the model's own (temperature 1), and it abstains from nothing."
            )
            return cls()
        vectors = {
            name: None if stored.get(name) is None else tuple(stored[name]) for name in ("bias", "lengths", "prior")
        }
        return cls(float(stored["temperature"]), abstain_below=stored.get("abstain_below"), **vectors)


def key_of(prompts: Prompts) -> str:
    """Digest of everything that is said to the model and that it may answer."""
    text = json.dumps(prompts.to_json(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(stored: Any, classes: int) -> bool:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    if not isinstance(stored, dict) or not is_number(stored.get("temperature")) or stored["temperature"] <= 0:
        return False
    vectors = {
        name: stored[name] for name in ("bias", "lengths", "prior") if stored.get(name) is not None
    }  # older folders have no score
    if not all(
        isinstance(values, list) and len(values) == classes and all(map(is_number, values))
        for values in vectors.values()
    ):
        return False
    kinds = [name for name, key in (("mean", "lengths"), ("prior", "prior")) if key in vectors] or ["sum"]
    if kinds != [stored.get("score", "sum")] or min(vectors.get("lengths", [1])) < 1:
        return False
    threshold = stored.get("abstain_below")
    return threshold is None or is_number(threshold)


# Fitting


def fit_calibration(scores: Tensor, labels: Sequence[int], method: str) -> tuple[Calibration, list[str]]:
    """Fit a calibration to validation data by the mean negative log-likelihood (Guo et al. 2017, arXiv 1706.04599,
    section 4.2).

    Args:
        scores: (N, C); rows with NaN are left out. labels: (N,) class indices. method: temperature, bias or none.

    Returns:
        the calibration, and what people should know about it. With less than 20 images there is none (temperature 1).
    """
    if method == "none":
        return Calibration(), []
    remarks = []
    values, truth = scores.detach().cpu().double().numpy(), np.asarray(labels)
    broken = np.isnan(values).any(axis=1)
    if broken.any():
        remarks.append(
            f"{broken.sum()} of {len(broken)} validation images have NaN as a score and are left out of the calibration."
        )
        values, truth = values[~broken], truth[~broken]
    if len(truth) < MIN_IMAGES:
        remarks.append(
            f"{len(truth)} validation images are fewer than {MIN_IMAGES}: not calibrated, the temperature is 1."
        )
        return Calibration(), remarks
    values = np.maximum(values - values.max(axis=1, keepdims=True), LOWEST_SCORE)
    temperature, remark = fit_temperature(values, truth)
    remarks += [remark] if remark else []
    if method == "temperature":
        return Calibration(temperature), remarks
    if remark:  # biases beside it would go as far as they can, too
        return Calibration(temperature), [*remarks, "No biases are fitted beside a temperature that is bounded."]
    temperature, bias = fit_bias(values, truth, temperature)
    return Calibration(temperature, tuple(bias.tolist())), remarks


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> tuple[float, str | None]:
    """The temperature with the smallest mean NLL, between 0.01 and 100, and a remark where that is no inner minimum.

    The NLL is convex in 1 / temperature, so the root of its slope is the minimum. Where no image is wrong the slope has
    no root: the colder the better, without end. Then probabilities are sharpened at most until their mean confidence is
    (N + 1) / (N + 2), what Laplace's rule of succession expects of the next image after N right ones, and never
    flattened.

    Args:
        scores: (N, C) finite. labels: (N,).
    """
    rows = np.arange(len(labels))
    true_scores = scores[rows, labels]
    others = scores.copy()
    others[rows, labels] = -np.inf

    def slope(inverse: float) -> float:
        return float(((softmax(inverse * scores, axis=1) * scores).sum(axis=1) - true_scores).mean())

    def confidence(inverse: float) -> float:
        return float(softmax(inverse * scores, axis=1).max(axis=1).mean())

    if (true_scores > others.max(axis=1)).all():
        most = (len(labels) + 1) / (len(labels) + 2)
        inverse = 1.0
        if confidence(1.0) < most:
            coldest = 1 / COLDEST
            inverse = coldest if confidence(coldest) <= most else brentq(lambda x: confidence(x) - most, 1.0, coldest)
        return 1 / inverse, (
            f"no validation image is wrong, so that a fit would know no end: the temperature is bounded to {1 / inverse:.3g}, "
            f"where the mean confidence is {confidence(inverse):.4f}."
        )
    hottest, coldest = slope(1 / HOTTEST), slope(1 / COLDEST)
    if hottest >= 0:
        return HOTTEST, f"the scores say nothing about the class: the temperature is at its bound, {HOTTEST:g}."
    if coldest <= 0:
        return COLDEST, f"the temperature is at its bound, {COLDEST:g}."
    return 1 / brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12, rtol=1e-10), None


def fit_bias(scores: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """Temperature and (C,) biases with the smallest NLL, under normal priors of width 1: on each bias, and on the
    change of 1 / temperature relative to the given one. So a class with few images keeps a bias near 0, and nothing
    grows without end.

    Unlike a temperature, biases may change which class is the most probable.
    """
    count, classes = scores.shape
    scaled = scores / temperature
    truth = np.zeros_like(scaled)
    truth[np.arange(count), labels] = 1

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        logits = (1 + parameters[0]) * scaled + parameters[1:]
        error = softmax(logits, axis=1) - truth
        value = (logsumexp(logits, axis=1) - (logits * truth).sum(axis=1)).mean() + (parameters**2).sum() / (2 * count)
        gradient = np.concatenate([[(error * scaled).sum()], error.sum(axis=0)]) / count
        return value, gradient + parameters / count

    bounds = [(-0.99, None)] + [(None, None)] * classes
    found = minimize(
        objective,
        np.zeros(1 + classes),
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 500, "gtol": 1e-8},
    )
    return float(temperature / (1 + found.x[0])), found.x[1:]


# Abstaining


def coverage_and_accuracy(confidence: np.ndarray, correct: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Share of the images that get an answer, and the share of right ones among these (None where there are none)."""
    kept = confidence >= threshold
    return {"coverage": float(kept.mean()), "accuracy": float(correct[kept].mean()) if kept.any() else None}


def pick_threshold(confidence: np.ndarray, correct: np.ndarray, target: float) -> float | None:
    """The threshold that keeps the most images with a precision of at least `target` among the kept, or None where none
    does.

    Of the equal ones it is the middle between the last confidence kept and the next one, so that rounding does not move
    an image across; 0 where everything is kept.

    Args:
        confidence: (N,) probability of the prediction. correct: (N,) bool. target: 0 to 1.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, right = confidence[order], np.cumsum(correct[order])
    precision = right / np.arange(1, len(order) + 1)
    last_of_equals = np.append(sure[:-1] != sure[1:], True)
    good = np.flatnonzero((precision >= target) & last_of_equals)
    if not len(good):
        return None
    last = good[-1]
    return float((sure[last] + sure[last + 1]) / 2) if last + 1 < len(sure) else 0.0

"""Fitting a calibration to the validation split: temperature, biases, and the threshold below which there is no answer.

N = images, C = classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

from vlm.classifier import Calibration

MIN_IMAGES = 20  # with fewer, a temperature would say more about these images than about the model
COLDEST, HOTTEST = 0.01, 100.0  # bounds of the temperature
SHARES = np.linspace(0.05, 0.95, 19)  # of the text in the evidence of both
PRIOR_WIDTH = 2.0  # of log(r / (1 - r)), r that share
LOWEST_SCORE = -1e4  # relative to the best class; an impossible class counts as this


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
            f"{broken.sum()} of {len(broken)} validation images have NaN as a score and are left out of the "
            "calibration."
        )
        values, truth = values[~broken], truth[~broken]
    if len(truth) < MIN_IMAGES:
        remarks.append(
            f"{len(truth)} validation images are fewer than {MIN_IMAGES}: not calibrated, the temperature is 1."
        )
        return Calibration(), remarks
    values = _from_the_top(values)
    temperature, remark = fit_temperature(values, truth)
    remarks += [remark] if remark else []
    if method == "temperature":
        return Calibration(temperature), remarks
    if remark:  # biases would have no optimum either
        return Calibration(temperature), [*remarks, "No biases are fitted next to a temperature that is bounded."]
    temperature, bias = fit_bias(values, truth, temperature)
    return Calibration(temperature, tuple(bias.tolist())), remarks


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> tuple[float, str | None]:
    """The temperature with the smallest mean NLL, between 0.01 and 100.

    The NLL is convex in 1 / temperature, so the root of its slope is the minimum. If validation has no mistakes, the
    slope has no root: a lower temperature is always better. So probabilities are sharpened only until their mean
    confidence is (N + 1) / (N + 2), which Laplace's rule of succession expects of the next image after N right ones,
    and they are never flattened.

    Args:
        scores: (N, C) finite. labels: (N,).

    Returns:
        the temperature, and a remark if the minimum is not inside the bounds.
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
            "validation has no mistakes, so the fit has no optimum: the temperature is bounded to "
            f"{1 / inverse:.3g}, with a mean confidence of {confidence(inverse):.4f}."
        )
    hottest, coldest = slope(1 / HOTTEST), slope(1 / COLDEST)
    if hottest >= 0:
        return HOTTEST, f"the scores say nothing about the class: the temperature is at its bound, {HOTTEST:g}."
    if coldest <= 0:
        return COLDEST, f"the temperature is at its bound, {COLDEST:g}."
    return 1 / brentq(slope, 1 / HOTTEST, 1 / COLDEST, xtol=1e-12, rtol=1e-10), None


def fit_bias(scores: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """Temperature and (C,) biases with the smallest NLL.

    Normal priors of width 1 are on each bias and on the relative change of 1 / temperature, so that a class with few
    images keeps a bias near 0 and nothing grows without bound. Unlike a temperature, biases may change which class is
    the most probable.
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


def fit_evidence(
    text: Calibration, sums: Tensor, evidence: Tensor, labels: Sequence[int], method: str
) -> dict[str, Calibration]:
    """Calibrations that count the evidence of the head: alone, and added to the text.

    Both are brought to their own temperatures first. Of the mixtures r * text + (1 - r) * head that one is taken whose
    NLL, with a temperature of its own, is the smallest. A normal prior of width 2 is on log(r / (1 - r)), worth one
    image, so that few images do not throw one of both away.

    Args:
        text: fitted to the sums. sums, evidence: (N, C), finite. labels: (N,). method: temperature or bias.

    Returns:
        the calibrations named head and both.
    """
    truth = np.asarray(labels)
    spoken = _from_the_top(text.log_probabilities(sums).numpy())
    seen = _from_the_top(evidence.double().numpy())
    alone, _ = fit_temperature(seen, truth)
    found = []
    for share in SHARES:
        mixed = share * spoken + (1 - share) * seen / alone
        temperature, _ = fit_temperature(mixed, truth)
        scaled = mixed / temperature
        nll = (logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]).mean()
        found.append((nll + np.log(share / (1 - share)) ** 2 / (2 * PRIOR_WIDTH**2 * len(truth)), share, temperature))
    _, share, temperature = min(found)
    # r * (sum / T + bias) + (1 - r) * head / A, divided by its temperature t, is, but for the bias,
    # (sum + (1 - r) T / (r A) * head) / (T t / r)
    both = Calibration(
        text.temperature * temperature / share,
        None if text.bias is None else tuple((np.array(text.bias) * share / temperature).tolist()),
        prior=text.prior,
        evidence=(1 - share) * text.temperature / (share * alone),
    )
    fitted = {"head": Calibration(alone, evidence=1.0, text=False), "both": both}
    if method == "bias":
        for name, one in fitted.items():
            again, _ = fit_calibration(one.scores(one.with_evidence(sums, evidence)), labels, method)
            fitted[name] = replace(one, temperature=again.temperature, bias=again.bias)
    return fitted


def _from_the_top(scores: np.ndarray) -> np.ndarray:
    """(N, C) relative to the best class of each image, none below `LOWEST_SCORE`."""
    return np.maximum(scores - scores.max(axis=1, keepdims=True), LOWEST_SCORE)


def coverage_and_accuracy(confidence: np.ndarray, correct: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Share of the images that get an answer, and the share of right ones among these (None if there are none)."""
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

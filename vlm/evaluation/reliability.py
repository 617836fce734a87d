"""How far the probabilities can be trusted: accuracy, NLL, Brier score and calibration error, each with an interval.
NumPy only.

N = images, C = classes, R = resamples.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import binomtest

from vlm.evaluation.metrics import SMALLEST_LOG_PROBABILITY

BINS = 15
RESAMPLES = 1000
LEVEL = 0.95  # of the intervals
ELEMENTS_AT_ONCE = 2**21  # of one block of resamples

Interval = list[float]  # value, lower end, upper end


def confidence_and_correctness(log_probabilities: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) probability of the most probable class, and (N,) bool whether that is the true one."""
    return np.exp(log_probabilities.max(axis=1)), log_probabilities.argmax(axis=1) == np.asarray(labels)


def reliability_figures(
    log_probabilities: np.ndarray, labels: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Figures with their 95% intervals: Wilson's for the accuracy, the others by the bootstrap over images (Efron &
    Tibshirani 1993).

    A bootstrap interval of a share near 1 is too narrow (that of 0.98 of 269 images is a 90% one), and that of a share
    of 1 has no width. Those of NLL and Brier score are percentile ones. That of the ECE is the basic one (Davison &
    Hinkley 1997, section 5.2), cut at 0 and 1: a resample holds images several times, which adds to its ECE, so that a
    percentile interval would lie too high. It is widened to the value if that would lie outside.

    Args:
        log_probabilities: (N, C) finite or -inf, each row sums to 1 after exp.
        labels: (N,) class indices.

    Returns:
        accuracy; nll (nats an image); brier (squared distance of the probabilities from the truth, summed over the
        classes, 0 to 2: Brier 1950); ece (see `calibration_error`). The same seed and N give the same resamples.
    """
    confidence, correct = confidence_and_correctness(log_probabilities, labels)
    # (N, C) -> (N,): the log-probability of the true class
    truth = log_probabilities[np.arange(len(labels)), np.asarray(labels)]
    squares = (np.exp(log_probabilities) ** 2).sum(axis=1)
    # (N, 2): NLL and Brier score of each image
    values = np.stack([-np.maximum(truth, SMALLEST_LOG_PROBABILITY), squares - 2 * np.exp(truth) + 1], axis=1)
    order = _by_confidence(confidence)
    gaps, rank = (confidence - correct)[order], np.argsort(order)
    means, errors = [], []
    for drawn in _resamples(len(labels), resamples, seed):  # (rows, N)
        # (rows, N) -> (rows, 2) means, and (rows,) calibration errors
        means.append(np.stack([column[drawn].mean(axis=1) for column in values.T], axis=1))
        errors.append(_binned_error(gaps[np.sort(rank[drawn], axis=1)]))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail], axis=0)
    nll, brier = ([float(values[:, i].mean()), float(low[i]), float(high[i])] for i in range(2))
    ece = float(_binned_error(gaps[None])[0])
    below, above = np.quantile(np.concatenate(errors), [tail, 1 - tail])
    interval = [ece, max(0.0, min(ece, float(2 * ece - above))), min(1.0, max(ece, float(2 * ece - below)))]
    return {"accuracy": accuracy_interval(correct), "nll": nll, "brier": brier, "ece": interval}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal mass (Nixon et al. 2019, arXiv 1904.01685): sorted by
    confidence, the images are cut into bins of as equal a count as possible; the distance of mean confidence and
    accuracy, weighted by the count.

    Bins of equal width (Guo et al. 2017) would leave nearly all images of a good model in the last one.
    """
    order = _by_confidence(confidence)
    return float(_binned_error((confidence - correct)[order][None])[0])


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> list[list[float]]:
    """[mean confidence, accuracy, images] of each of the bins of `calibration_error`, from the least confident on."""
    order = _by_confidence(confidence)
    return [
        [float(confidence[part].mean()), float(correct[part].mean()), len(part)]
        for part in np.split(order, _starts(len(order))[1:])
    ]


def accuracy_interval(correct: np.ndarray) -> Interval:
    """Accuracy with its 95% interval by Wilson (1927), from (N,) bool. The interval is right for few images and near 0
    and 1, too."""
    found = binomtest(int(correct.sum()), len(correct)).proportion_ci(LEVEL, method="wilson")
    return [float(correct.mean()), float(found.low), float(found.high)]


def may_be_chance(better: np.ndarray, other: np.ndarray) -> bool:
    """Whether `better` is not ahead of `other`, or not by what the exact test of McNemar (1947) at 5% tells from
    chance.

    Args:
        better, other: (N,) bool, which of the same images each has right.
    """
    gained, lost = int((better & ~other).sum()), int((other & ~better).sum())
    return gained <= lost or bool(binomtest(gained, gained + lost).pvalue > 1 - LEVEL)


def _resamples(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(rows, N) images drawn with repetition, `resamples` rows in blocks of bounded size."""
    rng = np.random.default_rng(seed)
    rows = max(1, ELEMENTS_AT_ONCE // count)
    for start in range(0, resamples, rows):
        yield rng.integers(0, count, (min(rows, resamples - start), count), dtype=np.int32)


def _by_confidence(confidence: np.ndarray) -> np.ndarray:
    """(N,) positions from the least confident image on. Equal ones are mixed: a split is often sorted by class, and
    bins of images that are all right, or all wrong, would make an error that is none."""
    mixed = np.random.default_rng(0).permutation(len(confidence))
    return mixed[np.argsort(confidence[mixed], kind="stable")]


def _starts(count: int) -> np.ndarray:
    """Position at which each bin begins among so many sorted images; of fewer than 15, each has its own bin."""
    bins = min(BINS, count)
    return np.arange(bins) * count // bins


def _binned_error(gaps: np.ndarray) -> np.ndarray:
    """(R, N) confidence minus correctness, sorted by confidence -> (R,) calibration errors."""
    return np.abs(np.add.reduceat(gaps, _starts(gaps.shape[1]), axis=1)).sum(axis=1) / gaps.shape[1]

"""Fitting the head: which block of the vision encoder, which statistics and which strength of regularization tell the
classes best is found by cross-validation on the images that it is fitted to.

N = images, L = blocks, S = statistics, W = width of a block, F = features, C = classes.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from vlm.classifier import Head, features
from vlm.common import Bar, evaluation_mode
from vlm.data import Sample, Split, balanced_positions
from vlm.families import STATISTICS, Family, FeatureCache, NoVectors, encode, vectors_of

BATCH_SIZE = 16
SEARCHED = 2000  # images of the cross-validation, whose vectors of all blocks are held in memory
MOST_VALUES = 4e8  # images x features x classes of the last fit: minutes on one core
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C, from strong regularization to weak
FIRST_STRENGTH = 0.01  # at which blocks and statistics are compared
BEST_LAYERS = 3  # of which all statistics are tried
FOLDS, LEAST_IMAGES = 4, 2  # images that a class needs to be in two folds
ITERATIONS = 300
LEAST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class FittedHead:
    """A head and how it was found.

    Attributes:
        strength: scikit-learn's C. nll, accuracy: of the cross-validation, in nats and 0 to 1.
        layers: how many blocks the encoder has. seconds: it took.
        positions, held_out: the images that it is fitted to, and (N, C) their probabilities by fits to the others; NaN
            where a class has one image.
    """

    head: Head
    strength: float
    nll: float
    accuracy: float
    layers: int
    seconds: float
    positions: list[int]
    held_out: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """What `results.json` says about it. The block is counted from 1."""
        return {
            "layer": self.head.layer + 1,
            "layers": self.layers,
            "statistics": list(self.head.statistics),
            "C": self.strength,
            "features": self.head.weight.shape[1],
            "cross_validation": {"nll": self.nll, "accuracy": self.accuracy},
        }


def fit_head(
    family: Family, train: Split, classes: Sequence[str], cache: FeatureCache | None = None, seed: int = 0
) -> FittedHead:
    """Fit a multinomial logistic regression on standardized vectors of the best block.

    Blocks are compared with all statistics, the statistics with the best blocks, the strengths with the best of these,
    all by the negative log-likelihood of images that the fit has not seen.

    Args:
        train: the images; those that cannot be read are left out.
        cache: features of the same vision encoder, used for the images that are in it.
        seed: of the folds, and of the choice of images if there are very many.

    Raises:
        NoVectors: the vision encoder has no vectors of its images, or these are of one class.
    """
    started = time.monotonic()
    chosen = balanced_positions(train.labels, min(len(train), SEARCHED), [seed, 5])
    vectors, kept = vectors_of_split(family, train, chosen, cache)
    labels = np.array(train.labels)[kept]
    if len(set(labels.tolist())) < 2:
        raise NoVectors("train has images of one class only")
    search = _Search(torch.from_numpy(vectors), labels, seed)
    layer, statistics, strength, (nll, accuracy) = search.best()
    size = len(statistics) * vectors.shape[-1]
    most = max(len(chosen), min(len(train), int(MOST_VALUES / size / len(classes))))
    if most > len(chosen):
        more = sorted(set(balanced_positions(train.labels, most, [seed, 6])) - set(chosen))
        others, also_kept = vectors_of_split(family, train, more, cache, layer)
        own, kept = np.concatenate([vectors[:, layer], others]), [*kept, *also_kept]
    else:
        own = vectors[:, layer]
    inputs, labels = features(torch.from_numpy(own), statistics).float().numpy(), np.array(train.labels)[kept]
    with threadpool_limits(1):
        model = _fitted(inputs, labels, strength)
        held_out = np.full((len(labels), len(classes)), np.nan)
        for fitted_to, others in _folds(labels, seed):
            one = _fitted(inputs[fitted_to], labels[fitted_to], strength)
            held_out[np.ix_(others, one.classes_)] = one.predict_proba(inputs[others])
    held_out[np.isnan(held_out) & ~np.isnan(held_out).all(1, keepdims=True)] = 0.0  # classes that no fold has
    head, seconds = _head_of(model, layer, statistics, classes), time.monotonic() - started
    return FittedHead(head, strength, nll, accuracy, vectors.shape[1], seconds, list(kept), held_out)


def _folds(labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(images to fit to, images held out) of each fold, without the classes that have too few images for two folds."""
    counts = np.bincount(labels)
    enough = np.flatnonzero(counts[labels] >= LEAST_IMAGES)
    if len(set(labels[enough].tolist())) < 2:
        return []
    folds = min(FOLDS, counts[counts >= LEAST_IMAGES].min())
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [(enough[a], enough[b]) for a, b in splitter.split(enough, labels[enough])]


class _Search:
    """The cross-validation. On one thread: the solver takes hundreds of small steps, and threads that wait for each
    other at each take many times longer when anything else runs."""

    def __init__(self, vectors: torch.Tensor, labels: np.ndarray, seed: int) -> None:
        self.vectors, self.labels = vectors, labels
        self.folds = _folds(labels, seed)

    def best(self) -> tuple[int, tuple[str, ...], float, tuple[float, float]]:
        """The block, the statistics, the strength, and (NLL, accuracy)."""
        layers, count = self.vectors.shape[1:3]
        every = STATISTICS[:count]
        fewer = [every[:n] for n in range(count - 1, 0, -1)]
        tried: dict[tuple[int, tuple[str, ...], float], tuple[float, float]] = {}
        total = layers + BEST_LAYERS * len(fewer) + len(STRENGTHS) - 1
        with Bar(total, "choosing the head's features", "fits") as bar, threadpool_limits(1):

            def attempt(layer: int, statistics: tuple[str, ...], strength: float) -> None:
                tried[layer, statistics, strength] = self._judge(layer, statistics, strength)
                bar.update()

            for layer in range(layers):
                attempt(layer, every, FIRST_STRENGTH)
            for layer, _, _ in sorted(tried, key=lambda key: tried[key][0])[:BEST_LAYERS]:
                for statistics in fewer:
                    attempt(layer, statistics, FIRST_STRENGTH)
            layer, statistics, _ = min(tried, key=lambda key: tried[key][0])
            for strength in STRENGTHS:
                if strength != FIRST_STRENGTH:
                    attempt(layer, statistics, strength)
        best = min(tried, key=lambda key: tried[key][0])
        return *best, tried[best]

    def _judge(self, layer: int, statistics: tuple[str, ...], strength: float) -> tuple[float, float]:
        """NLL and accuracy of the images of each fold, by a fit to those of the others."""
        if not self.folds:
            return 0.0, 1.0
        inputs = features(self.vectors[:, layer], statistics).float().numpy()
        losses, right = [], []
        for train, held_out in self.folds:
            model = _fitted(inputs[train], self.labels[train], strength)
            found = model.predict_proba(inputs[held_out])
            columns = np.searchsorted(model.classes_, self.labels[held_out])  # each class is in each fold
            losses.append(-np.log(np.maximum(found[np.arange(len(held_out)), columns], LEAST_PROBABILITY)))
            right.append(found.argmax(1) == columns)
        return float(np.concatenate(losses).mean()), float(np.concatenate(right).mean())


def _fitted(inputs: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS, tol=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rest does not change which images are right
        return model.fit(inputs, labels)


def _head_of(model: Pipeline, layer: int, statistics: tuple[str, ...], classes: Sequence[str]) -> Head:
    """A fit as one linear map: the scaling is part of the weights. A class without images never wins."""
    scaler, regression = model[0], model[1]
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # of two classes scikit-learn keeps the second one's
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    whole = np.zeros((len(classes), weight.shape[1]))
    offsets = np.full(len(classes), bias.min() - 100.0)
    whole[regression.classes_] = weight / scaler.scale_
    offsets[regression.classes_] = bias - (weight / scaler.scale_) @ scaler.mean_
    return Head(layer, statistics, torch.from_numpy(whole), torch.from_numpy(offsets), tuple(classes))


def vectors_of_split(
    family: Family,
    split: Split,
    positions: Sequence[int],
    cache: FeatureCache | None,
    layer: int | None = None,
) -> tuple[np.ndarray, list[int]]:
    """The vectors of some images.

    Args:
        layer: only those of this block.

    Returns:
        (N, L, S, W), or (N, S, W) of one block, float16: they are rounded to it anyway.
        the positions of these images: those that can be read.

    Raises:
        NoVectors: there are none.
    """
    kept = [i for i in positions if i not in split.faults]
    parts = []
    with evaluation_mode(family.model), Bar(len(kept), "features of the head") as bar:
        for start in range(0, len(kept), BATCH_SIZE):
            samples = [split[i] for i in kept[start : start + BATCH_SIZE]]
            parts.append(image_vectors(family, samples, cache, slice(None) if layer is None else layer))
            bar.update(len(samples))
    return np.concatenate(parts), kept


def image_vectors(
    family: Family, samples: list[Sample], cache: FeatureCache | None = None, layer: int | slice = slice(None)
) -> np.ndarray:
    """(N, L, S, W), or (N, S, W) of one block, float16. The family is in evaluation mode. Raises NoVectors."""
    if not family.can_cache and len(samples) > 1:  # its features of several images are not those of each
        return np.concatenate([image_vectors(family, [sample], cache, layer) for sample in samples])
    encoded = encode(samples, family, cache, layer)
    if encoded.cached is not None and all(encoded.cached):
        assert encoded.vectors is not None
        return encoded.vectors.half().numpy()
    if encoded.cached is not None:
        encoded = encode(samples, family)
    tokens = [ids.count(family.image_token_id) for ids in encoded.token_ids]
    return vectors_of(family, encoded.inputs, family.shares(encoded.inputs, tokens))[:, layer].half().numpy()

"""The probe: a linear classifier on the vision encoder's features, which tells if the VLM is worth its cost.

B = images, N = images of a split, W = width of the features.
"""

import time
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from vlm.common import Bar, evaluation_mode, is_out_of_memory, note
from vlm.data import Data, Sample, Split
from vlm.evaluation.reliability import accuracy_interval, may_be_chance
from vlm.families import Family, FeatureCache, encode

BATCH_SIZE = 16
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # scikit-learn's C, from strong regularization to weak
ITERATIONS = 300
WORSE = 0.02  # accuracy by which the VLM may be below without a warning


def probe(family: Family, data: Data, cache: FeatureCache | None = None) -> tuple[dict[str, Any], np.ndarray] | None:
    """Fit a logistic regression on standardized, mean-pooled features, on the same splits.

    The strength of the regularization is chosen by the accuracy on validation, the stronger of equal ones.

    Args:
        family: the model whose vision encoder is probed.
        cache: features of the same vision encoder, used for the images that are in it.

    Returns:
        None, with a note, if the vision encoder has no features of its own; else
        figures: accuracy on test, with its 95% interval; validation_accuracy; C, as chosen; features of an image;
            seconds.
        correct: (N,) bool, which test images are right.
    """
    started = time.monotonic()
    with evaluation_mode(family.model):
        try:
            pooled_features(family, [data.train[0]], cache)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            note(f"no probe: this model's vision encoder has no features of its own ({type(error).__name__}).")
            return None
        splits = (data.train, data.validation, data.test)
        with Bar(sum(map(len, splits)), "features of the probe") as bar:
            train, validation, test = (_features_of(family, split, cache, bar) for split in splits)
    strength, model, best_accuracy = _fit(train, data.train.labels, validation, data.validation.labels)
    correct = model.predict(test) == np.array(data.test.labels)
    found = {
        "accuracy": accuracy_interval(correct),
        "validation_accuracy": best_accuracy,
        "C": strength,
        "features": train.shape[1],
        "seconds": round(time.monotonic() - started, 2),
    }
    return found, correct


def _fit(
    train: np.ndarray, labels: list[int], validation: np.ndarray, truth: list[int]
) -> tuple[float, Pipeline, float]:
    """The best C, the classifier fitted with it, and its accuracy on validation.

    On one thread: the solver takes hundreds of small steps, and threads that wait for each other at each take many
    times longer when anything else runs (1,009 rows of 768 random numbers in 16 classes, on 2 busy cores: more than 50
    s with 2 threads, 4 s with one).
    """
    found = []
    with Bar(len(STRENGTHS), "fitting the probe", "fits") as bar, threadpool_limits(1):
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=ITERATIONS))
            with warnings.catch_warnings():
                # After so many iterations the rest does not change which images are right.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train, labels)
            found.append((strength, model, float((model.predict(validation) == truth).mean())))
            bar.update()
    return max(found, key=lambda each: each[2])  # the first, and so the stronger, of equal ones


@torch.no_grad()
def pooled_features(family: Family, samples: list[Sample], cache: FeatureCache | None = None) -> np.ndarray:
    """(B, W) float32: the mean of the encoder's features over all patches, or tiles and patches, of each image.

    Images that take equally many go through the encoder together; others one by one, so that none gets a share of its
    neighbor.
    """
    encoded = [_encode(family, sample, cache) for sample in samples]
    shapes = [{name: tensor.shape for name, tensor in inputs.items()} for inputs in encoded]
    together = family.can_cache and all(shape == shapes[0] for shape in shapes)
    pooled = []
    for group in [encoded] if together else [[inputs] for inputs in encoded]:
        hidden = family.encoder_features(
            {name: torch.cat([inputs[name] for inputs in group]).to(family.device) for name in group[0]}
        )
        pooled.append(hidden.float().reshape(len(group), -1, hidden.shape[-1]).mean(1).cpu())
    return torch.cat(pooled).numpy()


def _encode(family: Family, sample: Sample, cache: FeatureCache | None) -> dict[str, torch.Tensor]:
    return encode([sample], family, None if cache is None or cache.connected else cache).inputs


def _features_of(family: Family, split: Split, cache: FeatureCache | None, bar: Bar) -> np.ndarray:
    parts = []
    for start in range(0, len(split), BATCH_SIZE):
        samples = [split[i] for i in range(start, min(start + BATCH_SIZE, len(split)))]
        parts.append(pooled_features(family, samples, cache))
        bar.update(len(samples))
    return np.concatenate(parts)


def compare(theirs: np.ndarray, ours: np.ndarray) -> str | None:
    """A warning if the VLM is more than 2 points of test accuracy below the probe, and whether that may be chance.

    Args:
        theirs, ours: (N,) bool, which images are right by the probe and by the VLM.
    """
    ahead = theirs.mean() - ours.mean()
    if ahead <= WORSE + 1e-9:
        return None
    if may_be_chance(theirs, ours):
        return (
            f"the probe is {100 * ahead:.1f} points ahead, which may be chance: {len(ours)} test images are too few "
            "to tell."
        )
    return (
        f"the probe is {100 * ahead:.1f} points ahead: a linear classifier on only the vision features does better "
        "than the VLM. Train longer, try another --learning-rate or --tune, or use that classifier."
    )

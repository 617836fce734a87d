"""Does the image matter? A few test images again, with the image of another class, and with a gray one.

N = images, C = classes.
"""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlm.classifier import VLMClassifier
from vlm.data import Sample, Split, balanced_positions
from vlm.evaluation.evaluate import score_split
from vlm.evaluation.reliability import may_be_chance

IMAGES = 64
GRAY = (128, 128, 128)


def check_images(
    classifier: VLMClassifier, split: Split, sums: Tensor, batch_size: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Accuracy on at most 64 images, of the classes in turn: as they are, exchanged, and gray.

    All samples have the same texts, so the prediction for an image under another label is known already: the exchange
    takes no forward pass. A gray image is scored once for each size that occurs.

    Args:
        sums: (all images of the split, C), as from `score_split`.

    Returns:
        pictures: how many images.
        accuracy: with their own images.
        shuffled: with the image of a sample of another class, far below chance in a good model; None with one class.
        gray: with gray images.
        chance: what the same answer to all could reach.
        warning: a sentence if the accuracy cannot be told from one of these two (see `may_be_chance`), else None.
    """
    chosen = np.array(balanced_positions(split.labels, IMAGES, [seed, 3]))
    labels = np.array(split.labels)[chosen]
    predictions = classifier.calibration.log_probabilities(sums).argmax(1).numpy()[chosen]
    right = predictions == labels
    partners = other_class_partners(labels, np.random.default_rng([seed, 4]))
    exchanged = labels[partners] != labels
    gray = gray_predictions(classifier, [split[i].image.size for i in chosen], batch_size) == labels
    shuffled = predictions[partners] == labels
    result: dict[str, Any] = {
        "pictures": len(chosen),
        "accuracy": float(right.mean()),
        "shuffled": float(shuffled[exchanged].mean()) if exchanged.any() else None,
        "gray": float(gray.mean()),
        "chance": float(np.bincount(labels).max() / len(labels)),
        "warning": None,
    }
    close = [
        name
        for name, other, used in (("exchanged", shuffled, exchanged), ("gray", gray, np.ones_like(right)))
        if used.any() and may_be_chance(right[used], other[used])
    ]
    if may_be_chance(np.ones_like(right), np.zeros_like(right)):
        images = f"{len(chosen)} test image{'s are' if len(chosen) > 1 else ' is'}"
        result["warning"] = f"{images} too few to show whether the image matters, even if all are right."
    elif close:
        result["warning"] = (
            f"nothing shows that the image matters: of {len(chosen)} test images {result['accuracy']:.0%} are right, "
            f"which cannot be told from the accuracy with {' and with '.join(close)} images "
            f"({', '.join(_percent(result, name) for name in close)})."
        )
    return result


def other_class_partners(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) for each sample another one, at random, each used once.

    It is of another class, unless one class has more than half of all samples.
    """
    classes, numbers = np.unique(labels, return_inverse=True)
    order = rng.permutation(len(labels))
    order = order[np.argsort(rng.permutation(len(classes))[numbers][order], kind="stable")]
    largest = np.bincount(numbers).max()
    # In this order classes stand together: a shift past the largest class leads to another one, if none has a majority.
    shift = rng.integers(largest, max(largest, len(labels) - largest) + 1)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, -shift)
    return partners


def gray_predictions(classifier: VLMClassifier, sizes: list[tuple[int, int]], batch_size: int) -> np.ndarray:
    different = sorted(set(sizes))
    images = [Sample(Image.new("RGB", size, GRAY), 0, f"a gray image of {size[0]} x {size[1]}") for size in different]
    sums = score_split(classifier, images, batch_size, description="gray images")
    predictions = classifier.calibration.log_probabilities(sums).argmax(1).tolist()
    found = dict(zip(different, predictions, strict=True))
    return np.array([found[size] for size in sizes])


def _percent(result: dict[str, Any], name: str) -> str:
    return f"{result['shuffled' if name == 'exchanged' else name]:.0%}"

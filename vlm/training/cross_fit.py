"""Training images as a connector sees them that was not aligned on them.

Behind the connector that was aligned on all training images (vlm/training/alignment.py) these are clearer than images
of the other splits will ever be. A language model that is trained on them learns to be sure, and is wrong later. So the
training images are cut into five folds; for each a connector is aligned on the other four, and it alone turns the
fold's images into what the language model is trained on. Everything else goes through the connector of all images,
which is saved with the model. None is trained any further.

Predictors that feed others should be fitted on other data than theirs, as in stacked generalization (Wolpert 1992,
doi 10.1016/S0893-6080(05)80023-1). Figures: docs/experiments.md.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm.common.modes import evaluation_mode
from vlm.common.progress import note
from vlm.data.splits import Split
from vlm.families.base import Family
from vlm.families.features import IMAGES_AT_ONCE, FeatureCache
from vlm.training.alignment import BATCH_SIZE, STEPS, Autocast, align

FOLDS = 5

Weights = dict[str, Tensor]  # of a connector


def can_cross_fit(train: Split) -> bool:
    """Whether each fold has images of each class, and the alignment sees images again, without which it cannot know
    them.

    Args:
        train: knows the key of each of its images.
    """
    different = Counter(dict(zip(train.keys, train.labels, strict=True)).values())
    return min(different[label] for label in set(train.labels)) >= FOLDS and len(train) < STEPS * BATCH_SIZE


def weights_for_folds(connector: nn.Module, train: Split) -> list[Weights]:
    """The weights of a connector for each fold, to be aligned; none where the images do not allow it, with a note."""
    if can_cross_fit(train):
        return [_copy(connector) for _ in range(FOLDS)]
    note(
        f"LoRA is trained on images that the connector was aligned on: cross-fitting takes {FOLDS} different images of each class, and "
        f"fewer than {STEPS * BATCH_SIZE:,} in all."
    )
    return []


def _copy(connector: nn.Module) -> Weights:
    return {name: weight.clone() for name, weight in connector.state_dict().items()}


def folds_of(split: Split, seed: int) -> dict[str, int]:
    """The fold of each image, by its key: at random, of each class as many in each fold. Equal images share one."""
    folds: dict[str, int] = {}
    of_class: Counter[int] = Counter()
    for i in torch.randperm(len(split), generator=torch.Generator().manual_seed(seed)).tolist():
        if split.keys[i] not in folds:
            folds[split.keys[i]] = of_class[split.labels[i]] % FOLDS
            of_class[split.labels[i]] += 1
    return folds


def align_folds(
    family: Family,
    class_names: Sequence[str],
    train: Split,
    cache: FeatureCache,
    connectors: Sequence[Weights],
    seed: int = 0,
    autocast: Autocast = nullcontext,
) -> None:
    """Align a connector for each fold on the images of the others.

    Args:
        connectors: for each fold those of the family's connector, which stays as it is.
    """
    folds = folds_of(train, seed)
    for k, connector in enumerate(connectors):
        others = train.take([i for i, key in enumerate(train.keys) if folds[key] != k])
        with connector_of(family, connector):
            align(
                family,
                class_names,
                others,
                cache,
                seed,
                autocast,
                f"aligning the connector without fold {k + 1} of {FOLDS}",
            )
            for name, weight in family.connector.state_dict().items():
                connector[name].copy_(weight)  # in place: a saved state holds these very tensors


def out_of_fold_cache(
    family: Family,
    train: Split,
    cache: FeatureCache,
    connectors: Sequence[Weights],
    root: Path,
    seed: int = 0,
    autocast: Autocast = nullcontext,
) -> FeatureCache | None:
    """The features of the training images behind the connectors of their folds; None where they cannot be kept.

    Args:
        cache: the features before the connector. connectors, seed: those of `align_folds`. root: the folder that they
            are kept in.
    """
    found = FeatureCache(family, True, cache.halved, cache.limit_gb, connectors, root)
    folds = folds_of(train, seed)
    missing = sorted((fold, key) for key, fold in folds.items() if not found.use(key))
    left = len(missing)
    for k, connector in enumerate(connectors):
        keys = [key for fold, key in missing if fold == k]
        with evaluation_mode(family.model), connector_of(family, connector), autocast():
            for start in range(0, len(keys), IMAGES_AT_ONCE):
                images = {key: cache.encode([key]) for key in keys[start : start + IMAGES_AT_ONCE]}
                left -= len(images)
                if not found.add(family, {key: one for key, one in images.items() if one}, left):
                    return None
    return found


@contextmanager
def connector_of(family: Family, weights: Weights) -> Iterator[None]:
    """The family with the weights of another connector."""
    own = _copy(family.connector)
    family.connector.load_state_dict(weights)
    try:
        yield
    finally:
        family.connector.load_state_dict(own)

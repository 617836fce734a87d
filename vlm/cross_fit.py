"""Training pictures as a connector sees them that was not aligned on them.

Behind the connector that was aligned on all training pictures (vlm/alignment.py) these are clearer than pictures of the other splits will
ever be. A language model that is trained on them learns to be sure, and is wrong later. So the training pictures are cut into five folds;
for each a connector is aligned on the other four, and it alone turns the fold's pictures into what the language model is trained on.
Everything else goes through the connector of all pictures, which is saved with the model. None is trained any further.

Predictors that feed others should be fitted on other data than theirs, as in stacked generalization (Wolpert 1992,
doi 10.1016/S0893-6080(05)80023-1). Figures: docs/experiments.md.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from vlm.alignment import BATCH_SIZE, STEPS, Autocast, align
from vlm.data import Split
from vlm.evaluation_mode import evaluation_mode
from vlm.families.base import Family
from vlm.features import PICTURES_AT_ONCE, FeatureCache

FOLDS = 5


def can_cross_fit(labels: Sequence[int]) -> bool:
    """Whether each fold has pictures of each class, and the alignment sees pictures again, without which it cannot know them."""
    return min(Counter(labels).values(), default=0) >= FOLDS and len(labels) < STEPS * BATCH_SIZE


def copy_for_folds(connector: nn.Module, labels: Sequence[int]) -> nn.ModuleList:
    """A connector for each fold, to be aligned; none where the labels do not allow it."""
    return nn.ModuleList(copy.deepcopy(connector) for _ in range(FOLDS if can_cross_fit(labels) else 0))


def folds_of(split: Split, seed: int) -> dict[str, int]:
    """The fold of each picture, by its key: at random, of each class as many in each fold. Equal pictures share one."""
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
    connectors: nn.ModuleList,
    seed: int = 0,
    autocast: Autocast = nullcontext,
) -> None:
    """Align a connector for each fold on the pictures of the others.

    Args:
        connectors: as many as folds, equal to the family's, which stays as it is.
    """
    folds = folds_of(train, seed)
    for k, connector in enumerate(connectors):
        others = train.take([i for i, key in enumerate(train.keys) if folds[key] != k])
        with connector_of(family, connector):
            align(family, class_names, others, cache, seed, autocast, f"aligning the connector without fold {k + 1} of {FOLDS}")
            connector.load_state_dict(family.connector.state_dict())


def out_of_fold_cache(
    family: Family, train: Split, cache: FeatureCache, connectors: nn.ModuleList, seed: int = 0, autocast: Autocast = nullcontext
) -> FeatureCache | None:
    """The features of the training pictures behind the connectors of their folds; None where they cannot be kept.

    Args:
        cache: the features before the connector. connectors, seed: those of `align_folds`.
    """
    found = FeatureCache(family, True, cache.halved, cache.limit_gb, connectors)
    folds = folds_of(train, seed)
    missing = sorted((fold, key) for key, fold in folds.items() if not found.use(key))
    for k, connector in enumerate(connectors):
        keys = [key for fold, key in missing if fold == k]
        with evaluation_mode(family.model), connector_of(family, connector), autocast():
            for start in range(0, len(keys), PICTURES_AT_ONCE):
                pictures = {key: cache.encode([key]) for key in keys[start : start + PICTURES_AT_ONCE]}
                if not found.add(family, {key: one for key, one in pictures.items() if one}, len(keys) - start - len(pictures)):
                    return None
    return found


@contextmanager
def connector_of(family: Family, connector: nn.Module) -> Iterator[None]:
    """The family with the weights of another connector."""
    own = copy.deepcopy(family.connector.state_dict())
    family.connector.load_state_dict(connector.state_dict())
    try:
        yield
    finally:
        family.connector.load_state_dict(own)

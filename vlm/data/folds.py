"""Cross-validation: the images that take part are divided into folds, each of which is the test split once."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm.common import UsageError, listed
from vlm.config import Settings
from vlm.data.cutting import FOLDS, cut_from_train, share_units, units_of
from vlm.data.sources import Rows
from vlm.data.splits import Split


def rows_of_folds(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows that are divided into folds: those of train and of a validation split. A test split stays out."""
    return {"train": rows["train"].join(rows["validation"]) if "validation" in rows else rows["train"]}


def cut_fold(images: Split, names: Sequence[str], settings: Settings) -> dict[str, Split]:
    """The splits of one fold: test is the fold, validation is cut from the others, and train is what is left.

    Each class is divided evenly; equal images and those of one group stay in one fold.

    Args:
        images: those that are divided into folds, decoded.
        names: the class names.
        settings: `folds` is how many there are, `fold` the one that is cut, the first if it is None.

    Returns:
        The splits by role.

    Raises:
        UsageError: the images cannot be divided so that each fold can be trained and tested.
    """
    count = settings.folds or 1
    units = units_of(images)
    _check_enough(images, units, names, settings)
    parts = share_units(units, images.labels, [1 / count] * count, [settings.seed, FOLDS])
    # All of them, so that a fold that cannot be cut is known before the first one is trained.
    cuts = [_cut(images, part, number, names, settings) for number, part in enumerate(parts, 1)]
    return cuts[(settings.fold or 1) - 1]


def fold_metadata(splits: Mapping[str, Split], settings: Settings) -> dict[str, Any]:
    """What the metadata of a model say about its fold.

    Returns:
        number, of: which fold it is, and of how many; pictures: in all folds; digest: SHA-256 (hex) of all that the
        folds are cut by, equal for all folds of a cross-validation: these images with their labels, groups and
        reasonings, in the order of the source.
    """
    images = sorted(about for split in splits.values() for about in _about(split))
    digest = hashlib.sha256(json.dumps(images).encode()).hexdigest()
    return {"number": settings.fold or 1, "of": settings.folds, "pictures": len(images), "digest": digest}


def _about(split: Split) -> list[tuple[Any, ...]]:
    """The row of each image, by which no two are equal, and what is known of it."""
    return list(zip(split.source_rows, split.keys, split.labels, split.groups, split.reasonings, strict=True))


def _asked(settings: Settings) -> str:
    """The flags that decide how many images a fold has."""
    limited = "" if settings.max_samples is None else f" with --max-samples {settings.max_samples}"
    return f"--folds {settings.folds}{limited}"


def _check_enough(images: Split, units: Sequence[Sequence[int]], names: Sequence[str], settings: Settings) -> None:
    count = settings.folds or 1
    if images.has_groups:
        if len(units) < count:
            raise UsageError(
                f"{_asked(settings)}: there are {len(units)} groups, and none is cut apart. Expected at least {count}: "
                "give a smaller --folds, or other groups."
            )
        return
    having = Counter(label for unit in units for label in {images.labels[i] for i in unit})
    if few := listed(f"{name} ({having[number]})" for number, name in enumerate(names) if having[number] < count):
        raise UsageError(
            f"{_asked(settings)}: there are fewer than {count} different images of {few}. Expected at least {count} of "
            "each class: give a smaller --folds, or more images."
        )


def _cut(images: Split, fold: list[int], number: int, names: Sequence[str], settings: Settings) -> dict[str, Split]:
    inside = set(fold)
    others = images.take([i for i in range(len(images)) if i not in inside])
    try:
        splits = cut_from_train({"train": others, "test": images.take(fold)}, ["validation"], names, settings)
    except UsageError as error:
        raise UsageError(f"{_asked(settings)}: without fold {number}, {error}") from error
    learned = set(splits["train"].labels)
    if lost := listed(name for label, name in enumerate(names) if label not in learned):
        raise UsageError(
            f"{_asked(settings)}: without fold {number}, train has no image of {lost}, whose groups are too few. "
            "Give a smaller --folds, or more groups of each class."
        )
    return splits

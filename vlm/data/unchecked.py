"""Datasets that are too large to decode all images before the training.

A few images are looked at first. The others are checked while features are computed and while the model is trained and
tested. One that cannot be read gets a gray stand-in, which counts nowhere, on every epoch alike: so the order of the
training, and with it a resumed run, does not depend on when it was found. It leaves the splits of validation and test
when their scores are known, and train at the end.
"""

from collections.abc import Mapping

import numpy as np

from vlm.common import RunError, listed, note
from vlm.config import Settings
from vlm.data.describe import count_again
from vlm.data.readable import (
    MOST_SHOWN,
    MOST_UNREADABLE,
    Complain,
    Readable,
    check_share,
    decode,
    refuse,
    say_unreadable,
)
from vlm.data.splits import ROLES, Data, Split

# That many photographs are decoded in about a minute; a million takes more than an hour.
CHECKED_FIRST = 5000
LOOKED_AT = {"train": 400, "validation": 100, "test": 100}
LOOK = 5  # after the user's seed, as the draws in cutting.py
FEWEST = 20  # unreadable images that stop a run


def is_checked_first(splits: Mapping[str, Split], settings: Settings) -> bool:
    """Whether all images are decoded before the training: if they are few, or the settings need or ask for it."""
    asked = settings.check_images or settings.probe or settings.align_connector or settings.folds is not None
    return asked or not is_large(splits)


def is_large(splits: Mapping[str, Split]) -> bool:
    """Whether it takes long to decode all images."""
    return sum(map(len, splits.values())) > CHECKED_FIRST


def look_at_some(splits: Mapping[str, Split], seed: int, complain: Complain = refuse) -> Readable:
    """Decode a few images of each split, drawn with the seed; fills in their `keys` and `checks`.

    Args:
        complain: see `keep_readable`.

    Raises:
        UsageError: too many of them are unreadable.
    """
    parts, chosen = {}, {}
    for number, role in enumerate(ROLES):
        count = len(splits[role])
        drawn = np.random.default_rng([seed, LOOK, number]).permutation(count)[: LOOKED_AT[role]]
        chosen[role] = np.sort(drawn).tolist()
        parts[role] = splits[role].take(chosen[role])
    decode(parts)
    unreadable = say_unreadable(parts)
    check_share(parts, unreadable, [], complain)
    for role, positions in chosen.items():
        for i, key, check in zip(positions, parts[role].keys, parts[role].checks, strict=True):
            splits[role].keys[i], splits[role].checks[i] = key, check
    looked_at, count = sum(map(len, parts.values())), sum(map(len, splits.values()))
    note(
        f"note: {looked_at:,} of {count:,} images are checked now, the others while they are used: unreadable ones are "
        "left out and counted then. Equal images may be in two splits. --check-images checks all of them first."
    )
    edges = [check.edge for check in parts["train"].checks if check and not check.fault] or [0]
    return Readable(dict(splits), [], edges)


def leave_out_unreadable(data: Data, role: str) -> list[int]:
    """Take the images that turned out to be unreadable out of a split, and count them.

    Returns:
        The positions of the images that stay.

    Raises:
        RunError: too many of the split are unreadable.
    """
    split: Split = getattr(data, role)
    faults = split.faults
    if not faults:
        return list(range(len(split)))
    refuse_unreadable(role, faults, len(split))
    kept = split.readable
    if lost := lost_classes(data, role):
        what = "the model did not learn them" if role == "train" else "its accuracy says nothing about them"
        note(f"warning: {role} has no readable image of {listed(lost)}, so {what}.")
    setattr(data, role, split.take(kept))
    data.skipped += faults.values()
    count_again(data)
    images = "images of {role} are" if len(faults) > 1 else "image of {role} is"
    note(f"{len(faults):,} unreadable {images.format(role=role)} left out, first {next(iter(faults.values()))}")
    return kept


def check_what_is_known(data: Data) -> None:
    """Stop before the first step, if the images that turned out to be unreadable meanwhile are too many, or if they are
    all of a class.

    Raises:
        RunError: they are.
    """
    for role in ROLES:
        split: Split = getattr(data, role)
        if faults := split.faults:
            refuse_unreadable(role, faults, len(split))
    if lost := lost_classes(data, "train"):
        raise RunError(f"train has no readable image of {listed(lost)}. Repair these files, or remove the class.")


def lost_classes(data: Data, role: str) -> list[str]:
    """The classes of a split whose images are all known to be unreadable."""
    split: Split = getattr(data, role)
    if not split.faults:
        return []
    left = {split.labels[i] for i in split.readable}
    return [data.class_names[label] for label in sorted(set(split.labels) - left)]


def note_unreadable(fault: str, number: int) -> None:
    """Name an image that turned out to be unreadable, if it is one of the first ones.

    Args:
        number: how many were found before.
    """
    if number < MOST_SHOWN:
        note(f"left out, as it is unreadable: {fault}")


def refuse_unreadable(role: str, faults: Mapping[int, str], seen: int) -> None:
    """Stop a run in which too many of the images that were seen are unreadable, as a disk that is gone makes them.

    Raises:
        RunError: they are.
    """
    if len(faults) >= FEWEST and len(faults) > MOST_UNREADABLE * seen or len(faults) == seen:
        raise RunError(
            f"{len(faults):,} of {seen:,} images of {role} are unreadable, more than {MOST_UNREADABLE:.0%}. "
            f"First: {next(iter(faults.values()))}\n       Repair these files, then start again with --overwrite."
        )

"""Which samples a split gets: what is cut out of train, at most so many, or so many of each class.

Every draw depends on the seed and the labels only, and the cut on which images are equal or of one group, so that these
stay together. The draws are those of numpy's Generator.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from vlm.common import UsageError, brief, listed
from vlm.config import Settings
from vlm.data.classes import check_max_samples
from vlm.data.duplicates import equal_images
from vlm.data.splits import ROLES, Split

# After the user's seed comes the number of the draw, so that no two draws are the same.
CUT, MAX_SAMPLES, SHOTS, FOLDS = 1, 2, 3, 4
Labels = Sequence[int] | np.ndarray


def check_enough(labels: Labels, missing: Sequence[str], names: Sequence[str], counted: str = "") -> None:
    """Refuse to cut the missing splits out of classes that have fewer than one image for each split.

    Args:
        labels: of the images that may be drawn.
        counted: a sentence on which images these are, if not all.
    """
    needed = len(missing) + 1
    if missing and (small := _smaller(labels, names, needed)):
        raise UsageError(
            f"train has fewer than {needed} images of {small}, so {' and '.join(missing)} cannot be cut from it. "
            f"Expected at least {needed} of each class, or a dataset with these splits. {counted}".rstrip()
        )


def cut_from_train(
    splits: Mapping[str, Split], missing: Sequence[str], names: Sequence[str], settings: Settings
) -> dict[str, Split]:
    """Cut the missing splits out of train: the same share of each class, and at least one image of each.

    Of images whose keys are known, equal ones go to the same split. Those that are there once are drawn first; those
    under two labels, and those that another split has, stay in train. If there are groups, none is cut apart.

    Args:
        splits: the splits that are there, with train, by role.
        missing: the roles to cut, in order.
        names: the class names.

    Returns:
        All splits, by role.

    Raises:
        UsageError: a class has too few images.
    """
    if not missing:
        return dict(splits)
    train = splits["train"]
    if train.has_groups:
        return _cut_groups(splits, missing, settings)
    labels = np.array(train.labels)
    # (N,) the group of each image, -1 if it is not drawn; of images that were not decoded, each is one of its own
    numbers, groups = np.arange(len(train)), None
    if any(train.keys):
        numbers, groups = _equal_groups(splits)
        counted = np.array([labels[group[0]] for group in groups], dtype=int)
        check_enough(counted, missing, names, _what_counts(train))
    rng = np.random.default_rng([settings.seed, CUT])
    ratios = {"validation": settings.validation_ratio, "test": settings.test_ratio}
    parts: dict[str, list[int]] = {role: [] for role in missing}
    for label in range(len(names)):
        found = numbers[rng.permutation(np.flatnonzero(labels == label))].tolist()
        drawn = [number for number in dict.fromkeys(found) if number >= 0]
        if groups:
            drawn.sort(key=lambda number: len(groups[number]))
        count = len(drawn)
        for place, role in enumerate(missing):
            most = len(drawn) - (len(missing) - place)  # one image is left for each of the other splits
            size = min(max(1, round(ratios[role] * count)), most)
            parts[role] += [i for number in drawn[:size] for i in groups[number]] if groups else drawn[:size]
            drawn = drawn[size:]
    left = np.ones(len(train), dtype=bool)
    for positions in parts.values():
        left[positions] = False
    parts["train"] = np.flatnonzero(left).tolist()
    return {**splits, **{role: train.take(sorted(positions)) for role, positions in parts.items()}}


def _equal_groups(splits: Mapping[str, Split]) -> tuple[np.ndarray, list[list[int]]]:
    """The groups of equal images of train that may be drawn: of one label, and in no other split.

    Returns:
        (N,) the number of the group of each image of train, -1 if it has none.
        The positions of each group.
    """
    train = splits["train"]
    elsewhere = {key for role, split in splits.items() if role != "train" for key in split.keys} - {None}
    groups = [
        group
        for group in equal_images(train)
        if len({train.labels[i] for i in group}) == 1 and train.keys[group[0]] not in elsewhere
    ]
    numbers = np.full(len(train), -1)
    for number, group in enumerate(groups):
        numbers[group] = number
    return numbers, groups


def _cut_groups(splits: Mapping[str, Split], missing: Sequence[str], settings: Settings) -> dict[str, Split]:
    """Cut whole groups out of train, so that each class has about its share in each split."""
    train = splits["train"]
    others = [split for role, split in splits.items() if role != "train"]
    elsewhere = {("key", key) for split in others for key in split.keys if key is not None}
    elsewhere |= {("group", group) for split in others for group in split.groups if group is not None}
    units = [unit for unit in units_of(train) if not elsewhere & {tie for i in unit for tie in _ties(train, i)}]
    if len(units) <= len(missing):
        raise UsageError(
            f"train has {len(units)} groups that could be cut off, too few for {' and '.join(missing)}. Expected at "
            "least one for each split: give a dataset with these splits, or other groups."
        )
    ratios = {"validation": settings.validation_ratio, "test": settings.test_ratio}
    shares = [ratios[role] for role in missing]
    parts = share_units(units, train.labels, [*shares, 1 - sum(shares)], [settings.seed, CUT])
    if empty := [role for role, part in zip(missing, parts, strict=False) if not part]:
        raise UsageError(
            f"train has {len(units)} groups, of which none can go to {' and '.join(empty)} without that train loses a "
            "class. Expected more groups of each class: give a dataset with these splits, or other groups."
        )
    taken = {i for part in parts[:-1] for i in part}
    kept = [i for i in range(len(train)) if i not in taken]
    return {
        **splits,
        **{role: train.take(part) for role, part in zip(missing, parts, strict=False)},
        "train": train.take(kept),
    }


def units_of(split: Split) -> list[list[int]]:
    """The positions that stay together, as their images are equal or of one group, in the order of the first ones."""
    first: dict[tuple[str, str], int] = {}
    root = list(range(len(split)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    for i in range(len(split)):
        for tie in _ties(split, i):
            one, other = sorted((find(first.setdefault(tie, i)), find(i)))
            root[other] = one
    units: dict[int, list[int]] = {}
    for i in range(len(split)):
        units.setdefault(find(i), []).append(i)
    return list(units.values())


def _ties(split: Split, i: int) -> list[tuple[str, str]]:
    """What ties an image to others: its key and its group, if they are known."""
    found = (("key", split.keys[i]), ("group", split.groups_at(i)))
    return [(kind, name) for kind, name in found if name is not None]


def share_units(
    units: Sequence[Sequence[int]], labels: Sequence[int], shares: Sequence[float], seed: Sequence[int]
) -> list[list[int]]:
    """Divide units of positions, none of which is cut apart, so that each class is divided by the shares.

    First each share gets a unit of each class, if there are enough, those with the fewest units first. Then the units,
    the largest first, each go where their classes lack most. What is equal is drawn by the seed.

    Args:
        units: positions that stay together.
        labels: the class of each position.
        shares: what part of the images each gets, of 1 in all.

    Returns:
        The positions of each share, sorted.
    """
    counts = [Counter(labels[i] for i in unit) for unit in units]
    total = sum(counts, Counter())
    drawn = np.random.default_rng(seed).permutation(len(units)).tolist()
    order = sorted(drawn, key=lambda unit: -len(units[unit]))
    filled: list[Counter[int]] = [Counter() for _ in shares]
    place: dict[int, int] = {}

    def put(unit: int, share: int) -> None:
        place[unit] = share
        filled[share].update(counts[unit])

    having: dict[int, list[int]] = {}  # by class, the units that have it, the smallest first
    for unit in reversed(order):
        for label in counts[unit]:
            having.setdefault(label, []).append(unit)
    largest_last = sorted(range(len(shares)), key=lambda share: shares[share])
    for label in sorted(having, key=lambda label: (len(having[label]), label)):
        enough = len(having[label]) >= len(shares)
        for share in largest_last if enough else largest_last[-1:]:
            free = next((unit for unit in having[label] if unit not in place), None)
            if not filled[share][label] and free is not None:
                put(free, share)

    def fullness(unit: int, share: int) -> tuple[float, float]:
        """How full a share would be of the unit's classes, as a part of what it is to get; then, of all images."""
        of_unit = counts[unit].items()
        of_classes = sum(n / total[c] * (filled[share][c] + n / 2) / total[c] for c, n in of_unit)
        return of_classes / shares[share], filled[share].total() / shares[share]

    for unit in order:
        if unit not in place:
            put(unit, min(range(len(shares)), key=partial(fullness, unit)))
    parts: list[list[int]] = [[] for _ in shares]
    for unit, share in place.items():
        parts[share] += units[unit]
    return [sorted(part) for part in parts]


def limit_splits(splits: dict[str, Split], most: int, names: Sequence[str], seed: int) -> dict[str, Split]:
    """At most so many samples of each split, balanced over the classes.

    Raises:
        UsageError: fewer samples than classes.
    """
    check_max_samples(most, len(names))
    return {
        role: split.take(balanced_positions(split.labels, most, [seed, MAX_SAMPLES, ROLES.index(role)]))
        for role, split in splits.items()
    }


def take_shots(train: Split, names: Sequence[str], settings: Settings) -> Split:
    """The `--shots` samples of each class, drawn at random, in the order of the split.

    Raises:
        UsageError: a class has fewer.
    """
    shots = settings.shots
    if shots is None:
        return train
    if small := _smaller(train.labels, names, shots):
        limited = "" if settings.max_samples is None else f" after --max-samples {settings.max_samples}"
        raise UsageError(
            f"--shots {shots}: train has fewer images of {small}{limited}. Expected at least {shots} of each class."
        )
    return train.take(balanced_positions(train.labels, shots * len(names), [settings.seed, SHOTS]))


def balanced_positions(labels: Sequence[int], most: int, seed: Sequence[int]) -> list[int]:
    """Draw at most so many samples at random, one of each class in turn.

    Returns:
        Their positions, sorted.
    """
    if len(labels) <= most:
        return list(range(len(labels)))
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = np.array(labels)[order]
    turn = np.empty(len(labels), dtype=int)  # how many of the same class come before
    for label in set(labels):
        turn[drawn == label] = np.arange((drawn == label).sum())
    return sorted(order[np.argsort(turn, kind="stable")[:most]].tolist())


def _what_counts(train: Split) -> str:
    equal = next((group for group in equal_images(train) if len(group) > 1), [])
    example = f" ({' = '.join(brief(train.names[i]) for i in equal[:2])})" if equal else ""
    return f"Equal images{example} count as one; those under two labels or in another split do not count."


def _smaller(labels: Labels, names: Sequence[str], least: int) -> str:
    """The classes with fewer than `least` images, each with its count; empty if there are none."""
    counts = np.bincount(labels, minlength=len(names))
    return listed(f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < least)

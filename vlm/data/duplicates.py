"""Equal images, by content: which are in several splits, more than once in one, or under two labels.

Equal means the same size and the same pixels, as `image_key` has it. A crop, or a file that was compressed again, is
another image, and at most a near-duplicate. An image whose key is not known equals no other one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vlm.common import UsageError, brief, listed, note
from vlm.data.near_duplicates import find_near
from vlm.data.splits import LEAKS, ROLES, NearPair, Split, near_kind

MOST_SHOWN = 3
TWO_LABELS = "under_two_labels"


class Place(NamedTuple):
    """Where an image is: its split, its label, and what messages call it."""

    role: str
    label: int
    name: str


@dataclass(frozen=True)
class Overlap:
    """counts: the numbers of equal images and near-duplicates, as `results.json` has them; rows: what the table "what
    was detected" says about them, empty if there are none; near: the near-duplicates."""

    counts: dict[str, int]
    rows: list[tuple[str, str]]
    near: list[NearPair]


def equal_images(split: Split) -> list[list[int]]:
    """The positions of equal images, one list for each different image, in the order of the first ones."""
    groups: dict[str | int, list[int]] = {}
    for i, key in enumerate(split.keys):
        groups.setdefault(i if key is None else key, []).append(i)
    return list(groups.values())


def without_copies(splits: Mapping[str, Split], cut: Sequence[str]) -> dict[str, Split]:
    """Leave out of the splits that were cut what another split has, too.

    There are such images only if the splits were cut before the images were decoded, as with `--max-samples`.

    Raises:
        UsageError: nothing is left of a split.
    """
    kept = dict(splits)
    for role in cut:
        split, elsewhere = kept[role], {key for other in kept if other != role for key in kept[other].keys} - {None}
        kept[role] = split.take([i for i, key in enumerate(split.keys) if key not in elsewhere])
        lost = len(split) - len(kept[role])
        if lost and not len(kept[role]):
            raise UsageError(
                f"{role} is cut from train, but other splits have all of its {lost} images, too. "
                "Raise --max-samples, or remove the copies."
            )
        if lost:
            note(f"{lost} of {len(split)} images of {role} are left out, as another split has them, too")
    return kept


def cure_of_near(has_columns: bool, is_cut: bool) -> str:
    """What keeps images in one split that look almost the same.

    Args:
        has_columns: whether the dataset has columns. is_cut: whether a split is cut from another one.
    """
    if not is_cut:
        return "the splits are those of the dataset: move such images into one of them"
    return f"keep such images in one split, see {'--group-column' if has_columns else '--group-pattern'}"


def find_overlap(splits: Mapping[str, Split], class_names: Sequence[str], cure: str, checked: bool = True) -> Overlap:
    """Count the images that another split has too, that a split has more than once, that have two labels, and that look
    almost like one in another split.

    Notes name the first ones.

    Args:
        cure: what to do about near-duplicates.
        checked: whether the images were decoded; if not, only groups are looked for.
    """
    has_groups = splits["train"].has_groups
    groups = {f"{role}_groups_in_{other}": _shared(splits[role], splits[other]) for role, other in LEAKS if has_groups}
    for kind, shared in groups.items():
        if shared:
            note(f"{_group_phrase(kind, shared)}: {listed(map(brief, shared), MOST_SHOWN)}")
    found = _pairs(splits) if checked else {}
    phrases = {kind: _phrase(kind, len(pairs), splits) for kind, pairs in found.items() if pairs}
    for kind, phrase in phrases.items():
        pairs = found[kind]
        if kind == TWO_LABELS:  # here both images of a pair have one; it is shown once
            pairs = [(one, other) for one, other in pairs if one.label < other.label]
        shown = [" = ".join(_show(place, kind, class_names) for place in pair) for pair in pairs[:MOST_SHOWN]]
        then = ". Correct their labels" if kind == TWO_LABELS else ""
        note(f"{phrase}: {', '.join(shown)}{', ...' if len(pairs) > MOST_SHOWN else ''}{then}")
    near = find_near(splits) if checked else []
    counts = {kind: len(pairs) for kind, pairs in found.items()} | (_count_near(near) if checked else {})
    counts |= {kind: len(shared) for kind, shared in groups.items()}
    of_groups = [_group_phrase(kind, shared) for kind, shared in groups.items() if shared]
    rows = [("equal images", [*of_groups, *phrases.values()]), ("near-duplicates", _note_near(near, splits, cure))]
    return Overlap(counts, [(name, "; ".join(said)) for name, said in rows if said], near)


def _shared(split: Split, other: Split) -> list[str]:
    """The groups of which both splits have images, in their order."""
    there = set(other.groups)
    return [group for group in dict.fromkeys(split.groups) if group is not None and group in there]


def _group_phrase(kind: str, shared: Sequence[str]) -> str:
    what, _, where = kind.partition("_groups_in_")
    return (
        f"{len(shared):,} group{'s' * (len(shared) > 1)} of {what} {'are' if len(shared) > 1 else 'is'} in {where}, too"
    )


def _count_near(near: Sequence[NearPair]) -> dict[str, int]:
    counted = Counter(pair.kind for pair in near)
    return {kind: counted[kind] for role, other in LEAKS for kind in [near_kind(role, other)]}


def _note_near(near: Sequence[NearPair], splits: Mapping[str, Split], cure: str) -> list[str]:
    """Name the first near-duplicates of each kind in a note.

    Returns:
        What the table says of each kind.
    """
    phrases = []
    for role, other in LEAKS:
        pairs = [pair for pair in near if pair.kind == near_kind(role, other)]
        if not pairs:
            continue
        looks = "looks" if len(pairs) == 1 else "look"
        phrases.append(f"{len(pairs):,} of {len(splits[role]):,} images of {role} {looks} almost like one in {other}")
        names, others = splits[role].names, splits[other].names
        shown = [f"{brief(names[p.position])} ~ {brief(others[p.other_position])}" for p in pairs[:MOST_SHOWN]]
        more = ", ..." if len(pairs) > MOST_SHOWN else ""
        note(f"{phrases[-1]} ({cure}): {', '.join(shown)}{more}")
    return phrases


def _pairs(splits: Mapping[str, Split]) -> dict[str, list[tuple[Place, Place]]]:
    """By kind, each image that has an equal one of this kind, and the equal one."""
    groups: dict[str, list[Place]] = {}
    for role in ROLES:
        split = splits[role]
        for key, label, name in zip(split.keys, split.labels, split.names, strict=True):
            if key is not None:
                groups.setdefault(key, []).append(Place(role, label, name))
    kinds = [f"{role}_in_{other}" for role, other in LEAKS] + [f"twice_in_{role}" for role in ROLES] + [TWO_LABELS]
    found: dict[str, list[tuple[Place, Place]]] = {kind: [] for kind in kinds}
    for group in groups.values():
        places = {role: [place for place in group if place.role == role] for role in ROLES}
        for role, other in LEAKS:
            if places[other]:
                found[f"{role}_in_{other}"] += [(place, places[other][0]) for place in places[role]]
        for role in ROLES:
            found[f"twice_in_{role}"] += [(place, places[role][0]) for place in places[role][1:]]
        one_a_label = list({place.label: place for place in reversed(group)}.values())
        if len(one_a_label) > 1:
            found[TWO_LABELS] += [
                (place, next(other for other in one_a_label if other.label != place.label)) for place in group
            ]
    return found


def _phrase(kind: str, count: int, splits: Mapping[str, Split]) -> str:
    are = "is" if count == 1 else "are"
    if kind == TWO_LABELS:
        return f"{count:,} image{'s' * (count > 1)} {are} under another label, too"
    what, _, where = kind.partition("_in_")
    if what == "twice":
        copies = "is a copy of another" if count == 1 else "are copies of others"
        return f"{count:,} of {len(splits[where]):,} images of {where} {copies} in it"
    return f"{count:,} of {len(splits[what]):,} images of {what} {are} in {where}, too"


def _show(place: Place, kind: str, class_names: Sequence[str]) -> str:
    return brief(place.name) + (f" ({brief(class_names[place.label])})" if kind == TWO_LABELS else "")

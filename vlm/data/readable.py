"""Decodes every image once and leaves out those that cannot be decoded."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from vlm.common import UsageError, note, with_bar
from vlm.data.images import UnreadableImage
from vlm.data.splits import ROLES, Split

MOST_UNREADABLE = 0.05  # share of a split
MOST_SHOWN = 5


class Unreadable(NamedTuple):
    """An image that cannot be decoded: its split, its position there, and its name with the reason."""

    role: str
    position: int
    text: str


@dataclass(frozen=True)
class Readable:
    """splits: the images that can be decoded, by role, with their keys; skipped: each other image with the reason;
    edges: the longest edge of each image of train, in pixels."""

    splits: dict[str, Split]
    skipped: list[str]
    edges: list[int]


def keep_readable(splits: dict[str, Split], names: Sequence[str], cut: Sequence[str]) -> Readable:
    """Decode every image once, learn its key and leave out those that cannot be decoded.

    Args:
        splits: all three splits; their `keys` are filled in.
        names: the class names.
        cut: the splits that were cut from train; their unreadable images are counted as train's.

    Raises:
        UsageError: too many images are unreadable, or a split or a class of train has none left.
    """
    unreadable, edges = _decode(splits)
    for image in unreadable[:MOST_SHOWN]:
        note(f"skipped an unreadable image of {image.role}: {image.text}")
    if len(unreadable) > MOST_SHOWN:
        note(f"... and {len(unreadable) - MOST_SHOWN} more")
    _check_share(splits, unreadable, cut)
    kept = {}
    for role, split in splits.items():
        lost = {image.position for image in unreadable if image.role == role}
        kept[role] = split.take([i for i in range(len(split)) if i not in lost])
        if not len(kept[role]):
            raise UsageError(f"{role} has no readable image. Repair its images, or add some.")
    learned = set(kept["train"].labels)
    if empty := [name for number, name in enumerate(names) if number not in learned]:
        raise UsageError(f"train has no readable image of {', '.join(empty)}. Add some, or remove the class.")
    return Readable(kept, [image.text for image in unreadable], edges)


def _decode(splits: dict[str, Split]) -> tuple[list[Unreadable], list[int]]:
    """Decode every image and fill in its key.

    Returns:
        The unreadable images, in the order of the splits.
        The longest edge of each readable image of train, in pixels.
    """

    def check(place: tuple[str, int]) -> int | Unreadable:
        role, i = place
        try:
            sample = splits[role][i]
            splits[role].keys[i] = sample.key
            return max(sample.image.size)
        except UnreadableImage as error:
            return Unreadable(role, i, str(error))

    places = [(role, i) for role in ROLES for i in range(len(splits[role]))]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        found = list(with_bar(pool.map(check, places), len(places), "checking images"))
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C would wait for all images
    unreadable = [result for result in found if isinstance(result, Unreadable)]
    edges = [
        result
        for (role, _), result in zip(places, found, strict=True)
        if role == "train" and not isinstance(result, Unreadable)
    ]
    return unreadable, edges


def _check_share(splits: dict[str, Split], unreadable: Sequence[Unreadable], cut: Sequence[str]) -> None:
    """Refuse a dataset in which a split, or train with all that was cut from it, has too many unreadable images."""
    given = [[role] for role in ROLES if role != "train" and role not in cut]
    for roles in [["train", *cut], *given]:
        lost = [image.text for image in unreadable if image.role in roles]
        count = sum(len(splits[role]) for role in roles)
        if len(lost) > MOST_UNREADABLE * count:
            parts = f" ({' and '.join(cut)} are cut from it)" if roles[0] == "train" and cut else ""
            raise UsageError(
                f"{len(lost)} of {count} images of {roles[0]}{parts} are unreadable, more than {MOST_UNREADABLE:.0%}. "
                f"First: {lost[0]}\n"
                "       Repair or remove these files. Paths in a table are relative to the table."
            )

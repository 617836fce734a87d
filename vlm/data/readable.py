"""Decodes every image once, and leaves out those that cannot be decoded."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from vlm.common import Bar, UsageError, listed, note
from vlm.data.images import UnreadableImage
from vlm.data.known import Found, KnownImages
from vlm.data.splits import ROLES, Split

MOST_UNREADABLE = 0.05  # share of a split
MOST_SHOWN = 5
NO_FILE = "no such file"  # as `open_image` says it
TABLE = " Paths in a table are relative to the table, or to --image-folder."
IMAGES_AT_ONCE = 1000
Complain = Callable[[str], None]


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


def refuse(message: str) -> None:
    """Raise the UsageError for data with which no run can begin."""
    raise UsageError(message)


def only_say(message: str) -> None:
    """Say it in a note, as it does no harm to those who only look at the data."""
    note(f"warning: a training would stop here: {message}")


def decode(splits: Mapping[str, Split], known: KnownImages | None = None) -> None:
    """Decode every image once that was not decoded before; fills in the `keys` and `checks` of the splits.

    Args:
        known: what earlier runs found; what is found now is added.
    """

    def check(place: tuple[Split, int]) -> None:
        split, i = place
        stamp = split.stamp(i) if known else None
        found = known.find(stamp) if known and stamp else None
        try:
            found = found or Found.of(split[i].image)
        except UnreadableImage as error:
            split.leave_out(i, str(error))
            return
        split.remember(i, found)
        if known and stamp:
            known.add(stamp, found)

    count = sum(check is None for split in splits.values() for check in split.checks)
    if not count:
        return
    places = ((split, i) for split in splits.values() for i in range(len(split)) if split.checks[i] is None)
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        with Bar(count, "checking images") as bar:
            while some := list(islice(places, IMAGES_AT_ONCE)):  # a future for each of a million would need gigabytes
                for _ in pool.map(check, some):
                    bar.update(1)
                if known:
                    known.save_sometimes()
    finally:
        pool.shutdown(cancel_futures=True)  # otherwise Ctrl-C would wait for all images
        if known:
            known.save()


def keep_readable(
    splits: dict[str, Split], names: Sequence[str], cut: Sequence[str], complain: Complain = refuse
) -> Readable:
    """Leave out the images that cannot be decoded.

    Args:
        splits: all three splits, or only train; images that were not decoded before are decoded now, and `keys` are
            filled in.
        names: the class names.
        cut: the splits that were cut from train; their unreadable images are counted as train's.
        complain: takes the message if a run could not begin with what is left.

    Raises:
        UsageError: too many images are unreadable, or a split or a class of train has none left.
    """
    decode(splits)
    unreadable = say_unreadable(splits)
    check_share(splits, unreadable, cut, complain)
    kept = {}
    for role, split in splits.items():
        lost = {image.position for image in unreadable if image.role == role}
        kept[role] = split.take([i for i in range(len(split)) if i not in lost])
        if not len(kept[role]):
            say = refuse if role == "train" else complain  # without any there is nothing to look at
            say(f"{role} has no readable image. Repair its images, or add some.")
    learned = set(kept["train"].labels)
    if empty := [name for number, name in enumerate(names) if number not in learned]:
        complain(f"train has no readable image of {listed(empty)}. Add some, or remove the class.")
    edges = [check.edge for check in kept["train"].checks if check]
    return Readable(kept, [image.text for image in unreadable], edges)


def say_unreadable(splits: Mapping[str, Split]) -> list[Unreadable]:
    """The images that cannot be decoded, in the order of the splits. Notes name the first ones."""
    found = [Unreadable(role, i, fault) for role in ROLES if role in splits for i, fault in splits[role].faults.items()]
    for image in found[:MOST_SHOWN]:
        note(f"skipped an unreadable image of {image.role}: {image.text}")
    if len(found) > MOST_SHOWN:
        note(f"... and {len(found) - MOST_SHOWN} more")
    return found


def check_share(
    splits: dict[str, Split], unreadable: Sequence[Unreadable], cut: Sequence[str], complain: Complain = refuse
) -> None:
    """Refuse a dataset in which a split, or train with all that was cut from it, has too many unreadable images.

    Raises:
        UsageError: it has.
    """
    given = [[role] for role in ROLES if role in splits and role != "train" and role not in cut]
    for roles in [["train", *cut], *given]:
        lost = [image.text for image in unreadable if image.role in roles]
        count = sum(len(splits[role]) for role in roles)
        if len(lost) > MOST_UNREADABLE * count:
            parts = f" ({' and '.join(cut)} are cut from it)" if roles[0] == "train" and cut else ""
            complain(
                f"{len(lost)} of {count} images of {roles[0]}{parts} are unreadable, more than {MOST_UNREADABLE:.0%}. "
                f"First: {lost[0]}\n       Repair or remove these files.{TABLE if NO_FILE in lost[0] else ''}"
            )

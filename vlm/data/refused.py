"""Leaves out the images that a model's processor refuses: to a user they are as unreadable as damaged ones."""

from collections.abc import Callable, Collection

from vlm.data.describe import count_again
from vlm.data.duplicates import cure_of_near, find_overlap
from vlm.data.readable import keep_readable
from vlm.data.splits import ROLES, Data
from vlm.data.unchecked import note_unreadable

Size = tuple[int, int]  # width and height in pixels
Refusal = Callable[[int, int], str | None]


def leave_out_refused(data: Data, refusal: Refusal) -> None:
    """Take the images that a processor refuses out of all splits, with a note, and count them as skipped.

    Args:
        data: changed in place, with its counts.
        refusal: width and height in pixels -> why an image of this size is refused, None if it is not.

    Raises:
        UsageError: too many images are refused, or a split or a class of train has none left.
    """
    splits = {role: getattr(data, role) for role in ROLES}
    sizes = {check.size for split in splits.values() for check in split.checks if check and not check.fault}
    refused = _refused_sizes(sizes, refusal)
    if not refused:
        return
    found = 0
    for split in splits.values():
        for i, check in enumerate(split.checks):
            if check and check.size in refused:
                fault = f"{split[i].name}: {refused[check.size]}"
                split.leave_out(i, fault)
                if not data.checked:
                    note_unreadable(fault, found)
                found += 1
    if not data.checked:  # those that were not decoded are refused when they are used
        return
    kept = keep_readable(splits, data.class_names, data.cut)
    data.train, data.validation, data.test = (kept.splits[role] for role in ROLES)
    data.skipped += kept.skipped
    cure = cure_of_near(data.source.get("image_column") is not None, bool(data.cut or "fold" in data.source))
    overlap = find_overlap(kept.splits, data.class_names, cure)
    data.overlap, data.near = overlap.counts, overlap.near
    count_again(data)


def _refused_sizes(sizes: Collection[Size], refusal: Refusal) -> dict[Size, str]:
    """The sizes that are refused, with the reasons.

    A processor that takes the extremes of all sizes takes those in between, so usually only a few are tried.
    """
    measures: list[Callable[[Size], float]] = [min, max, lambda size: size[0] / size[1], lambda size: size[0] * size[1]]
    extremes = {pick(sizes, key=measure) for pick in (min, max) for measure in measures} if sizes else set()
    reasons = {size: refusal(*size) for size in extremes}
    if any(reasons.values()):
        reasons |= {size: refusal(*size) for size in sizes if size not in reasons}
    return {size: reason for size, reason in reasons.items() if reason}

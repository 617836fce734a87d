"""What images belong together: a patient, a place, a video. Read from a column, or found in the names of images."""

import re
from collections import Counter
from collections.abc import Sequence

from vlm.common import UsageError, brief, note

LONGEST_NAME = 255  # characters of an image's name in which a group is looked for
MOST_OF_A_GROUP = 0.5  # share of all images; what is in the names of more says nothing
SMALLEST_SHARE = 0.9  # of the images must have such a name
WHOLE = re.compile(r"([0-9]{1,18})(?:\.0*)?")
FEWEST_OF_A_GROUP = 2  # images, on average
# A word with a number, before another word with a number: patient12_slice3, video_03_frame_0012, subject-4 scan 7.
GROUP_IN_NAME = re.compile(r"([A-Za-z]{2,})[-_ ]?([0-9]{1,9})[-_ .]+(?=[A-Za-z]{1,20}[-_ ]?[0-9]{1,9})")


def group_names(values: Sequence[object], source: str) -> list[str | None]:
    """The groups of a column as texts; a row without a value belongs to no group.

    Args:
        source: what the column belongs to, for messages.
    """
    groups = [None if _is_missing(value) else _as_text(value) for value in values]
    if missing := groups.count(None):
        note(f"note: {source}: {missing:,} of {len(groups):,} images have no group; each is one of its own.")
    return groups


def groups_by_pattern(names: Sequence[str], pattern: str, split: str) -> list[str | None]:
    """The groups that a regular expression finds in names: its first pair of parentheses, or all that it matches.

    Raises:
        UsageError: it matches no name.
    """
    found = [re.search(pattern, name[:LONGEST_NAME]) for name in names]
    groups = [None if match is None else match[1 if match.re.groups else 0] for match in found]
    if names and not any(groups):
        raise UsageError(
            f"--group-pattern {pattern}: it is in none of the names of {split}, first {brief(names[0])}. Expected a "
            "regular expression such as patient[0-9]+."
        )
    if missing := sum(not group for group in groups):
        note(
            f"note: --group-pattern is not in {missing:,} of {len(groups):,} names of {split}; each is one of its own."
        )
    return [group or None for group in groups]


def point_out_groups(names: Sequence[str]) -> None:
    """Say if names look as if several images belonged together; nothing is done about it."""
    found = [match for name in names if (match := GROUP_IN_NAME.search(name.rpartition("/")[2][:LONGEST_NAME]))]
    counts = Counter(match.group(1, 2) for match in found)
    words = {word for word, _ in counts}
    if len(found) < SMALLEST_SHARE * len(names) or len(words) != 1 or len(found) < FEWEST_OF_A_GROUP * len(counts):
        return
    if len(counts) < 2 or max(counts.values()) > MOST_OF_A_GROUP * len(found):
        return
    (word,) = words
    note(
        f"note: the names look as if images belonged together ({brief(names[0])}): {len(counts):,} times {word} with a "
        f"number. If images of one {word} are alike, keep them in one split: --group-pattern '{word}[-_ ]?[0-9]+'"
    )


def _is_missing(value: object) -> bool:
    text = value.strip().lower() if isinstance(value, str) else None
    return value is None or value != value or text in ("", "nan", "none", "null")


def _as_text(value: object) -> str:
    """A group as text, the same for 2, 2.0 and 002: two spellings of one group must not be on two sides."""
    text = str(value).strip().casefold()
    whole = WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text

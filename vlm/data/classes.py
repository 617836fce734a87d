"""Labels as they are in the dataset -> class names and class numbers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from vlm.common import UsageError, brief, listed
from vlm.data.spellings import are_numbers, distinct_labels, merge_spellings, tidy
from vlm.data.synonyms import without_synonyms

NOT_PRINTED = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control characters, line ends, halves of characters
TURNS_WRITING = re.compile("[\u202a-\u202e\u2066-\u2069]")  # makes a terminal show later characters elsewhere
MOST_RENAMES_SHOWN = 12
# What programs write into a table for a missing value, in small letters.
NO_LABEL = frozenset({"nan", "null", "n/a", "#n/a", "<na>", "[]"})
PERHAPS_NO_LABEL = frozenset({"na", "none"})  # or names: Namibia, no damage


@dataclass(frozen=True)
class Classes:
    """names: the class names in order; numbers: the labels of each split as indices into them;
    how: how both were found, in a few phrases."""

    names: list[str]
    numbers: dict[str, list[int]]
    how: list[str]


def is_missing(label: object, indices: bool, words: Collection[str] = NO_LABEL) -> bool:
    """Whether a label says nothing: None, blank, an empty list, not a number (NaN), a text that means one of these, or
    -1 if labels are indices into given names.

    Args:
        words: texts that mean that there is no label, in small letters.
    """
    if isinstance(label, str):
        text = label.strip().lower()
        return not text or text in words
    return label is None or label != label or (indices and label == -1) or label in ([], ())


def check_max_samples(most: int, classes: int) -> None:
    """Refuse `--max-samples` if there are more classes."""
    if most < classes:
        raise UsageError(f"--max-samples {most}: expected at least one for each of the {classes:,} classes.")


def number_labels(
    labels: Mapping[str, Sequence[object]],
    images: Mapping[str, Sequence[str]],
    own: list[str] | None,
    given: list[str] | None,
) -> Classes:
    """Class names, and the labels of each split as indices into them.

    Names that are whole numbers are in the order of the numbers. Names that differ only in white space, in capitals or
    in their Unicode normal form (as file names from macOS do) are one.

    Args:
        labels: by split, without missing ones; "train" must be there.
        images: what messages call the images of each split.
        own: the dataset's names, into which the labels are indices; None: the labels themselves are the names, sorted.
        given: the user's names: the dataset's own in another order, or as many new ones, by index.

    Raises:
        UsageError: labels that cannot be classes, a label that train does not have, names that do not fit, less than
            two classes.
    """
    given = given and list(map(tidy, given))
    if own is None:
        names, numbers = distinct_labels(labels, images, given or ())
        how = ["labels, sorted as numbers" if are_numbers(names) else "sorted labels"]
    else:
        names, numbers = list(own), checked_indices(labels, own)
        how = ["names of the dataset"]
        if given is None:
            names, how = short_names(names, how)
    names, numbers, merged = merge_spellings(*in_order(names, numbers), given or ())
    if given is not None:
        order, how = match_given(names, given)
        names = given
        numbers = {split: [order[number] for number in values] for split, values in numbers.items()}
    if merged:
        how.append(f"several spellings as one class: {listed(merged)}")
    names, numbers, unused = _drop_unused(names, numbers)
    if unused:
        how.append(f"left out, as no image has them: {listed(unused)}")
    _check_names(names)
    for what, key in (("capitals", str.casefold), ("leading zeros", _without_zeros)):
        counts = Counter(map(key, names))
        if alike := [name for name in names if counts[key(name)] > 1]:
            how.append(f"classes that differ in {what} only: {listed(alike)}")
    return Classes(names, numbers, how)


def _without_zeros(name: str) -> str:
    return name.lstrip("0") if name.isdecimal() else name


def short_names(names: list[str], how: list[str]) -> tuple[list[str], list[str]]:
    """One of several synonyms for each class, and the phrases that say so."""
    short, longer = without_synonyms(names)
    shortened = sum(one != other for one, other in zip(short, names, strict=True))
    if not shortened:
        return names, how
    how = [*how, f"the first of the synonyms of {shortened:,} classes"]
    if longer:
        shown = listed((f"{name} -> {new}" for name, new in longer.items()), MOST_RENAMES_SHOWN)
        how.append(f"a later one where two classes share it: {shown}")
    return short, how


def problem_of_name(name: str) -> str | None:
    """Why a class name cannot be an answer of one line, in words; None if it can."""
    if not name:
        return "a class name is empty"
    if any(unicodedata.category(character) in NOT_PRINTED for character in name) or TURNS_WRITING.search(name):
        return f"the class name {brief(ascii(name))} has a line end, a control character or a byte outside UTF-8"
    return None


def _check_names(names: list[str]) -> None:
    """Refuse names that cannot be answers of one line, and less than two of them."""
    for name in names:
        if problem := problem_of_name(name):
            raise UsageError(f"{problem}, but an answer is one line of text. Give other names with --class-names.")
    if len(names) < 2:
        raise UsageError(f"the dataset has only one class ({listed(names)}). Expected images of at least two.")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"--class-names: expected different names, but got several times: {listed(repeated)}.")


def in_order(names: list[str], numbers: dict[str, list[int]]) -> tuple[list[str], dict[str, list[int]]]:
    """Tidy names, equal ones as one and whole numbers in their order; the labels as indices into them."""
    spelled = list(map(tidy, names))
    ordered = list(dict.fromkeys(spelled))
    if are_numbers(ordered):
        ordered.sort(key=lambda name: (Decimal(name), name))
    index = {name: number for number, name in enumerate(ordered)}
    return ordered, {split: [index[spelled[number]] for number in values] for split, values in numbers.items()}


def checked_indices(labels: Mapping[str, Sequence[object]], names: list[str]) -> dict[str, list[int]]:
    """Labels that are indices into names. Raises UsageError if one is outside of them."""
    numbers = cast(dict[str, list[int]], labels)
    for split, values in numbers.items():
        for value in values:
            if not 0 <= value < len(names):
                raise UsageError(
                    f"{split}: the label {value} is outside the names: the dataset has {len(names)} "
                    f"(0 to {len(names) - 1})."
                )
    return numbers


def match_given(own: list[str], given: list[str]) -> tuple[list[int], list[str]]:
    """Match the user's names with the dataset's own: by name if they are the same ones, else by index.

    Returns:
        For each own name the index of its name among the given ones.
        How they were matched, in a phrase.

    Raises:
        UsageError: another count of names, or a mix of own and new names.
    """
    if len(given) != len(own):
        raise UsageError(
            f"--class-names has {len(given)} names, but the dataset has {len(own)} classes: {listed(own)}. "
            "Give every name, or none."
        )
    for key in (str, str.casefold):
        position = {key(name): number for number, name in enumerate(given)}
        if len(position) == len(given) and set(position) == {key(name) for name in own}:
            return [position[key(name)] for name in own], ["--class-names, matched by name with the dataset's own"]
    _refuse_mix(own, given)
    renamed = listed((f"{old} -> {new}" for old, new in zip(own, given, strict=True) if old != new), MOST_RENAMES_SHOWN)
    _refuse_unclear_order(own, renamed)
    return list(range(len(own))), [f"--class-names, renamed by index: {renamed}"]


def _refuse_unclear_order(own: list[str], renamed: str) -> None:
    """Names that are sorted as text, although people order them otherwise: c2 before c10, Ape next to ant."""
    keys = list(map(_expected_place, own))
    as_text = own == sorted(own) and not are_numbers(own)
    if len(set(keys)) == len(keys) and not (as_text and keys != sorted(keys)):
        return
    raise UsageError(
        "--class-names has only new names, which rename by index, but the dataset's own names can be ordered in two "
        f"ways. Ordered as text, it would be: {renamed}. Rename the classes in the dataset instead."
    )


def _expected_place(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts names as people do: digits by their number; capitals and accents make no difference."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(c))
    parts = re.split("([0-9]+)", letters)  # texts and digits in turn
    return tuple((len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts))


def _refuse_mix(own: list[str], given: list[str]) -> None:
    """One of the dataset's own names at the index of another one would be given to the wrong images."""
    lower = [name.casefold() for name in own]
    for number, name in enumerate(given):
        if name.casefold() in lower and lower[number] != name.casefold():
            missing = [other for other in own if other.casefold() not in {n.casefold() for n in given}]
            raise UsageError(
                f"--class-names: {name} is one of the dataset's own names, but {listed(missing)} is missing. "
                "Give all own names, in any order, or only new ones, which rename by index."
            )


def _drop_unused(names: list[str], numbers: dict[str, list[int]]) -> tuple[list[str], dict[str, list[int]], list[str]]:
    """Leave out the names that no image has.

    Returns:
        The names that are left.
        The labels as indices into them.
        The names that were left out.

    Raises:
        UsageError: another split has a class that no image of train has, so it cannot be learned.
    """
    kept = sorted(set(numbers["train"]))
    index = {number: i for i, number in enumerate(kept)}
    for split, values in numbers.items():
        for value in values:
            if value not in index:
                raise UsageError(
                    f"{split}: the label {brief(names[value])} is outside the names of train "
                    f"({listed(names[i] for i in kept)}). Remove these images, or add some of this class to train."
                )
    unused = [name for number, name in enumerate(names) if number not in index]
    numbers = {split: [index[value] for value in values] for split, values in numbers.items()}
    return [names[i] for i in kept], numbers, unused

"""Labels as people write them -> distinct texts: one for each image, and one for what is one class."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vlm.common import UsageError, listed, note

WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(\.0*)?")
ITEM = re.compile(r"'[^']+'|\"[^\"]+\"|[0-9]+")
LIST = re.compile(rf"\[\s*({ITEM.pattern})(\s*,\s*({ITEM.pattern}))*\s*\]")  # as a list is written into a CSV file
BETWEEN_LABELS = re.compile(r"[|;,]")
SHORTEST_WORD = 3  # letters; shorter ones, such as A and a, may be told apart by their capitals
MOST_SHOWN = 5
Numbers = dict[str, list[int]]


def distinct_labels(
    labels: Mapping[str, Sequence[object]], images: Mapping[str, Sequence[str]], given: Collection[str]
) -> tuple[list[str], Numbers]:
    """The distinct labels as texts, and the labels as indices into them.

    Args:
        labels: by split, without missing ones.
        images: what messages call the images, by split.
        given: the user's class names; one of these is one label, whatever it looks like.

    Returns:
        The texts, sorted.
        The labels of each split as indices into them.

    Raises:
        UsageError: an image has several labels, or labels are neither names nor whole numbers.
    """
    seen: dict[tuple[type, Any], int] = {}
    numbers = {}
    for split, column in labels.items():
        single = _single(column, given)
        _refuse_several(split, [i for i, v in enumerate(single) if isinstance(v, list)], single, images[split])
        try:
            numbers[split] = [seen.setdefault((type(value), value), len(seen)) for value in single]
        except TypeError as error:
            raise _not_a_label(next(type(value) for value in single if value.__hash__ is None)) from error
    counts = Counter(number for values in numbers.values() for number in values)
    texts = _texts([value for _, value in seen], [counts[number] for number in range(len(seen))])
    joined = {text: parts for text in set(texts) - set(given) if (parts := _parts(text)) and set(parts) <= set(texts)}
    if joined:
        for split, values in numbers.items():
            found = [i for i, number in enumerate(values) if texts[number] in joined]
            _refuse_several(split, found, {i: joined[texts[values[i]]] for i in found[:1]}, images[split])
    ordered = sorted(set(texts))
    index = {text: number for number, text in enumerate(ordered)}
    place = [index[text] for text in texts]
    return ordered, {split: [place[number] for number in values] for split, values in numbers.items()}


def tidy(name: str) -> str:
    """A name without white space around it, in one Unicode form."""
    return unicodedata.normalize("NFC", name.strip())


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers."""
    return all(map(WHOLE_NUMBER.fullmatch, names))


def merge_spellings(names: list[str], numbers: Numbers, apart: Collection[str]) -> tuple[list[str], Numbers, list[str]]:
    """Make one class of names that differ only in capitals, in white space, or as 1 and 1.0 do. A note counts them.

    The spelling that most images have is the name.

    Args:
        names: the class names; numbers: the labels of each split as indices into them.
        apart: names that are kept if all spellings of a class are among them.

    Returns:
        The names that are left, the labels as indices into them, and the names that had several spellings.
    """
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(meaning(name), []).append(number)
    several = [group for group in groups.values() if len(group) > 1 and not {names[i] for i in group} <= set(apart)]
    if not several:
        return names, numbers, []
    counts = Counter(number for values in numbers.values() for number in values)
    best = list(range(len(names)))
    phrases, winners = [], []
    for group in several:
        winner = max(group, key=lambda number: (counts[number], not names[number].isupper(), -number))
        for number in group:
            best[number] = winner
        phrases.append(f"{' and '.join(f'{names[i]} ({counts[i]:,})' for i in group)} are one class: {names[winner]}")
        winners.append(names[winner])
    shown = [*phrases[:MOST_SHOWN], *([f"{len(phrases) - MOST_SHOWN:,} more"] if len(phrases) > MOST_SHOWN else [])]
    note(f"note: {'; '.join(shown)}. If they are different classes, give all their names with --class-names.")
    kept = sorted(set(best))
    index = {number: i for i, number in enumerate(kept)}
    place = [index[number] for number in best]
    return [names[i] for i in kept], {s: [place[n] for n in values] for s, values in numbers.items()}, winners


def meaning(name: str) -> str:
    """What all spellings of a class have in common."""
    if WHOLE_NUMBER.fullmatch(name):
        return name.partition(".")[0]
    words = " ".join(name.split())
    return words.lower() if sum(map(str.isalpha, words)) >= SHORTEST_WORD else words


def _single(column: Sequence[object], given: Collection[str]) -> list[Any]:
    """Labels without the lists around single ones; lists of several different ones stay.

    Args:
        given: texts that are no lists.
    """
    values = []
    for value in column:
        if isinstance(value, str) and value.startswith("[") and LIST.fullmatch(value) and value not in given:
            value = [text.strip("'\"") for text in ITEM.findall(value)]
        if isinstance(value, list | tuple):
            different = list({str(item): item for item in value}.values())
            value = different if len(different) > 1 else different[0]
        values.append(value)
    return values


def _refuse_several(split: str, found: Sequence[int], labels: Any, images: Sequence[str]) -> None:
    """Refuse a split in which images have several labels.

    Args:
        found: the positions of these images; labels: the labels of the first, by position.
    """
    if found:
        raise UsageError(
            f"{split}: {len(found):,} of {len(images):,} images have more than one label, first {images[found[0]]}: "
            f"{listed(labels[found[0]])}. This program learns one class for each image: keep one label for each, or "
            "remove these images."
        )


def _parts(text: str) -> list[str]:
    """The labels that a text may be joined of; empty if it is one."""
    parts = list(map(tidy, BETWEEN_LABELS.split(text)))
    return parts if len(parts) > 1 else []


def _texts(values: Sequence[object], counts: Sequence[int]) -> list[str]:
    """Distinct values as texts. Numbers and truth values that are written as texts too are equal to them."""
    plain = [
        tidy(v) if isinstance(v, str) else int(v) if isinstance(v, float) and v.is_integer() else v for v in values
    ]
    kinds: Counter[type] = Counter()
    for value, count in zip(plain, counts, strict=True):
        kinds[type(value)] += count
    if other := [kind for kind in kinds if kind not in (str, int, bool)]:
        raise _not_a_label(other[0])
    texts = [value for value in plain if isinstance(value, str)]
    alike = {
        frozenset((int, str)): are_numbers(texts),
        frozenset((bool, str)): {text.lower() for text in texts} <= {"true", "false"},
    }
    if len(kinds) > 1 and not alike.get(frozenset(kinds)):
        said = ", ".join(f"{count} {kind.__name__}" for kind, count in kinds.items())
        raise UsageError(f"labels of several types: {said}. Expected one type.")
    return [str(value).capitalize() if bool in kinds else str(value) for value in plain]


def _not_a_label(kind: type) -> UsageError:
    return UsageError(f"labels of type {kind.__name__}. Expected one name or whole number for each image.")

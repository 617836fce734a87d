"""Labels as they are in the dataset -> class names and class numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from vlm.common import UsageError


@dataclass(frozen=True)
class Classes:
    """names: the class names in order; numbers: the labels of each split as indices into them;
    how: how both were found, in a few phrases."""

    names: list[str]
    numbers: dict[str, list[int]]
    how: list[str]


def is_missing(label: object, indices: bool) -> bool:
    """Whether a label says nothing: None, empty, not a number, or -1 if labels are indices into given names."""
    return label is None or label == "" or label != label or (indices and label == -1)


def number_labels(labels: Mapping[str, Sequence[object]], own: list[str] | None, given: list[str] | None) -> Classes:
    """Class names, and the labels of each split as indices into them.

    Args:
        labels: by split, without missing ones; "train" must be there.
        own: the dataset's names, into which the labels are indices; None: the labels themselves are the names, sorted.
        given: the user's names: the dataset's own in another order, or as many new ones, by index.

    Raises:
        UsageError: labels that cannot be classes, a label that train does not have, names that do not fit, less than
            two classes.
    """
    if own is None:
        names, numbers = _sorted_names(labels)
        how = ["sorted labels"]
    else:
        names, numbers = list(own), _checked_indices(labels, own)
        how = ["names of the dataset"]
    if given is not None:
        order, how = _match(names, given)
        names = list(given)
        numbers = {split: [order[number] for number in values] for split, values in numbers.items()}
    names, numbers, unused = _drop_unused(names, numbers)
    if unused:
        how.append(f"left out, as no image has them: {', '.join(unused)}")
    if broken := [name for name in names if len(name.splitlines()) > 1]:
        raise UsageError(
            f"a class name has several lines ({broken[0]!r}), but an answer is one line. "
            "Give other names with --class-names."
        )
    if len(names) < 2:
        raise UsageError(f"the dataset has only one class ({', '.join(names)}). Expected images of at least two.")
    return Classes(names, numbers, how)


def _sorted_names(labels: Mapping[str, Sequence[object]]) -> tuple[list[str], dict[str, list[int]]]:
    """Text is sorted as text, numbers as numbers; white space around text does not count."""
    values = {split: [_plain(value) for value in column] for split, column in labels.items()}
    types = Counter(type(value) for column in values.values() for value in column)
    if len(types) > 1:
        counts = ", ".join(f"{n} {kind.__name__}" for kind, n in types.items())
        raise UsageError(f"labels of several types: {counts}. Expected one type.")
    if not set(types) <= {str, int, bool}:
        raise UsageError(
            f"labels of type {next(iter(types)).__name__}. Expected one name or whole number for each image."
        )
    found = cast(dict[str, list[str]], values)  # or of int, or of bool: of one type that can be sorted
    distinct = sorted({value for column in found.values() for value in column})
    index = {value: number for number, value in enumerate(distinct)}
    numbers = {split: [index[value] for value in column] for split, column in found.items()}
    return [str(value) for value in distinct], numbers


def _plain(value: object) -> object:
    if isinstance(value, str):
        return value.strip()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _checked_indices(labels: Mapping[str, Sequence[object]], names: list[str]) -> dict[str, list[int]]:
    numbers = cast(dict[str, list[int]], labels)
    for split, values in numbers.items():
        for value in values:
            if not 0 <= value < len(names):
                raise UsageError(
                    f"{split}: the label {value} is outside the names: the dataset has {len(names)} "
                    f"(0 to {len(names) - 1})."
                )
    return numbers


def _match(own: list[str], given: list[str]) -> tuple[list[int], list[str]]:
    """Match the user's names with the dataset's own: by name if they are the same ones, else by index.

    Returns:
        For each own name the index of its name among the given ones.
        How they were matched, in a phrase.

    Raises:
        UsageError: another count of names, or a mix of own and new names.
    """
    if len(given) != len(own):
        raise UsageError(
            f"--class-names has {len(given)} names, but the dataset has {len(own)} classes: {', '.join(own)}. "
            "Give every name, or none."
        )
    for key in (str, str.casefold):
        position = {key(name): number for number, name in enumerate(given)}
        if len(position) == len(given) and set(position) == {key(name) for name in own}:
            return [position[key(name)] for name in own], ["--class-names, matched by name with the dataset's own"]
    _refuse_mix(own, given)
    renamed = [f"{old} -> {new}" for old, new in zip(own, given, strict=True) if old != new]
    return list(range(len(own))), [f"--class-names, renamed by index: {', '.join(renamed)}"]


def _refuse_mix(own: list[str], given: list[str]) -> None:
    """One of the dataset's own names at the index of another one would be given to the wrong images."""
    lower = [name.casefold() for name in own]
    for number, name in enumerate(given):
        if name.casefold() in lower and lower[number] != name.casefold():
            missing = [other for other in own if other.casefold() not in {n.casefold() for n in given}]
            raise UsageError(
                f"--class-names: {name} is one of the dataset's own names, but {', '.join(missing)} is missing. "
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
                    f"{split}: the label {names[value]} is outside the names of train "
                    f"({', '.join(names[i] for i in kept)}). Remove these images, or add some of this class to train."
                )
    unused = [name for number, name in enumerate(names) if number not in index]
    numbers = {split: [index[value] for value in values] for split, values in numbers.items()}
    return [names[i] for i in kept], numbers, unused

"""Labels as they were found -> class names and class numbers."""

from collections import Counter
from typing import Any

from vlm.common.errors import UsageError


def is_missing(label: Any, indices: bool) -> bool:
    """Whether a row has no label: nothing, not a number, or -1 where labels are indices into given names."""
    return label is None or label == "" or label != label or (indices and label == -1)


def number_labels(
    labels: dict[str, list[Any]], own: list[str] | None, given: list[str] | None
) -> tuple[list[str], dict[str, list[int]], list[str]]:
    """Class names, and the labels of each split as indices into them.

    Args:
        labels: by split, without missing ones; "train" must be there.
        own: the names that the labels are indices into; None: the labels themselves are the names, sorted.
        given: the user's names: the dataset's own in another order, or as many new ones, by index.

    Returns:
        The names in order; the numbers by split; how this came about, in a few phrases.

    Raises:
        UsageError: labels that are no classes, a label that train does not have, names that do not fit, less than two
            classes.
    """
    if own is None:
        own, numbers = _sorted_names(labels)
        how = ["sorted labels"]
    else:
        own, numbers = list(own), labels
        for split, values in labels.items():
            for value in values:
                if not 0 <= value < len(own):
                    raise UsageError(
                        f"{split}: the label {value} is outside the names: the dataset has {len(own)} (0 to {len(own) - 1})."
                    )
        how = ["names of the dataset"]
    names = own
    if given is not None:
        names, order, how = _apply_given(own, given)
        numbers = {split: [order[number] for number in values] for split, values in numbers.items()}
    names, numbers, unused = _drop_unused(names, numbers)
    if unused:
        how.append(f"left out, as no image has them: {', '.join(unused)}")
    if broken := [name for name in names if len(name.splitlines()) > 1]:
        raise UsageError(
            f"a class name of several lines ({broken[0]!r}): an answer is one line. Give other names with --class-names."
        )
    if len(names) < 2:
        raise UsageError(
            f"only one class ({', '.join(names)}) in the dataset. Expected images of at least two classes."
        )
    return names, numbers, how


def _sorted_names(labels: dict[str, list[Any]]) -> tuple[list[str], dict[str, list[int]]]:
    """Text is sorted as text, numbers as numbers; white space around text does not count."""
    values = {split: [_plain(value) for value in column] for split, column in labels.items()}
    kinds = Counter(type(value) for column in values.values() for value in column)
    if len(kinds) > 1:
        raise UsageError(
            f"labels of several kinds: {', '.join(f'{n} {kind.__name__}' for kind, n in kinds.items())}. Expected one kind."
        )
    if not set(kinds) <= {str, int, bool}:
        raise UsageError(
            f"labels of kind {next(iter(kinds)).__name__}. Expected one name or whole number for each image."
        )
    distinct = sorted({value for column in values.values() for value in column})
    index = {value: number for number, value in enumerate(distinct)}
    return [str(value) for value in distinct], {
        split: [index[value] for value in column] for split, column in values.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _apply_given(own: list[str], given: list[str]) -> tuple[list[str], list[int], list[str]]:
    """The user's names; for each own index the index of its name among them; how they were matched."""
    if len(given) != len(own):
        raise UsageError(
            f"--class-names has {len(given)} names, but the dataset has {len(own)} classes: {', '.join(own)}. Give every name, or none."
        )
    for key in (str, str.casefold):
        position = {key(name): number for number, name in enumerate(given)}
        if len(position) == len(given) and set(position) == {key(name) for name in own}:
            return (
                list(given),
                [position[key(name)] for name in own],
                ["--class-names, matched by name with the dataset's own"],
            )
    lower = [name.casefold() for name in own]
    for number, name in enumerate(given):
        if name.casefold() in lower and lower[number] != name.casefold():
            missing = [other for other in own if other.casefold() not in {n.casefold() for n in given}]
            raise UsageError(
                f"--class-names: {name} is one of the dataset's own names, but {', '.join(missing)} of them is not given. "
                "Give all of them, in any order, or only new ones, which rename by index."
            )
    renamed = [f"{old} -> {new}" for old, new in zip(own, given, strict=True) if old != new]
    return list(given), list(range(len(own))), [f"--class-names, renamed by index: {', '.join(renamed)}"]


def _drop_unused(names: list[str], numbers: dict[str, list[int]]) -> tuple[list[str], dict[str, list[int]], list[str]]:
    """Leave out the names that no image has.

    Raises:
        UsageError: a class that is to be recognized in another split cannot be learned from train.
    """
    learned = set(numbers["train"])
    for split, values in numbers.items():
        for value in values:
            if value not in learned:
                raise UsageError(
                    f"{split}: the label {names[value]} is outside the names of train ({', '.join(names[i] for i in sorted(learned))}). "
                    "Remove these images, or add some of this class to train."
                )
    kept = sorted(learned)
    index = {number: i for i, number in enumerate(kept)}
    unused = [name for number, name in enumerate(names) if number not in index]
    return (
        [names[i] for i in kept],
        {split: [index[value] for value in values] for split, values in numbers.items()},
        unused,
    )

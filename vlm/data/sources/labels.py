"""Labels that are spread over columns: a column of 0 and 1 for each class, or names next to numbers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm.common import UsageError, listed, note

ZEROS_AND_ONES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
# Columns of 0 and 1 that are about something else.
NO_CLASSES = {"train", "training", "validation", "val", "valid", "dev", "test", "testing", "eval"}
# What a column of names is called next to the column `label` of numbers; {} is the name of that column.
TEXT_COLUMNS = ("{}_text", "{}_name", "text_{}", "label_text", "label_name", "class_name", "category_name")


def one_hot_columns(columns: Sequence[str], values: Callable[[str], Sequence[object]]) -> list[str]:
    """The columns that have nothing but 0 and 1, if at least two of them have a 1."""
    asked = [
        name for name in columns if name.lower() not in NO_CLASSES and not name.lower().startswith(("is_", "has_"))
    ]
    bits = {name: found for name in asked if (found := _bits(values(name))) is not None}
    return list(bits) if sum(any(found) for found in bits.values()) > 1 else []


def _bits(values: Sequence[object]) -> list[bool] | None:
    """The values as booleans; None if they are other ones."""
    kinds = {value: ZEROS_AND_ONES.get(str(value).lower()) for value in _different(values)}
    if not kinds or None in kinds.values():
        return None
    return [bool(kinds[value]) for value in values]


def _different(values: Sequence[object]) -> set[Any]:
    try:
        return set(values)
    except TypeError:  # lists and objects
        return {None}


def one_hot_labels(columns: Mapping[str, Sequence[object]], names: Sequence[str], source: str) -> list[str | None]:
    """The name of the column that has the 1, for each row; None if none has.

    Args:
        columns: the columns of 0 and 1 by name.
        names: what messages call the rows.
        source: what the rows belong to, for messages.

    Raises:
        UsageError: a row has several ones, or another value.
    """
    bits = {name: _bits(values) for name, values in columns.items()}
    if other := [name for name, found in bits.items() if found is None]:
        raise UsageError(
            f"{source}: the column {other[0]} has other values than 0 and 1, and train has one 1 in a row (one-hot). "
            "Correct them, or name the column of the labels with --label-column."
        )
    labels: list[str | None] = [None] * len(names)
    several: list[int] = []
    for name, found in bits.items():
        for row, one in enumerate(found or ()):
            if one and labels[row] is not None:
                several.append(row)
            elif one:
                labels[row] = name
    if several:
        row = min(several)
        ones = [name for name, found in bits.items() if found and found[row]]
        raise UsageError(
            f"{source}: {len(set(several)):,} of {len(names):,} rows have more than one label, first {names[row]}: "
            f"{listed(ones)} (columns of 0 and 1: {listed(columns)}). Images are given one class each here. Keep one "
            "label for each, or name the column of the labels with --label-column."
        )
    return labels


def text_column(label: str, columns: Sequence[str]) -> str | None:
    """The column that by its name has the names of the numbers in the column `label`."""
    wanted = [pattern.format(label.lower()) for pattern in TEXT_COLUMNS]
    return next((name for name in columns if name != label and name.lower() in wanted), None)


def use_names(
    labels: Mapping[str, Sequence[object]], texts: Mapping[str, Sequence[object]], label: str, text: str
) -> tuple[list[str], dict[str, list[int | None]]] | None:
    """Name numbers by the texts next to them. A note says so, or why not.

    Args:
        labels: the column of numbers, by split.
        texts: the column of names, by split.
        label, text: the names of both columns.

    Returns:
        The names in the order of the numbers, and the labels as indices into them; None if the labels are no numbers or
        the two columns do not correspond one to one.
    """
    numbers = {role: list(map(_whole, values)) for role, values in labels.items()}
    pairs = {
        (number, one_text.strip())
        for role, values in numbers.items()
        for number, one_text in zip(values, texts[role], strict=True)
        if number is not None and isinstance(one_text, str) and one_text.strip()
    }
    found = {number for values in numbers.values() for number in values} - {None}
    found -= {-1} - {number for number, _ in pairs}  # a label that is hidden
    unlike = [
        value
        for role, values in labels.items()
        for value, number in zip(values, numbers[role], strict=True)
        if number is None and value is not None and value == value and str(value).strip()
    ]
    if unlike or not pairs:
        return None
    names = dict(pairs)
    if not len(names) == len(pairs) == len(set(names.values())) or set(names) != found:
        note(f"note: the column {text} is not used: it does not have one name for each number of the column {label}.")
        return None
    ordered = sorted(names)
    index = {number: i for i, number in enumerate(ordered)}
    note(f"note: the numbers of the column {label} have their names from the column {text}.")
    return [names[number] for number in ordered], {
        role: [None if number is None else index.get(number) for number in values] for role, values in numbers.items()
    }


def _whole(value: object) -> int | None:
    """A whole number, also as text; None for all other values."""
    if isinstance(value, float | str) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None

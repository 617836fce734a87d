"""Which column of a table has the images, the labels and the reasonings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vlm.common import UsageError, did_you_mean, listed
from vlm.config import Settings, reasoning_of

# Usual names, best first.
IMAGE_COLUMNS = (
    "image",
    "img",
    "picture",
    "photo",
    "pixel_values",
    "file",
    "file_name",
    "filename",
    "path",
    "image_path",
    "file_path",
    "filepath",
    "image_file",
    "images",
    "pictures",
    "image_name",
    "image_id",
    "id_code",
    "filepaths",
)
LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "species",
    "class_name",
    "label_name",
    "fine_label",
    "y",
)
ZEROS_AND_ONES = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use. split: the column that names the split of each row, if it was used."""

    image: str
    label: str
    reasoning: str | None
    split: str | None = None

    @property
    def used(self) -> list[str]:
        return [name for name in (self.image, self.label, self.reasoning, self.split) if name is not None]


def choose_columns(
    settings: Settings,
    columns: Sequence[str],
    images: Sequence[str] = (),
    classes: Sequence[str] = (),
    *,
    values: Callable[[str], Sequence[object]],
) -> Columns:
    """The columns that the settings name; those not named are found by their type, then by their name.

    Args:
        columns: all columns of the table.
        images: those whose type is image.
        classes: those whose type is class label.
        values: the first values of a column, which tell why no label column was recognized.

    Raises:
        UsageError: a named column is not there, or no column was recognized.
    """
    image = _choose("--image-column", settings.image_column, columns, images, IMAGE_COLUMNS)
    rest = [column for column in columns if column != image]
    classes = [column for column in classes if column != image]
    try:
        label = _choose("--label-column", settings.label_column, rest, classes, LABEL_COLUMNS, used=[image])
    except UsageError:
        if settings.label_column is None:
            _refuse_one_hot(f"--dataset {settings.dataset}", rest, values)
        raise
    reasoning = settings.reasoning_column
    if reasoning is not None:
        rest = [column for column in rest if column != label]
        _check_given("--reasoning-column", reasoning, rest, used=[image, label])
    return Columns(image, label, reasoning)


def _refuse_one_hot(dataset: str, columns: Sequence[str], values: Callable[[str], Sequence[object]]) -> None:
    """Name the columns of a table that has a column of 0 and 1 for each class."""
    found = {name: column for name in columns if (column := _zeros_and_ones(values(name))) is not None}
    if len(found) < 2:
        return
    ones = {sum(row) for row in zip(*found.values(), strict=True)}
    if ones == {1}:
        raise UsageError(
            f"{dataset}: the columns {listed(found)} have 0 and 1, with one 1 in each row (one-hot). "
            "Make one column of it that has the name of the class, and call it label."
        )
    raise UsageError(
        f"{dataset}: the columns {listed(found)} have 0 and 1, with {min(ones)} to {max(ones)} ones in a row. "
        "Expected one column that has the one class of each image."
    )


def _zeros_and_ones(values: Sequence[object]) -> list[int] | None:
    """The values as 0 and 1; None if they are others, or only zeros."""
    numbers = [ZEROS_AND_ONES.get(str(value).lower()) for value in values]
    found = [number for number in numbers if number is not None]
    return found if len(found) == len(numbers) and any(found) else None


def missing_column(image: str, split: str, columns: Iterable[str]) -> UsageError:
    """The error for a split without the image column that train has."""
    return UsageError(
        f"--image-column {image}: train has this column, but {split} does not. Columns there: {listed(columns)}."
    )


def reasoning_texts(values: Sequence[object], names: Sequence[str]) -> list[str | None]:
    """The texts of a reasoning column without the words that the response puts around them; None if a row has no text.

    Args:
        values: the column.
        names: what to call its rows in messages.

    Raises:
        UsageError: a value is not a text.
    """
    for value, name in zip(values, names, strict=True):
        if not (value is None or isinstance(value, str) or value != value):
            raise UsageError(f"--reasoning-column: {name} has a value of type {type(value).__name__}. Expected text.")
    return [reasoning_of(value) or None if isinstance(value, str) else None for value in values]


def _choose(
    flag: str,
    given: str | None,
    columns: Sequence[str],
    typed: Sequence[str],
    names: Sequence[str],
    used: Sequence[str] = (),
) -> str:
    """The column given, else of the columns of the right type (of all, if there are none) the best named one.

    Args:
        flag: the setting that names the column, for messages.
        columns: all columns that come into question.
        typed: those of them that have the right type.
        names: usual names, best first.
        used: columns that have another use already, for messages.
    """
    if given is not None:
        _check_given(flag, given, columns, used)
        return given
    for name in names:
        for column in typed or columns:
            if column.lower() == name:
                return column
    if typed:
        return typed[0]
    raise UsageError(
        f"{flag}: no column was recognized by its type or name. {_list(columns, used)} Name one with {flag}."
    )


def _check_given(flag: str, given: str, columns: Sequence[str], used: Sequence[str]) -> None:
    if given not in columns:
        raise UsageError(f"{flag} {given}: no such column. {_list(columns, used)}{did_you_mean(given, columns)}")


def _list(columns: Sequence[str], used: Sequence[str]) -> str:
    taken = f" ({listed(used)} {'has' if len(used) == 1 else 'have'} another use)" if used else ""
    return f"Columns there: {listed([*used, *columns]) or 'none'}{taken}."

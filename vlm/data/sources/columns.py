"""Which column of a table has the images, the labels and the reasonings."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.common.errors import UsageError, did_you_mean
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


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use."""

    image: str
    label: str
    reasoning: str | None


def choose_columns(
    settings: Settings, columns: Sequence[str], images: Sequence[str] = (), classes: Sequence[str] = ()
) -> Columns:
    """The columns that the settings name; those not named are found by their type, then by their name.

    Args:
        columns: all columns of the table.
        images: those whose type is image.
        classes: those whose type is class label.

    Raises:
        UsageError: a named column is not there, or no column was recognized.
    """
    image = _choose("--image-column", settings.image_column, columns, images, IMAGE_COLUMNS)
    rest = [column for column in columns if column != image]
    classes = [column for column in classes if column != image]
    label = _choose("--label-column", settings.label_column, rest, classes, LABEL_COLUMNS, used=[image])
    reasoning = settings.reasoning_column
    if reasoning is not None:
        rest = [column for column in rest if column != label]
        _check_given("--reasoning-column", reasoning, rest, used=[image, label])
    return Columns(image, label, reasoning)


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
    taken = f" ({', '.join(used)} {'has' if len(used) == 1 else 'have'} another use)" if used else ""
    return f"Columns there: {', '.join([*used, *columns]) or 'none'}{taken}."

"""Which column of a table has the images, the labels and the reasonings."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm.common import UsageError, did_you_mean, listed
from vlm.config import NO_LABELS, ClassifySettings, Settings, reasoning_of
from vlm.data.finding import is_image
from vlm.data.sources.labels import one_hot_columns
from vlm.data.sources.roles import names_splits
from vlm.data.spellings import are_numbers, meaning

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
    "image_filename",
    "img_path",
    "filenames",
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
    "choice",
    "cls",
)
NOTHING: Mapping[str, str] = {}
ROWS_LOOKED_AT = 1000  # of a column, to tell whether it has paths of images


@dataclass(frozen=True)
class Columns:
    """The names of the columns in use.

    label: in words, if it is spread over the columns `one_hot`, each of which has a 1 for the images of its class;
    empty if there is none and none is needed;
    group: the column of what belongs together, if one was named;
    split: the column that names the split of each row, if it was used;
    others: the columns that could have the labels, if none was recognized.
    """

    image: str
    label: str
    reasoning: str | None
    split: str | None = None
    one_hot: tuple[str, ...] = ()
    group: str | None = None
    others: tuple[str, ...] = ()

    @property
    def used(self) -> list[str]:
        label = self.one_hot or (self.label,)
        return [name for name in (self.image, *label, self.reasoning, self.split, self.group) if name is not None]


def choose_columns(
    settings: Settings,
    columns: Sequence[str],
    images: Sequence[str] = (),
    classes: Sequence[str] = (),
    *,
    values: Callable[[str], Sequence[object]],
    names_files: Callable[[Sequence[object]], bool] | None = None,
) -> Columns:
    """The columns that the settings name; those not named are found by their type, then by their name.

    Args:
        columns: all columns of the table.
        images: those whose type is image.
        classes: those whose type is class label.
        values: the values of a column, for those that are found by their content: paths of images, and 0 and 1.
        names_files: whether values are names of files that are there; None if no flag says how names become paths.

    Raises:
        UsageError: a named column is not there, or no column was recognized.
    """
    by_content = [] if images else [name for name in columns if _has_image_paths(values(name))]
    if not by_content and not images and names_files:
        by_content = [name for name in columns if names_files(values(name))] or _left_over(settings, columns, classes)
    image = _choose("--image-column", settings.image_column, columns, images, IMAGE_COLUMNS, only=by_content)
    rest = [column for column in columns if column != image]
    classes = [column for column in classes if column != image]
    label, one_hot = _choose_labels(settings, image, rest, classes, values)
    reasoning = settings.reasoning_column
    if reasoning is not None:
        rest = [column for column in rest if column not in (label, *one_hot)]
        _check_given("--reasoning-column", reasoning, rest, {image: "image column", label: "label column"})
    if settings.group_column is not None:
        rest = [column for column in columns if column not in (image, label, *one_hot)]
        _check_given("--group-column", settings.group_column, rest, {image: "image column", label: "label column"})
    others = () if label or settings.label_column else tuple(rest)
    return Columns(image, label, reasoning, one_hot=one_hot, group=settings.group_column, others=others)


def usual_labels(columns: Iterable[str]) -> list[str]:
    """The columns that have a usual name of labels, best first."""
    return sorted(
        (name for name in columns if name.lower() in LABEL_COLUMNS), key=lambda n: LABEL_COLUMNS.index(n.lower())
    )


def _choose_labels(
    settings: Settings,
    image: str,
    columns: Sequence[str],
    classes: Sequence[str],
    values: Callable[[str], Sequence[object]],
) -> tuple[str, tuple[str, ...]]:
    """The column of the labels, and the columns of 0 and 1 that it is spread over, if it is; see `Columns`.

    Args:
        image: the column of the images; columns: all others.
    """
    if not settings.labels_needed and settings.label_column == NO_LABELS and NO_LABELS not in columns:
        return "", ()
    only = columns if len(columns) == 1 else _only_labels(columns, values) if settings.labels_needed else ()
    try:
        named = settings.label_column
        return _choose("--label-column", named, columns, classes, LABEL_COLUMNS, {image: "image column"}, only), ()
    except UsageError:
        one_hot = () if settings.label_column else tuple(one_hot_columns(columns, values))
        others = [name for name in columns if name not in one_hot and not names_splits(name, [values(name)])]
        if one_hot and not any(_could_be_labels(values(name)) for name in others):
            return f"one-hot: {listed(one_hot)}", one_hot
        if isinstance(settings, ClassifySettings) and not settings.label_column:
            of_model = [name for name in columns if _are_names(values(name), settings.model_classes)]
            if len(of_model) == 1:
                return of_model[0], ()
        if settings.labels_needed or settings.label_column:
            raise
        return "", ()


def _left_over(settings: Settings, columns: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The only column that is left if that of the labels was named, or has a usual name or type; else none."""
    labels = [settings.label_column] if settings.label_column else [*classes, *usual_labels(columns)][:1]
    rest = [name for name in columns if name not in labels]
    return rest if labels and len(rest) == 1 else []


def _only_labels(columns: Sequence[str], values: Callable[[str], Sequence[object]]) -> list[str]:
    """The only column that could have labels, next to others that are mostly empty, such as remarks; else none."""
    filled = [name for name in columns if not _is_mostly_empty(values(name))]
    return filled if len(filled) == 1 and _could_be_labels(values(filled[0])) else []


def _is_mostly_empty(values: Sequence[object]) -> bool:
    first = values[:ROWS_LOOKED_AT]
    return 2 * sum(value in (None, "") for value in first) > len(first)


def _could_be_labels(values: Sequence[object]) -> bool:
    """Whether a column has texts that come again and again."""
    texts = [value for value in values[:ROWS_LOOKED_AT] if isinstance(value, str)]
    return len(texts) > 3 and 1 < len(set(texts)) <= len(texts) / 2


def _are_names(values: Sequence[object], names: Sequence[str]) -> bool:
    """Whether at least half of the values of a column are among these names. Numbers could mean anything."""
    if not names or are_numbers(list(names)):
        return False
    known = set(map(meaning, names))
    texts = [value for value in values[:ROWS_LOOKED_AT] if isinstance(value, str) and value.strip()]
    return bool(texts) and 2 * sum(meaning(text) in known for text in texts) >= len(texts)


def _has_image_paths(values: Sequence[object]) -> bool:
    """Whether the first values of a column are paths of images by their endings."""
    texts = [value for value in values[:ROWS_LOOKED_AT] if value is not None]
    return bool(texts) and all(isinstance(text, str) and is_image(Path(text)) for text in texts)


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
    used: Mapping[str, str] = NOTHING,
    only: Sequence[str] = (),
) -> str:
    """The column given, else of the columns of the right type (of all, if there are none) the best named one, else the
    one that nothing but its content speaks for.

    Args:
        flag: the setting that names the column, for messages.
        columns: all columns that come into question.
        typed: those of them that have the right type.
        names: usual names, best first.
        used: columns that have a use already, with what it is, for messages.
        only: columns that could be the right one by their content.
    """
    if given is not None:
        _check_given(flag, given, columns, used)
        return given
    for name in names:
        for column in typed or columns:
            if column.lower() == name:
                return column
    if typed or len(only) == 1:
        return [*typed, *only][0]
    raise UsageError(
        f"{flag}: no column was recognized by its type or name. {_list(columns, used)} Name one with {flag}."
    )


def _check_given(flag: str, given: str, columns: Sequence[str], used: Mapping[str, str]) -> None:
    if given not in columns:
        raise UsageError(f"{flag} {given}: no such column. {_list(columns, used)}{did_you_mean(given, columns)}")


def _list(columns: Sequence[str], used: Mapping[str, str]) -> str:
    taken = f" ({listed(f'{name} is the {use}' for name, use in used.items())})" if used else ""
    return f"Columns there: {listed([*used, *columns]) or 'none'}{taken}."

"""One split of a dataset for a trained model. Its images may lack labels, and its classes need not be the model's.

N = images.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.common import UsageError, listed
from vlm.config import NO_LABELS, ClassifySettings
from vlm.data.classes import NO_LABEL, checked_indices, in_order, is_missing, match_given, short_names
from vlm.data.describe import name_and_kind, public_name
from vlm.data.load import check_column_flags
from vlm.data.sources import Rows, Source, read_source
from vlm.data.spellings import are_numbers, distinct_labels, meaning, merge_spellings, tidy

SPLIT = "the dataset"  # what messages about labels call it


@dataclass(frozen=True)
class LabeledImages:
    """The images of one split as a dataset has them.

    Attributes:
        rows: the images and their names.
        class_names: the names of the classes that some image has.
        labels: (N,) index into the class names, None for an image without a label.
        source: what reports say about the dataset, as JSON values.
        summary: rows of the table "what was detected".
    """

    rows: Rows
    class_names: list[str]
    labels: list[int | None]
    source: dict[str, Any]
    summary: list[tuple[str, str]]


def read_images(settings: ClassifySettings, dataset: object = None, classes: Collection[str] = ()) -> LabeledImages:
    """Read one split of the dataset that the settings name: the one that `--split` asks for, else that for the test,
    else the only one. Nothing is decoded.

    Args:
        dataset: a dataset that a program has made, in the place of the one that the settings name.
        classes: names that are classes although they look like a missing label, such as the model's class null.

    Raises:
        UsageError: there is no such dataset or split, or its labels cannot be classes.
    """
    source = read_source(settings, dataset)
    if settings.label_column != NO_LABELS:
        check_column_flags(source, settings)
    ((role, rows),) = source.splits.items()
    if not rows.names:
        raise UsageError(f"{settings.of_dataset}: the split {source.split_names[role]} has no image.")
    names, labels = _numbered(rows, source, settings, classes)
    split, columns = source.split_names[role], source.columns
    about = {
        "dataset": public_name(settings, source),
        "config": settings.dataset_config,
        "commit": source.commit,
        "kind": source.kind,
        "split": split,
        "image_column": columns and columns.image,
        "label_column": (columns and columns.label) or None,
        "other_splits": source.others,
    }
    return LabeledImages(rows, names, labels, about, _rows_of_table(settings, source, split, labels))


def match_classes(own: Sequence[str], *classes: Sequence[str]) -> list[int | None]:
    """The class of a model for each class name of a dataset: of the same name, else of the only one that differs in
    white space or capitals only, as the training merges spellings.

    Args:
        own: the class names of the dataset.
        classes: one or several names for each class of the model, such as codes and readable names; empty if there are
            none. The kind of name that most of the dataset's are comes first.

    Returns:
        The index of the model's class for each own name, None if the model lacks it.
    """
    found = [[_find(name, names) for name in own] for names in classes if names]
    found.sort(key=lambda indices: indices.count(None))
    return [next((index for index in of_name if index is not None), None) for of_name in zip(*found, strict=True)]


def _find(name: str, names: Sequence[str]) -> int | None:
    if name in names:
        return list(names).index(name)
    alike = [number for number, other in enumerate(names) if meaning(other) == meaning(name)]
    return alike[0] if len(alike) == 1 else None


def _numbered(
    rows: Rows, source: Source, settings: ClassifySettings, classes: Collection[str]
) -> tuple[list[str], list[int | None]]:
    """The names of the classes that occur, and for each image the index of its own or None."""
    given = settings.class_names and list(map(tidy, settings.class_names))
    known = _with_labels(rows, source, [*classes, *(given or ())]) if settings.label_column != NO_LABELS else []
    values: Mapping[str, Sequence[object]] = {SPLIT: [rows.labels[i] for i in known]}
    if source.class_names is not None:
        names, numbers = short_names(list(source.class_names), [])[0], checked_indices(values, source.class_names)
    elif known:
        names, numbers = distinct_labels(values, {SPLIT: [rows.names[i] for i in known]}, given or ())
    else:
        return [], [None] * len(rows.labels)
    names, numbers = in_order(names, numbers)
    if given is not None:
        names, numbers, _ = merge_spellings(names, numbers, given)
        order = _some_of(names, given) or match_given(names, given)[0]
        names, numbers = given, {SPLIT: [order[number] for number in numbers[SPLIT]]}
    used = sorted(set(numbers[SPLIT]))
    place = {number: i for i, number in enumerate(used)}
    labels: list[int | None] = [None] * len(rows.labels)
    for i, number in zip(known, numbers[SPLIT], strict=True):
        labels[i] = place[number]
    return [names[number] for number in used], labels


def _with_labels(rows: Rows, source: Source, classes: Collection[str]) -> list[int]:
    """The positions of the images that have a label. The name of a folder is one, whatever it is."""
    words = NO_LABEL - {name.strip().lower() for name in classes} if source.columns else ()
    indices = source.class_names is not None
    return [i for i, label in enumerate(rows.labels) if not is_missing(label, indices, words)]


def _some_of(own: Sequence[str], given: Sequence[str]) -> list[int] | None:
    """The place of each class of a split among more names that were given: the place of the same name, or the number
    that the class is, if there is a 0. None if there are no more names, or it is neither."""
    if len(given) <= len(own):
        return None
    lower = [name.casefold() for name in given]
    if len(set(lower)) == len(lower) and all(name.casefold() in lower for name in own):
        return [lower.index(name.casefold()) for name in own]
    numbers = [int(meaning(name)) for name in own] if are_numbers(own) else []
    # Without a 0, the numbers may begin with 1.
    return numbers if numbers and min(numbers) == 0 and max(numbers) < len(given) else None


def _rows_of_table(
    settings: ClassifySettings, source: Source, split: str, labels: Sequence[int | None]
) -> list[tuple[str, str]]:
    columns, missing = source.columns, labels.count(None)
    table = [("dataset", name_and_kind(settings, source))]
    if columns:
        among = f" among {listed(columns.others)}" if columns.others else ""
        none = f"none was recognized{among} (--label-column names one)"
        none = "not used" if settings.label_column == NO_LABELS else none
        table += [("image column", columns.image), ("label column", columns.label or none)]
    table.append(("images", f"{len(labels):,} ({split})"))
    if missing:
        table.append(("without a label", f"{missing:,} of them, which are only classified"))
    if source.others:
        table.append(("unused splits", ", ".join(source.others)))
    return table


def counted(names: Sequence[str], labels: Sequence[int | None]) -> str:
    """Class names with the number of their images, in words."""
    counts = Counter(label for label in labels if label is not None)
    return listed(f"{name} ({counts[number]:,})" for number, name in enumerate(names))

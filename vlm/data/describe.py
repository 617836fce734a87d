"""What is said about a dataset: the table "what was detected" and the metadata of the model."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.common import listed
from vlm.config import IN_MEMORY, Settings
from vlm.data.sources.rows import Source
from vlm.data.splits import ROLES, Data, Split


def detected_rows(
    settings: Settings,
    source: Source,
    origins: dict[str, str],
    how: Sequence[str],
    data: Data,
    overlap: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """The rows of the table "what was detected".

    Args:
        origins: where the images of each role are from, in words.
        how: how the class names were found, in phrases.
        overlap: the rows about equal images and near-duplicates.
    """
    columns, names = source.columns, data.class_names
    rows = [("fold", f"{settings.fold or 1} of {settings.folds}")] if settings.folds else []
    rows.append(("dataset", name_and_kind(settings, source)))
    if columns:
        rows += [("image column", columns.image), ("label column", columns.label)]
    if groups := _groups(settings, data):
        rows.append(("groups", groups))
    if columns and columns.split:
        rows.append(("split column", columns.split))
    rows += [("classes", f"{len(names)}: {listed(names)}"), ("class names", "; ".join(how))]
    rows += [(role, _images(getattr(data, role), origins[role])) for role in ROLES]
    if columns and columns.reasoning:
        rows += _reasoning_rows(columns.reasoning, data.train.reasonings)
    if source.others:
        rows.append(("unused splits", ", ".join(source.others)))
    if data.skipped:
        rows.append(("skipped", _skipped(data)))
    return [*rows, *overlap]


def _groups(settings: Settings, data: Data) -> str | None:
    """What belongs together, and how many groups there are in each split; None if nothing was said about it."""
    if not data.train.has_groups:
        return None
    groups = {role: set(getattr(data, role).groups) - {None} for role in ROLES}
    counts = ", ".join(f"{len(found):,} in {role}" for role, found in groups.items())
    every = set().union(*groups.values())
    return f"{settings.group_column or settings.group_pattern}: {len(every):,} groups ({counts})"


def _reasoning_rows(column: str, texts: Sequence[str | None]) -> list[tuple[str, str]]:
    own = sum(text is not None for text in texts)
    rows = [("reasoning column", f"{column}: {own:,} of {len(texts):,} training images have a text")]
    if own < len(texts):
        rows.append(("without a text", f"{len(texts) - own:,} images, which get the response of their class"))
    return rows


def count_again(data: Data) -> None:
    """Bring the counts in summary and metadata up to date after images were left out."""
    splits = {role: getattr(data, role) for role in ROLES}
    about = data.source["splits"]
    rows = {role: _images(split, about[role]["from"]) for role, split in splits.items()} | {"skipped": _skipped(data)}
    data.summary = list((dict(data.summary) | rows).items())
    for role, split in splits.items():
        about[role]["pictures"] = len(split)
    data.source["unreadable"] = len(data.skipped)


def _images(split: Split, origin: str) -> str:
    return f"{len(split):,} images ({origin})"


def _skipped(data: Data) -> str:
    return f"{len(data.skipped)} unreadable image{'s' * (len(data.skipped) > 1)}"


def data_metadata(settings: Settings, source: Source, origins: dict[str, str], data: Data) -> dict[str, Any]:
    """What the metadata of the model say about the data, as JSON values.

    Of a local dataset they have only the name of its folder or file: its path tells about the user's machine.
    """
    columns = source.columns
    return {
        "dataset": public_name(settings, source),
        "config": settings.dataset_config,
        "commit": source.commit,
        "kind": source.kind,
        "image_column": columns and columns.image,
        "label_column": columns and columns.label,
        "reasoning_column": columns and columns.reasoning,
        "split_column": columns and columns.split,
        "group_column": columns and columns.group,
        "splits": {role: {"from": origins[role], "pictures": len(getattr(data, role))} for role in ROLES},
        "training_images": None if data.stream else _of_each_class(data.train, len(data.class_names)),
        "left_alone": source.others,
        "unreadable": len(data.skipped),
    }


def _of_each_class(split: Split, classes: int) -> list[int]:
    counts = Counter(split.labels)
    return [counts[number] for number in range(classes)]


def name_and_kind(settings: Settings, source: Source) -> str:
    """What the table "what was detected" calls a dataset."""
    if settings.demo:
        return source.kind
    if settings.dataset == IN_MEMORY:
        return f"{source.kind}, in memory"
    return f"{source.hub_id or settings.dataset} ({source.kind})"


def public_name(settings: Settings, source: Source) -> str:
    name = settings.dataset
    if settings.demo or name is None:
        return source.kind
    return source.hub_id or Path(name).resolve().name

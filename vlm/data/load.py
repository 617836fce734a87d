"""Any labeled source of images -> a dataset that is ready for training, checked and split."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm.common import UsageError, listed, note
from vlm.config import Settings
from vlm.data.classes import NO_LABEL, PERHAPS_NO_LABEL, Classes, is_missing, number_labels
from vlm.data.cutting import check_enough, cut_from_train, limit_splits, take_shots
from vlm.data.describe import data_metadata, detected_rows
from vlm.data.duplicates import cure_of_near, find_overlap, without_copies
from vlm.data.excluding import exclude
from vlm.data.folds import cut_fold, fold_metadata, rows_of_folds
from vlm.data.known import KnownImages
from vlm.data.readable import Readable, decode, keep_readable, only_say, refuse
from vlm.data.sources import EXPECTED, HUB, Rows, Source, groups_by_pattern, point_out_groups, read_source
from vlm.data.splits import ROLES, Data, Split
from vlm.data.stream import label_key
from vlm.data.unchecked import is_checked_first, is_large, look_at_some

EDGE_PERCENTILE = 95  # a few large images among small ones should not slow down all


def load_data(settings: Settings, dataset: object = None) -> Data:
    """Read, check and split the dataset that the settings name. The same settings give the same splits.

    Args:
        dataset: a `Dataset` or `DatasetDict` in the place of the one that the settings name.

    Raises:
        UsageError: there is no such dataset, or it cannot be trained on; the message says what was expected.
    """
    source = read_source(settings, dataset)
    _check_source(source, settings)
    _find_groups(source, settings)
    if settings.exclude:
        source.splits = exclude(source.splits, settings.exclude)
    hidden = _leave_out_unlabeled(source, settings)
    rows = {role: rows for role, rows in source.splits.items() if role not in hidden}
    if settings.folds:
        source.others += [source.split_names[role] for role in source.splits if role == "test" or role in hidden]
        rows = rows_of_folds(rows)
    classes = _classes(source, rows, settings)
    names = classes.names
    splits = {role: Split(rows[role], range(len(rows[role].labels)), classes.numbers[role]) for role in rows}
    cut = [role for role in ROLES if role not in splits]
    # The sample of a stream need not have all classes, and is as large as it is.
    known = KnownImages(_place(settings)) if is_large(splits) else None
    readable = keep_readable(splits, [], []) if source.stream else _readable_splits(splits, cut, names, settings, known)
    checked = source.stream is not None or is_checked_first(readable.splits, settings)
    splits = without_copies(readable.splits, cut) if checked else readable.splits
    fold = {"fold": fold_metadata(splits, settings)} if settings.folds else {}
    splits["train"] = take_shots(splits["train"], names, settings)
    _check_reasonings(source, splits["train"])
    _note_missing_classes(splits, names)
    _note_large_validation(splits, "validation" in cut or bool(settings.folds), settings)
    cure = cure_of_near(source.columns is not None, bool(cut or settings.folds))
    overlap = find_overlap(splits, names, cure, checked)
    data = Data(
        splits["train"],
        splits["validation"],
        splits["test"],
        class_names=names,
        edge=int(np.percentile(readable.edges, EDGE_PERCENTILE, method="higher")),
        skipped=readable.skipped,
        overlap=overlap.counts,
        near=overlap.near,
        cut=cut,
        stream=source.stream,
        checked=checked,
        known=known,
    )
    origins = {role: _origin(role, source, hidden, settings, data) for role in ROLES}
    data.summary = detected_rows(settings, source, origins, classes.how, data, overlap.rows)
    data.source = data_metadata(settings, source, origins, data) | fold
    return data


def _classes(source: Source, rows: Mapping[str, Rows], settings: Settings) -> Classes:
    """The class names, and the labels as indices into them. Of a stream they are known before it is read."""
    labels: dict[str, Sequence[object]] = {role: rows[role].labels for role in rows}
    images: dict[str, Sequence[str]] = {role: rows[role].names for role in rows}
    if source.stream is None:
        return number_labels(labels, images, source.class_names, settings.class_names)
    every: Sequence[object] = range(len(source.class_names)) if source.class_names else settings.class_names or []
    labels |= {"sample": labels["train"], "train": every}
    images |= {"sample": images["train"], "train": list(map(str, every))}
    found = number_labels(labels, images, source.class_names, settings.class_names)
    source.stream.numbers = dict(zip(map(label_key, every), found.numbers["train"], strict=True))
    return replace(found, numbers={**found.numbers, "train": found.numbers.pop("sample")})


def _readable_splits(
    splits: dict[str, Split], cut: list[str], names: list[str], settings: Settings, known: KnownImages | None
) -> Readable:
    """Cut and limit the splits and decode their images.

    All images are decoded before train is cut, so that equal ones stay together. With `--max-samples` only those that
    are used are decoded, and of a large dataset only some (unchecked.py). Of folds, the images are limited and decoded
    first, so that all folds have the same ones.
    """
    complain = only_say if settings.show_data else refuse
    if settings.folds:
        if settings.max_samples is not None:
            splits = limit_splits(splits, settings.max_samples, names, settings.seed)
        decode(splits, known)
        readable = keep_readable(splits, names, [], complain)
        return replace(readable, splits=cut_fold(readable.splits["train"], names, settings))
    check_enough(splits["train"].labels, cut, names)
    if settings.max_samples is None and is_checked_first(splits, settings):
        decode(splits, known)
    splits = cut_from_train(splits, cut, names, settings)
    if settings.max_samples is not None:
        splits = limit_splits(splits, settings.max_samples, names, settings.seed)
    if not is_checked_first(splits, settings):
        return look_at_some(splits, settings.seed, complain)
    return keep_readable(splits, names, cut, complain)


def _place(settings: Settings) -> str:
    """A name for a dataset, that no other one on this machine has."""
    name = settings.dataset or ""
    return f"{Path(name).resolve() if Path(name).exists() else name} {settings.dataset_config}"


def _check_source(source: Source, settings: Settings) -> None:
    if "train" not in source.splits:
        there = ", ".join(sorted([*source.split_names.values(), *source.others])) or "none"
        cure = EXPECTED if there == "none" else "Name one with --dataset-split."
        raise UsageError(f"{settings.of_dataset}: no split called train. Splits there: {there}. {cure}")
    check_column_flags(source, settings)


def check_column_flags(source: Source, settings: Settings) -> None:
    """Refuse flags about columns that a dataset of this kind does not have.

    Raises:
        UsageError: there are such flags.
    """
    if source.columns is None and (given := [flag for flag, value in _table_flags(settings).items() if value]):
        raise UsageError(
            f'{" and ".join(given)}: the dataset is of the kind "{source.kind}", which has no columns. Leave '
            f"{'it' if len(given) == 1 else 'them'} out."
        )
    if settings.no_header and source.kind != "CSV file":
        raise UsageError(f"--no-header: the dataset is of the kind {source.kind}, not a CSV file. Leave it out.")


def _find_groups(source: Source, settings: Settings) -> None:
    """Groups in the names of images, if a pattern was given; if nothing was said about groups, names that look so."""
    if settings.group_pattern:
        for role, rows in source.splits.items():
            rows.groups = groups_by_pattern(rows.names, settings.group_pattern, source.split_names[role])
    elif not settings.group_column and source.kind != HUB and not settings.demo and not source.stream:
        point_out_groups(source.splits["train"].names)


def _table_flags(settings: Settings) -> dict[str, object]:
    return {
        "--image-column": settings.image_column,
        "--label-column": settings.label_column,
        "--reasoning-column": settings.reasoning_column,
        "--group-column": settings.group_column,
        "--image-folder": settings.image_folder,
        "--image-suffix": settings.image_suffix,
    }


def _leave_out_unlabeled(source: Source, settings: Settings) -> list[str]:
    """Leave out the images that have no label, and count them in a note.

    Returns:
        The roles whose labels are all hidden, as in the test splits of competitions.

    Raises:
        UsageError: a split is empty, or no image of train has a label.
    """
    # The names of folders, and names that the user gives, are classes, whatever they are.
    given = {name.lower() for name in settings.class_names or ()}
    words = NO_LABEL - given if source.columns else ()
    hidden = []
    for role, rows in list(source.splits.items()):
        name = source.split_names[role]
        if not rows.labels:
            raise UsageError(
                f"the split {name} is empty. Expected at least one image. "
                "If you remove the split, it is cut from train."
            )
        missing = [i for i, label in enumerate(rows.labels) if is_missing(label, source.class_names is not None, words)]
        if source.columns and not source.class_names:
            _point_out(PERHAPS_NO_LABEL - given, rows.labels, name)
        if not missing:
            continue
        if len(missing) < len(rows.labels):
            first = ", ".join(rows.names[i] for i in missing[:3])
            count = f"{len(missing):,} of {len(rows.labels):,}"
            note(f"note: {name}: {count} images have no label and are left out, first {first}.")
            lost = set(missing)
            source.splits[role] = rows.take([i for i in range(len(rows.labels)) if i not in lost])
        elif role == "train":
            raise UsageError(
                f"{name}: none of the {len(missing):,} images has a label. "
                "Label them, or name another column with --label-column."
            )
        else:
            hidden.append(role)
    return hidden


def _point_out(words: Collection[str], labels: Sequence[object], split: str) -> None:
    """Say if labels are taken for a class although they may mean that there is none."""
    found = Counter(label for label in labels if isinstance(label, str) and label.strip().lower() in words)
    for label, count in found.items():
        note(
            f"note: {split}: {count:,} images have the label {label}, which is taken for a class. If it means that "
            "they have no label, leave these cells empty."
        )


def _note_missing_classes(splits: dict[str, Split], names: Sequence[str]) -> None:
    """Say of which classes a split has no image: its accuracy says nothing about them."""
    for role in ("validation", "test"):
        there = set(splits[role].labels)
        if missing := [name for number, name in enumerate(names) if number not in there]:
            note(f"warning: {role} has no image of {listed(missing)}, so its accuracy says nothing about them.")


def _note_large_validation(splits: dict[str, Split], is_cut: bool, settings: Settings) -> None:
    """Say that much more of the images is validation than was asked for, since no group is cut apart."""
    count = len(splits["validation"])
    both = count + len(splits["train"])
    if is_cut and splits["train"].has_groups and count > 2 * settings.validation_ratio * both:
        note(
            f"note: validation has {count:,} of the {both:,} images that are not in the test, which is more than "
            f"--validation-ratio {settings.validation_ratio:g}: no group is cut apart, and each class needs one there."
        )


def _check_reasonings(source: Source, train: Split) -> None:
    column = source.columns and source.columns.reasoning
    if column and not any(train.reasonings):
        raise UsageError(f"--reasoning-column {column}: no training image has a text there. Name another column.")


def _drawn(role: str, source: Source, settings: Settings, data: Data) -> str:
    """Of how many images those of a split were drawn by `--max-samples`."""
    most = settings.max_samples
    if most is None or data.stream or settings.shots or len(getattr(data, role)) < most:
        return ""
    total = len(source.splits[role].labels) if role in source.splits and not (role == "train" and data.cut) else 0
    return f", drawn from {total:,}" if total > most else ", drawn by --max-samples"


def _origin(role: str, source: Source, hidden: Sequence[str], settings: Settings, data: Data) -> str:
    """Where the images of a role are from, in words."""
    shots = settings.shots
    if settings.folds:
        fold = f"fold {settings.fold or 1} of {settings.folds}"
        origin = {"test": fold, "validation": "cut from the other folds", "train": "the other folds"}[role]
    elif role in hidden:
        return f"cut from train, as {source.split_names[role]} has no labels"
    else:
        origin = source.split_names.get(role, "cut from train") + _drawn(role, source, settings, data)
    return f"{origin}, {shots} of each class" if role == "train" and shots is not None else origin

"""Any labeled source -> splits of (image, label) with class names, checked."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm.common.errors import UsageError
from vlm.common.progress import note, progress
from vlm.config import Settings
from vlm.data.classes import is_missing, number_labels
from vlm.data.images import UnreadableImage, image_key, open_image
from vlm.data.sources import EXPECTED, Rows, Source, read_source

ROLES = ("train", "validation", "test")
MOST_UNREADABLE = 0.05  # share of a split
MOST_SHOWN = 5
MOST_IMAGES = 95  # percent; a few large ones among small ones should not slow down all


@dataclass
class Sample:
    """One labeled image, read and decoded when `image` is asked for and not before.

    source: an RGB image that is loaded, or what opens it; label: index into the class names; name: what to call it;
    reasoning: a text about it; known_key: its `key`, if known.
    """

    source: Image.Image | Callable[[], Image.Image]
    label: int
    name: str
    reasoning: str | None = None
    known_key: str | None = None

    @cached_property
    def image(self) -> Image.Image:
        """RGB, loaded. Raises UnreadableImage where it cannot be decoded."""
        return self.source() if callable(self.source) else self.source

    @cached_property
    def key(self) -> str:
        """The `image_key`, for which an image is opened only where it is not known."""
        return self.known_key or image_key(self.image)


class Split:
    """Labeled images, decoded each time one is looked at. Can be pickled, for the processes of a DataLoader.

    Attributes:
        labels: the class numbers, without decoding.
        keys: the `image_key` of each image, None where it is not known.
    """

    def __init__(
        self, rows: Rows, indices: Sequence[int], labels: Sequence[int], keys: Sequence[str | None] | None = None
    ) -> None:
        self._rows = rows
        self._indices = list(indices)
        self.labels = list(labels)
        self.keys = list(keys or [None] * len(self._indices))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Sample:
        row = self._indices[i]
        return Sample(partial(self._open, i), self.labels[i], self._rows.names[row], self._reasoning(row), self.keys[i])

    def _open(self, i: int) -> Image.Image:
        row = self._indices[i]
        return open_image(self._rows.images[row], self._rows.names[row])

    def _reasoning(self, row: int) -> str | None:
        return self._rows.reasonings[row] if self._rows.reasonings else None

    @property
    def names(self) -> list[str]:
        """What to call the images, in their order."""
        return [self._rows.names[i] for i in self._indices]

    @property
    def reasonings(self) -> list[str | None]:
        """The texts about the images, in their order; None where there is none."""
        return [self._reasoning(i) for i in self._indices]

    def take(self, positions: Sequence[int]) -> "Split":
        """The samples at some positions, in their order there."""
        return Split(
            self._rows, *([values[i] for i in positions] for values in (self._indices, self.labels, self.keys))
        )


@dataclass
class Data:
    """A dataset that is ready for training.

    edge: 95% of the training images have no edge longer than this, in pixels;
    summary: rows of the table "what was detected"; skipped: each unreadable image with the reason;
    source: what the metadata of the model say about the data, as JSON values.
    """

    train: Split
    validation: Split
    test: Split
    class_names: list[str]
    edge: int
    summary: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)


def load_data(settings: Settings) -> Data:
    """Read, check and split the dataset that the settings name. The same settings give the same splits.

    Raises:
        UsageError: no such dataset, or one that cannot be trained on: the message says what was expected.
    """
    source = read_source(settings)
    if "train" not in source.splits:
        raise UsageError(
            f"--dataset {settings.dataset}: no split called train; there are: {', '.join(_all_names(source))}. {EXPECTED}"
        )
    if source.image_column is None and (settings.image_column or settings.label_column or settings.reasoning_column):
        raise UsageError(
            "--image-column, --label-column and --reasoning-column: the dataset is of the kind "
            f'"{source.kind}", which has no columns. Leave them out.'
        )
    origins = {role: source.split_names.get(role, "") for role in ROLES}
    for role in _without_labels(source):
        origins[role] = f"cut from train, as {source.split_names[role]} has no labels"
        del source.splits[role]
    labels = {role: rows.labels for role, rows in source.splits.items()}
    names, numbers, how = number_labels(labels, source.class_names, settings.class_names)
    splits = {role: Split(rows, range(len(rows.labels)), numbers[role]) for role, rows in source.splits.items()}
    missing = [role for role in ROLES if role not in splits]
    for role in missing:
        origins[role] = origins[role] or "cut from train"
    _cut(splits, missing, names, settings)
    if settings.max_samples is not None:
        if settings.max_samples < len(names):
            raise UsageError(
                f"--max-samples {settings.max_samples}: expected at least one for each of the {len(names)} classes."
            )
        for number, role in enumerate(ROLES):
            positions = balanced_positions(splits[role].labels, settings.max_samples, [settings.seed, 2, number])
            splits[role] = splits[role].take(positions)
    skipped, edges = _drop_unreadable(splits, names, cut=missing)
    if settings.shots is not None:
        bounded = "" if settings.max_samples is None else f" after --max-samples {settings.max_samples}"
        splits["train"] = _few(splits["train"], settings.shots, names, [settings.seed, 3], bounded)
        origins["train"] += f", {settings.shots} of each class"
    if source.reasoning_column and not any(splits["train"].reasonings):
        raise UsageError(
            f"--reasoning-column {source.reasoning_column}: no training image has a text there. Name another column."
        )
    edge = int(np.percentile(edges, MOST_IMAGES, method="higher"))
    data = Data(**splits, class_names=names, edge=edge, skipped=skipped)
    data.summary = _summary(settings, source, origins, how, data)
    data.source = _describe(settings, source, origins, data)
    return data


def _all_names(source: Source) -> list[str]:
    return sorted([*source.split_names.values(), *source.others]) or ["none"]


def _without_labels(source: Source) -> list[str]:
    """The roles whose labels are all hidden, as in the test splits of competitions.

    Raises:
        UsageError: a split is empty, or rows without a label are in a split that is needed.
    """
    hidden = []
    for role, rows in source.splits.items():
        name = source.split_names[role]
        if not rows.labels:
            raise UsageError(
                f"the split {name} is empty. Expected at least one image; remove the split and it is cut from train."
            )
        missing = [i for i, label in enumerate(rows.labels) if is_missing(label, source.class_names is not None)]
        if role != "train" and len(missing) == len(rows.labels):
            hidden.append(role)
        elif missing:
            first = ", ".join(rows.names[i] for i in missing[:3])
            raise UsageError(
                f"{name}: {len(missing)} of {len(rows.labels)} images have no label, first {first}. Label or remove them."
            )
    return hidden


def _cut(splits: dict[str, Split], missing: list[str], names: list[str], settings: Settings) -> None:
    """Cut the missing splits out of train, the same share of each class and at least one image of each.

    Raises:
        UsageError: a class has too few images for that.
    """
    if not missing:
        return
    labels = np.array(splits["train"].labels)
    needed = len(missing) + 1
    small = [
        f"{name} ({count})"
        for name, count in zip(names, np.bincount(labels, minlength=len(names)), strict=True)
        if count < needed
    ]
    if small:
        raise UsageError(
            f"train has less than {needed} images of {', '.join(small)}: {' and '.join(missing)} cannot be cut from it. "
            f"Expected at least {needed} of each class, or a dataset with these splits."
        )
    rng = np.random.default_rng([settings.seed, 1])
    ratios = {"validation": settings.validation_ratio, "test": settings.test_ratio}
    parts: dict[str, list[int]] = {role: [] for role in ["train", *missing]}
    for label in range(len(names)):
        positions = rng.permutation(np.flatnonzero(labels == label)).tolist()
        left = len(positions)
        for number, role in enumerate(missing):
            size = min(max(1, round(ratios[role] * left)), len(positions) - (len(missing) - number))
            parts[role] += positions[:size]
            positions = positions[size:]
        parts["train"] += positions
    train = splits["train"]
    splits |= {role: train.take(sorted(positions)) for role, positions in parts.items()}


def balanced_positions(labels: Sequence[int], most: int, seed: list[int]) -> list[int]:
    """Positions of at most so many samples: one of each class in turn, drawn at random; in order."""
    if len(labels) <= most:
        return list(range(len(labels)))
    order = np.random.default_rng(seed).permutation(len(labels))
    drawn = np.array(labels)[order]
    turn = np.empty(len(labels), dtype=int)  # how many of the same class come before
    for label in set(labels):
        turn[drawn == label] = np.arange((drawn == label).sum())
    return sorted(order[np.argsort(turn, kind="stable")[:most]].tolist())


def _few(split: Split, shots: int, names: list[str], seed: list[int], bounded: str) -> Split:
    """So many samples of each class, drawn at random, in the order of the split.

    Args:
        bounded: in words, what has bounded the split before.

    Raises:
        UsageError: a class has fewer.
    """
    counts = np.bincount(split.labels, minlength=len(names))
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < shots]
    if small:
        raise UsageError(
            f"--shots {shots}: train has fewer images of {', '.join(small)}{bounded}. Expected at least {shots} of each class."
        )
    return split.take(balanced_positions(split.labels, shots * len(names), seed))


def _drop_unreadable(splits: dict[str, Split], names: list[str], cut: list[str]) -> tuple[list[str], list[int]]:
    """Decode every image once, learn its key and leave out those that cannot be decoded.

    Args:
        cut: the splits that were cut from train, of which they are a part where the unreadable images are counted.

    Returns:
        the reasons, each with the image's name, and the longest edge of each readable image of train, in pixels.

    Raises:
        UsageError: too many are unreadable, or a split or a class of train has none left.
    """
    jobs = [(role, i) for role in ROLES for i in range(len(splits[role]))]

    def check(job: tuple[str, int]) -> int | str:
        role, i = job
        try:
            sample = splits[role][i]
            splits[role].keys[i] = sample.key
            return max(sample.image.size)
        except UnreadableImage as error:
            return str(error)

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        found = list(progress(pool.map(check, jobs), len(jobs), "checking images"))
    finally:
        pool.shutdown(cancel_futures=True)  # else a Ctrl-C would wait for all of them
    bad = [(role, i, text) for (role, i), text in zip(jobs, found, strict=True) if isinstance(text, str)]
    for role, _, text in bad[:MOST_SHOWN]:
        note(f"skipped an unreadable image of {role}: {text}")
    if len(bad) > MOST_SHOWN:
        note(f"... and {len(bad) - MOST_SHOWN} more")
    for roles in [["train", *cut], *([role] for role in ROLES[1:] if role not in cut)]:
        lost, of = [text for role, _, text in bad if role in roles], sum(len(splits[role]) for role in roles)
        if len(lost) > MOST_UNREADABLE * of:
            where = f" ({' and '.join(roles[1:])} are cut from it)" if len(roles) > 1 else ""
            raise UsageError(
                f"{len(lost)} of {of} images of {roles[0]}{where} are unreadable, more than {MOST_UNREADABLE:.0%}. First: {lost[0]}\n"
                "       Repair or remove these files; where a table names them, its paths are relative to it."
            )
    for role, split in splits.items():
        lost_here = {i for other, i, _ in bad if other == role}
        splits[role] = split.take([i for i in range(len(split)) if i not in lost_here])
        if not len(splits[role]):
            raise UsageError(f"{role} has no readable image. Repair them, or add some.")
    empty = [name for number, name in enumerate(names) if number not in set(splits["train"].labels)]
    if empty:
        raise UsageError(f"train has no readable image of {', '.join(empty)}. Add some, or remove the class.")
    edges = [edge for (role, _), edge in zip(jobs, found, strict=True) if role == "train" and not isinstance(edge, str)]
    return [text for _, _, text in bad], edges


def _summary(
    settings: Settings, source: Source, origins: dict[str, str], how: list[str], data: Data
) -> list[tuple[str, str]]:
    rows = [("dataset", source.kind if settings.demo else f"{settings.dataset} ({source.kind})")]
    if source.image_column:
        rows += [("image column", source.image_column), ("label column", source.label_column or "")]
    shown = ", ".join(data.class_names[:20]) + (", ..." if len(data.class_names) > 20 else "")
    rows += [("classes", f"{len(data.class_names)}: {shown}"), ("class names", "; ".join(how))]
    rows += [(role, f"{len(getattr(data, role)):,} images ({origins[role]})") for role in ROLES]
    if source.reasoning_column:
        own = sum(text is not None for text in data.train.reasonings)
        rest = len(data.train) - own
        rows.append(
            (
                "reasoning column",
                f"{source.reasoning_column}: {own:,} of {len(data.train):,} training images have a text",
            )
        )
        if rest:
            rows.append(("without one", f"{rest:,}, which get the response of their class"))
    if source.others:
        rows.append(("left alone", ", ".join(source.others)))
    if data.skipped:
        rows.append(("skipped", f"{len(data.skipped)} unreadable image{'s' * (len(data.skipped) > 1)}"))
    return rows


def _describe(settings: Settings, source: Source, origins: dict[str, str], data: Data) -> dict[str, Any]:
    """What is written to the metadata. Of a local dataset the name of its folder or file alone: the path is the user's
    own affair."""
    local = not settings.demo and source.kind != "hub"
    return {
        "dataset": source.kind
        if settings.demo
        else Path(settings.dataset).resolve().name
        if local
        else settings.dataset,
        "config": settings.dataset_config,
        "commit": source.commit,
        "kind": source.kind,
        "image_column": source.image_column,
        "label_column": source.label_column,
        "reasoning_column": source.reasoning_column,
        "splits": {role: {"from": origins[role], "pictures": len(getattr(data, role))} for role in ROLES},
        "left_alone": source.others,
        "unreadable": len(data.skipped),
    }

"""The images of a dataset as a trained model classifies them, with the labels that are there as classes of the model.

N = images.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.common import UsageError, did_you_mean, listed, read_folder
from vlm.config import ClassifySettings
from vlm.conversation import Prompts, read_renames, renamed_classes
from vlm.data import LabeledImages, match_classes, open_image, read_images, short_key, unpack_keys
from vlm.inference.items import Item
from vlm.inference.model_folder import find_model_folder, read_metadata, read_prompts

LABEL = "label"  # the key of a row with the true class
KEPT = {"train": "train_images", "validation": "validation_images"}  # keys of a model's metadata, by split


@dataclass(frozen=True)
class DatasetItems:
    """What is classified, see `Items`; its rows have the label as a further key, None for an image without one.

    Attributes:
        images: as the dataset has them.
        classes: for each class name of the dataset the index of the model's class, None if the model lacks it.
        prompts: of the model.
        by_hand: the class names of the dataset that `--class-map` names.
        known: by split of the training, the `short_key` of each of its images; only splits whose images are known.
        seen: by split, the positions of the images that are among these, of those that were opened.
    """

    images: LabeledImages
    classes: list[int | None]
    prompts: Prompts
    by_hand: frozenset[str] = frozenset()
    known: Mapping[str, frozenset[str]] = field(default_factory=dict)
    seen: dict[str, set[int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", {split: set() for split in self.known})

    def __len__(self) -> int:
        return len(self.images.labels)

    def __iter__(self) -> Iterator[Item]:
        rows = self.images.rows
        for i, label in enumerate(self.images.labels):
            known = self.class_of(i)
            name = None if label is None else self.images.class_names[label]
            more = {LABEL: name if known is None else self.prompts.class_names[known]}
            yield Item(rows.names[i], partial(self._open, i), more, known)

    def _open(self, position: int) -> Image.Image:
        rows = self.images.rows
        image = open_image(rows.images[position], rows.names[position])
        key = short_key(image) if self.known else ""
        for split, keys in self.known.items():
            if key in keys:
                self.seen[split].add(position)
        return image

    def class_of(self, position: int) -> int | None:
        """The model's class of an image, None if it has no label or one that the model lacks."""
        label = self.images.labels[position]
        return None if label is None else self.classes[label]

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label that is a class of the model."""
        return any(index is not None for index in self.classes)

    @cached_property
    def summary(self) -> list[tuple[str, str]]:
        """The table "what was detected": name and value of each row."""
        rows, every = list(self.images.summary), self.prompts.class_names
        if not self.has_labels:
            return rows
        found = {index for index in self.classes if index is not None}
        missing = [name for number, name in enumerate(every) if number not in found]
        none = f"; no image of {listed(missing)}" if missing else ""
        rows.append(("classes", f"images of {len(found):,} of the model's {len(every):,} classes{none}"))
        named = list(zip(self.images.class_names, self.classes, strict=True))
        renamed = [(own, every[index]) for own, index in named if index is not None and own != every[index]]
        for how, by_hand in (("matched by name", False), ("matched by --class-map", True)):
            if pairs := [f"{own} = {name}" for own, name in renamed if (own in self.by_hand) == by_hand]:
                rows.append((how, listed(pairs)))
        if lacking := [own for own, index in named if index is None]:
            counts = Counter(self.images.labels)
            numbers = {name: number for number, name in enumerate(self.images.class_names)}
            shown = listed(f"{name} ({counts[numbers[name]]:,})" for name in lacking)
            rows.append(("images of other classes", shown))
        return rows


def read_images_for(model_dir: str | Path, settings: ClassifySettings, dataset: object = None) -> LabeledImages:
    """The images of a dataset for a model, whose weights are not read. A column of labels without a usual name is found
    by the model's class names. A label that is one of them, or one that `--class-map` renames, is a class, even if it
    looks like a missing one, such as null.

    Args:
        settings, dataset: see `read_images`.

    Raises:
        UsageError: there is no such model, dataset or split, or its labels cannot be classes.
        RunError: the hub fails.
    """
    prompts = read_folder(find_model_folder(model_dir), lambda folder: read_prompts(folder, read_metadata(folder)))
    renamed = renamed_classes(settings.class_map, prompts.class_names) if settings.class_map else []
    names = (*prompts.class_names, *prompts.readable_names)
    return read_images(replace(settings, model_classes=names), dataset, [*names, *renamed])


def match_items(
    images: LabeledImages, settings: ClassifySettings, prompts: Prompts, metadata: Mapping[str, Any]
) -> DatasetItems:
    """The images of a dataset for a model; their classes are matched with the model's by their names.

    Args:
        settings: of the dataset. Its `class_map` has other names for classes of the dataset.
        prompts, metadata: of the model.

    Raises:
        UsageError: the dataset has labels, and none of its classes is one of the model.
        UsageError: the map gives a class a name that the model does not have.
    """
    own = names = images.class_names
    renames = read_renames(settings.class_map, own) if settings.class_map and own else {}
    if renames:
        _check_targets(settings.class_map, renames, prompts)
        names = [renames.get(name, name) for name in own]
    classes = match_classes(names, prompts.class_names, prompts.readable_names)
    if own and all(index is None for index in classes):
        raise UsageError(
            f"{settings.of_dataset}: none of its classes ({listed(names)}) is a class of the model "
            f"({listed(prompts.shown_names)}). Give the model's names with --class-names or --class-map, or classify "
            "without labels: --label-column none."
        )
    kept = {split: unpack_keys(metadata.get(key)) for split, key in KEPT.items()}
    known = {split: keys for split, keys in kept.items() if keys}
    return DatasetItems(images, classes, prompts, frozenset(renames), known)


def _check_targets(path: str | None, renames: Mapping[str, str], prompts: Prompts) -> None:
    """Raises UsageError if a map of class names gives one that is no class of the model."""
    targets = list(renames.values())
    found = match_classes(targets, prompts.class_names, prompts.readable_names)
    if wrong := [name for name, index in zip(targets, found, strict=True) if index is None]:
        raise UsageError(
            f"--class-map {path} gives {listed(wrong)}, which the model does not have as a class."
            f"{did_you_mean(wrong[0], prompts.shown_names)} Its classes: {listed(prompts.shown_names)}."
        )

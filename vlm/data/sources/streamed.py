"""A dataset that `datasets` reads while it is used (`--streaming`): only validation, test and a sample are kept."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.common import Bar, UsageError, listed
from vlm.config import Settings
from vlm.data.images import UnreadableImage
from vlm.data.sources.cells import image_of
from vlm.data.sources.columns import Columns, choose_columns, reasoning_texts
from vlm.data.sources.library import errors_in_one_line, is_image_column, not_decoded, open_streams
from vlm.data.sources.places import Place
from vlm.data.sources.roles import sort_splits
from vlm.data.sources.rows import Rows, Source
from vlm.data.stream import Row, Stream, digest

if TYPE_CHECKING:
    from datasets import IterableDataset

HELD_OUT = 1000  # images of validation, and of test
SAMPLE = 256  # training images that are looked at before the first step


def read_stream(settings: Settings, name: str, kind: str, revision: str | None = None) -> Source:
    """Open a dataset for streaming, and read the images that validation and test are made of.

    A split for validation or test that is not there is made of the first images of the shuffled train split, which
    the training then leaves out.

    Raises:
        UsageError: it cannot be read, has no train split, or its class names are unknown.
    """
    with errors_in_one_line(name):
        streams = open_streams(name, settings, revision)
    roles, others = sort_splits(streams)
    if "train" not in roles:
        return Source(kind, {}, {}, sorted(streams))
    train = streams[roles["train"]]
    columns = _columns(train, settings)
    names = _class_names(train, columns, settings)
    read = partial(_rows, columns=columns, settings=settings)
    most = settings.max_samples or HELD_OUT
    with errors_in_one_line(name):
        parts = {
            role: _take(read(streams[split], split), most, f"reading {split}")
            for role, split in roles.items()
            if role != "train"
        }
        hidden = [role for role, rows in parts.items() if all(row.label in (None, -1) for row in rows)]
        missing = [role for role in ("validation", "test") if role not in roles or role in hidden]
        wanted = SAMPLE + most * len(missing)
        head = _without_copies(_take(read(train, roles["train"]), wanted, "reading train"))
        parts |= {role: head[i * most : (i + 1) * most] for i, role in enumerate(missing)}
    held_out = frozenset(digest(row.image) for role in ("validation", "test") for row in parts[role])
    parts["train"] = [row for row in head[most * len(missing) :] if digest(row.image) not in held_out]
    _check_sizes(parts, missing, most)
    stream = Stream(partial(read, train, roles["train"]), {}, held_out)
    split_names = {role: f"{roles[role]}, the first {len(parts[role]):,}" for role in roles}
    split_names["train"] = f"a sample of {roles['train']}, which is streamed"
    for role in missing:
        why = f", as {roles[role]} has no labels" if role in hidden else ""
        split_names[role] = f"the first of {roles['train']}{why}"
    splits = {role: _kept(parts[role], columns) for role in ("train", "validation", "test")}
    return Source(f"{kind}, streamed", splits, split_names, others, names, columns, stream=stream)


def _columns(train: "IterableDataset", settings: Settings) -> Columns:
    """The columns of a stream."""
    import datasets

    features = train.features or {}
    images = [name for name, feature in features.items() if is_image_column(feature)]
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    return choose_columns(settings, list(features), images, classes, values=lambda name: [])


def _class_names(train: "IterableDataset", columns: Columns, settings: Settings) -> list[str] | None:
    """The names of which labels are indices; None if labels are names themselves."""
    feature = (train.features or {})[columns.label]
    if names := getattr(feature, "names", None):
        return list(names)
    if not settings.class_names:
        raise UsageError(
            f"--streaming: the column {columns.label} does not say which classes there are, and they are not known "
            "before everything was read. Name all of them with --class-names, for whole numbers in their order."
        )
    return None if "string" in str(getattr(feature, "dtype", "")) else settings.class_names


def _rows(
    data: "IterableDataset",
    split: str,
    epoch: int = 0,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    *,
    columns: Columns,
    settings: Settings,
) -> Iterator[Row]:
    """The rows of an epoch in its shuffled order, after the first `start` of this process."""
    from datasets.distributed import split_dataset_by_node

    wanted = [name for name in columns.used if name in (data.features or {})]
    feature = (data.features or {})[columns.image]
    data = data.select_columns(wanted)
    if is_image_column(feature):
        data = data.cast_column(columns.image, not_decoded(feature))
    data = data.shuffle(seed=settings.seed, buffer_size=settings.shuffle_buffer)
    data.set_epoch(epoch)
    if processes > 1:
        data = split_dataset_by_node(data, process, processes)
    for number, row in enumerate(islice(data, start, None), start + 1):
        name = f"{split}, image {number}"
        text = row.get(columns.reasoning) if columns.reasoning else None
        label = _label(row.get(columns.label))
        yield Row(_image(row[columns.image], name), label, reasoning_texts([text], [name])[0], name)


def _label(value: object) -> object:
    """A label; whole numbers that became floats, as beside missing ones, are whole numbers again."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if value != value else value
    if isinstance(value, dict | list):
        raise UsageError(
            "--streaming: the labels are lists or objects. Expected one name or whole number for each image: name "
            "another column with --label-column, or leave out --streaming."
        )
    return value


def _image(cell: Any, name: str) -> Any:
    """What `open_image` takes; None, which cannot be read, for damaged base64 text."""
    try:
        return image_of(cell, Place(Path()), name)
    except UnreadableImage:
        return None


def _take(rows: Iterator[Row], most: int, description: str) -> list[Row]:
    taken = []
    with Bar(most, description) as bar:
        for row in islice(rows, most):
            taken.append(row)
            bar.update(1)
    return taken


def _without_copies(rows: list[Row]) -> list[Row]:
    return list({digest(row.image): row for row in rows}.values())


def _check_sizes(parts: dict[str, list[Row]], missing: Sequence[str], most: int) -> None:
    if not parts["train"]:
        raise UsageError(
            f"--streaming: train has no more images than {listed(missing)} would take, {most:,} each. "
            "Lower --max-samples, or leave out --streaming."
        )


def _kept(rows: list[Row], columns: Columns) -> Rows:
    texts = [row.reasoning for row in rows] if columns.reasoning else None
    return Rows([row.image for row in rows], [row.label for row in rows], [row.name for row in rows], texts)

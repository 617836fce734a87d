"""Parquet files on the hub, of which only a part is fetched: the types of the columns, labels, some groups of rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlm.common import Bar, cache_folder, note, read_json, replacing, write_json
from vlm.data.hub import HubDataset
from vlm.data.hub_errors import again

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MOST_FILES = 32  # of a split that are looked into for a sample
WORTH_A_SAMPLE = (
    0.5  # if a sample needs a larger share of the rows, the whole files are fetched, which stay in the cache
)


class RowGroup(NamedTuple):
    """Rows that a Parquet file has together. labels: how many rows have each; size: bytes."""

    file: str
    number: int
    labels: Counter[Any]
    size: int


def read_schema(found: HubDataset, file: str) -> Any:
    """The types of the columns (`datasets.Features`), from the end of a Parquet file."""
    import datasets

    def read() -> Any:
        with _opened(found, file) as parquet:
            return datasets.Features.from_arrow_schema(parquet.schema_arrow)

    return again(read)


def hidden_rows(found: HubDataset, files: Mapping[str, Sequence[str]], label: str) -> dict[str, int]:
    """The splits in which every label is -1, as in the test splits of competitions, with the number of their rows.

    Known from the ends of the Parquet files, so that no image of them is fetched. Kept for a start without the hub.

    Args:
        files: by role.
    """
    kept = cache_folder() / "hub" / f"{_digest(found.id, found.commit, label)}.json"
    known = read_json(kept, "Remove it.") if kept.is_file() else {}
    missing = {role: some for role, some in files.items() if some[0] not in known}
    parquet = all(file.endswith(".parquet") for some in missing.values() for file in some)
    if missing and parquet and found.silence is None:
        known |= {some[0]: _hidden(found, some, label) for some in missing.values()}
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, known)
    return {role: known[some[0]] for role, some in files.items() if known.get(some[0])}


def fetch_sample(
    found: HubDataset, split: str, files: Sequence[str], label: str, most: int, classes: int, seed: int
) -> Path | None:
    """Some groups of rows of a split, in one Parquet file: each class has its share of `most` images, as far as it has
    so many in the files that are looked into. The same seed gives the same rows.

    Args:
        label: the column of labels.
        classes: how many there are; 0 if that is not known.

    Returns:
        The file, also from an earlier call; None if so much would be fetched that whole files are the better choice.
    """
    kept = cache_folder() / "hub" / _digest(found.id, found.commit, split, *files, label, most, seed)
    if (kept / "rows.parquet").is_file():
        return kept / "rows.parquet"
    cached = found.cached(files)
    if (found.silence is not None and not cached) or not all(file.endswith(".parquet") for file in files):
        return None
    groups, seen = _look_into(found, split, files, label, most, classes, seed)
    picked = _pick(groups, most, np.random.default_rng(seed))
    rows = sum(sum(group.labels.values()) for group in picked)
    if rows > WORTH_A_SAMPLE * sum(sum(group.labels.values()) for group in groups) and seen == len(files):
        return None
    size = sum(group.size for group in picked)
    where = "taken from the cache" if cached else f"fetched ({size / 1e6:,.1f} MB of {seen} of {len(files)} files)"
    note(f"note: --max-samples: {rows:,} rows of {split} are {where}, and the images are drawn among them.")
    kept.mkdir(parents=True, exist_ok=True)
    with replacing(kept / "rows.parquet") as path:
        _copy(found, picked, path, f"fetching {split}")
    return kept / "rows.parquet"


def _look_into(
    found: HubDataset, split: str, files: Sequence[str], label: str, most: int, classes: int, seed: int
) -> tuple[list[RowGroup], int]:
    """The groups of rows of some files, in the order of the seed, until each class has its share.

    Returns:
        The groups.
        How many files were looked into.
    """
    order = np.random.default_rng(seed).permutation(len(files))[:MOST_FILES]
    groups: list[RowGroup] = []
    total: Counter[Any] = Counter()
    with Bar(len(order), f"looking into {split}", "files") as bar:
        for looked, number in enumerate(order, 1):
            found_there = again(lambda file=files[number]: _groups_of(found, file, label))  # type: ignore[misc]
            groups += found_there
            total.update(sum((group.labels for group in found_there), Counter()))
            bar.update()
            share = -(-most // max(classes or len(total), 1))
            if classes and len(total) >= classes and min(total.values()) >= share:
                return groups, looked
    return groups, len(order)


def _groups_of(found: HubDataset, file: str, label: str) -> list[RowGroup]:
    with _opened(found, file) as parquet:
        labels = parquet.read(columns=[label]).column(label).to_pylist()
        groups, first = [], 0
        for number in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(number)
            counts = Counter(str(one) for one in labels[first : first + group.num_rows])
            groups.append(RowGroup(file, number, counts, _bytes_of(group)))
            first += group.num_rows
        return groups


def _bytes_of(group: Any) -> int:
    return sum(group.column(i).total_compressed_size for i in range(group.num_columns))


def _pick(groups: Sequence[RowGroup], most: int, rng: np.random.Generator) -> list[RowGroup]:
    """The groups that give each class its share, always the one that helps most; equally good ones by chance."""
    total = sum((group.labels for group in groups), Counter())
    share = -(-most // max(len(total), 1))
    needed = Counter({one: min(share, count) for one, count in total.items()})
    left, picked = list(rng.permutation(len(groups))), []
    while left and +needed:
        helps = [sum((groups[i].labels & needed).values()) for i in left]
        best = left.pop(int(np.argmax(helps)))
        needed = needed - groups[best].labels
        picked.append(best)
    return [groups[i] for i in sorted(picked)]


def _copy(found: HubDataset, picked: Sequence[RowGroup], path: Path, description: str) -> None:
    """Write groups of rows into one file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    with Bar(len(picked), description, "groups of rows") as bar:
        for file, of_file in groupby(picked, lambda group: group.file):
            numbers = [group.number for group in of_file]

            def read(file: str = file, numbers: list[int] = numbers) -> pa.Table:
                with _opened(found, file) as parquet:
                    return parquet.read_row_groups(numbers)

            tables.append(again(read))
            bar.update(len(numbers))
    pq.write_table(pa.concat_tables(tables), path)


def _hidden(found: HubDataset, files: Sequence[str], label: str) -> int:
    """The number of rows, if every label is -1; else 0."""
    rows = 0
    for file in files:
        largest, count = again(lambda file=file: _largest_label(found, file, label))  # type: ignore[misc]
        if largest != -1:
            return 0
        rows += count
    return rows


def _largest_label(found: HubDataset, file: str, label: str) -> tuple[int | None, int]:
    """The largest label by the statistics of the file, None if it has none, and the number of rows."""
    with _opened(found, file) as parquet:
        metadata = parquet.metadata
        if label not in parquet.schema_arrow.names:
            return None, metadata.num_rows
        names = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)]
        column = names.index(label)
        found_there = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
        if not found_there or any(one is None or not one.has_min_max for one in found_there):
            return None, metadata.num_rows
        return max(one.max for one in found_there), metadata.num_rows


@contextmanager
def _opened(found: HubDataset, file: str) -> "Iterator[ParquetFile]":
    """A Parquet file: the one in the cache, or that on the hub, of which only the parts that are asked for are read."""
    import pyarrow.parquet as pq
    from huggingface_hub import HfFileSystem, constants

    if found.cached([file]):
        with pq.ParquetFile(f"{found.folder}/{file}") as parquet:
            yield parquet
        return
    hub = HfFileSystem(endpoint=constants.ENDPOINT, skip_instance_cache=True)
    path = f"datasets/{found.id}@{found.commit}/{file}"
    with hub.open(path, "rb", cache_type="none") as opened, pq.ParquetFile(opened, pre_buffer=True) as parquet:
        yield parquet


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]

"""--exclude: images that a file names are left out of the dataset."""

import csv
from collections.abc import Mapping
from pathlib import Path

from vlm.common import UsageError, listed, note, reason
from vlm.data.sources import Rows

COLUMN, SPLIT = "image", "split"


def exclude(rows: Mapping[str, Rows], path: str) -> dict[str, Rows]:
    """Leave out the images that a CSV file names in its column "image", such as the label_issues.csv of a run.

    With a column "split", a name is looked for in that split and, as it may have been cut from there, in train; without
    one in all splits.

    Returns:
        The rows of each split that are left.

    Raises:
        UsageError: the file cannot be read, has no such column, or names no image of the dataset.
    """
    named = _read(path)
    there = {role: set(given.names) for role, given in rows.items()}
    wanted: dict[str, set[str]] = {role: set() for role in rows}
    lacking = []
    for name, split in named:
        places = [role for role in ([split, "train"] if split else rows) if name in there.get(role, ())]
        for role in places[: 1 if split else None]:
            wanted[role].add(name)
        lacking += [] if places else [name]
    if len(lacking) == len(named):
        raise UsageError(
            f"--exclude {path}: the dataset has no image called {listed(lacking[:3])}. Expected names as in the "
            "label_issues.csv of a run on it."
        )
    left = {
        role: given.take([i for i, name in enumerate(given.names) if name not in wanted[role]])
        for role, given in rows.items()
    }
    count = sum(len(given.names) - len(left[role].names) for role, given in rows.items())
    note(f"--exclude: {count:,} images are left out.")
    if lacking:
        note(f"note: --exclude {path}: {len(lacking):,} images are not in the dataset, first {lacking[0]}.")
    return left


def _read(path: str) -> list[tuple[str, str]]:
    """The name and the split of each image, "" where none is given."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        table = csv.DictReader(text.splitlines(keepends=True), strict=True)
        columns = table.fieldnames or []
        lines = [(line[COLUMN] or "", line.get(SPLIT) or "") for line in table] if COLUMN in columns else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--exclude {path} cannot be read ({reason(error)}). Expected a CSV file.") from error
    if not lines:
        found = f"has the columns {listed(list(columns))}" if columns else "is empty"
        raise UsageError(f'--exclude {path} {found}. Expected a column "{COLUMN}" with names of images.')
    return lines

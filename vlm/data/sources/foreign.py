"""Files that no reader takes: what they are, by their ending and first bytes, and what to do with them."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from vlm.common import UsageError, reason
from vlm.data.finding import is_image

ARCHIVES = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")  # that archives.py does not unpack
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
AGAIN = "Copy or download it again."
PARQUET = b"PAR1"  # at the begin and the end of such a file
UNPACK = "Unpack it, and give the folder or the table in it."
SAVE_AS_CSV = "Save it as CSV in UTF-8."
AS_FILES = "Write its images into files, in one folder for each class."
# Endings, what such files are, and the cure.
KINDS = (
    (ARCHIVES, "an archive", UNPACK),
    (SPREADSHEETS, "a spreadsheet", SAVE_AS_CSV),
    (
        (".txt", ".dat", ".tab", ".psv"),
        "a text file",
        "A table has equally many fields in each line, and paths of images.",
    ),
    ((".npy", ".npz", ".h5", ".hdf5", ".mat", ".pkl", ".pickle", ".tfrecord"), "a file of arrays", AS_FILES),
)
# First bytes of files that are no text, whatever their ending says.
STARTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Get the file with: git lfs pull"),
    (b"PK\x03\x04", "a spreadsheet or a zip archive", "Save it as CSV in UTF-8, or let its name end in .zip."),
    (b"\x1f\x8b", "a compressed file", "Unpack it."),
    (PARQUET, "a Parquet file", "Let its name end in .parquet."),
    (b"\xff\xfe", "text in UTF-16", SAVE_AS_CSV),
    (b"\xfe\xff", "text in UTF-16", SAVE_AS_CSV),
)

LONGEST_START = max(len(first) for first, _, _ in STARTS)


def refuse_file(path: Path, expected: str) -> NoReturn:
    """Raise the UsageError for a file that is no table by its ending.

    Args:
        expected: what datasets may be, for files of which nothing is known here.
    """
    refuse_damaged([path])
    if is_image(path):
        raise UsageError(f"--dataset {path}: one image. Give a folder with one folder for each class, or a table.")
    for endings, kind, cure in KINDS:
        if path.suffix.lower() in endings:
            raise UsageError(f"--dataset {path}: {kind}, not a folder or a table. {cure}")
    refuse_by_content(path)
    raise UsageError(f"--dataset {path}: files of this type are not read. {expected}")


def refuse_by_content(path: Path) -> None:
    """Refuse a file that is no text by its first bytes, such as a Git LFS pointer or a spreadsheet called .csv.

    Raises:
        UsageError: it is such a file, or cannot be read.
    """
    start = _read(path)
    for first, kind, cure in STARTS:
        if start.startswith(first):
            raise UsageError(f"{path}: {kind}. {cure}")


def refuse_damaged(paths: Iterable[Path]) -> None:
    """Refuse files of data if one is a Git LFS pointer, or a Parquet file that is not whole.

    Raises:
        UsageError: the first that is one, or that cannot be read.
    """
    first, kind, cure = STARTS[0]
    for path in paths:
        if _read(path).startswith(first):
            raise UsageError(f"{path}: {kind}. {cure}")
        if path.suffix == ".parquet" and not _read(path, last=True).endswith(PARQUET):
            raise UsageError(f"{path}: a Parquet file that is damaged or not whole. {AGAIN}")


def _read(path: Path, last: bool = False) -> bytes:
    """The first or last bytes of a file."""
    try:
        with path.open("rb") as file:
            if last:
                file.seek(-min(LONGEST_START, path.stat().st_size), io.SEEK_END)
            return file.read(LONGEST_START)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason(error)}). Allow to read it, or give another file.") from error

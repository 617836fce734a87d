"""Predictions for people and programs: a table, or a CSV or JSONL file that is written while they are computed."""

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any

from vlm.common import (
    RunError,
    UsageError,
    csv_cell,
    format_table,
    printable,
    printable_lines,
    reason,
    utf8_text,
    write_json,
)
from vlm.inference.parquet import PARQUET, has_predictions
from vlm.inference.records import Begun

FIGURES = ("prediction", "confidence", "error_bound", "abstained", "error", "full_response")
READABLE_NAME = "readable_name"  # of a model that was trained with --class-map
PART = ".part"
GOES_ON = "The same command with --resume goes on."
LONGEST_START = 1000  # bytes of a file that are looked at before it is replaced


def check_replaceable(path: Path) -> None:
    """Check that a file that predictions are to replace holds predictions itself, or nothing.

    Raises:
        UsageError: it holds something else, which would be lost.
    """
    if path.exists() and not path.is_file():  # such as a pipe, which would wait for a writer
        raise UsageError(f"--output {path} is no file: choose another name.")
    try:
        with path.open("rb") as file:
            start = file.read(LONGEST_START)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--output {path} cannot be read ({reason(error)}): choose another place.") from error
    own = b'{"path": ' if path.suffix.lower() == ".jsonl" else ",".join(["path", *FIGURES]).encode()
    holds_predictions = (
        has_predictions(path, ("path", *FIGURES)) if path.suffix.lower() == PARQUET else start.startswith(own)
    )
    if start and not holds_predictions:
        raise UsageError(f"--output {path} exists and holds no predictions: it would be lost. Choose another name.")


class PredictionFile:
    """A CSV file with a column a class, or JSON lines; usable in `with`.

    Each row is written when it is added, to FILE.part (FILE.part2, if that is there already). This becomes FILE if the
    block ends without an error; else it stays, and holds all rows that were added.

    Attributes:
        part: the file that the rows are written to.
        rows: how many it has.

    Args:
        path: its ending, .csv or .jsonl, decides the format.
        class_names: C names, the columns of the probabilities.
        readable: the results have readable names, which become a column of the CSV file.
        more: further keys of the results that become columns of the CSV file, the last ones.
        begun: what an earlier run has written; it goes on after that.
        about: what made the rows. It is kept next to them for a later run that goes on, until the caller deletes it.

    Raises:
        RunError: a row or the file cannot be written.
        UsageError: another process writes the same file.
    """

    def __init__(
        self,
        path: str | Path,
        class_names: Sequence[str],
        readable: bool = False,
        more: Sequence[str] = (),
        begun: Begun | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.columns = Path(path), columns_of(class_names, readable, more)
        self._begun, self._about = begun, about
        self.header = header_of(self.path, self.columns)
        self.part = begun.part if begun else self.path
        self.rows = begun.tally.rows if begun else 0
        self._size = begun.size if begun else 0

    def __enter__(self) -> "PredictionFile":
        try:
            self._file = FileIO(self._begun.part, "r+b") if self._begun else self._create()
            lock_file(self.part, self._file.fileno())
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except OSError as error:
            raise self._refused(error) from error
        if not self._size:
            self._write(self.header)
        if self._about is not None:
            write_json(about_file(self.part), self._about)
        return self

    def _create(self) -> FileIO:
        for number in count(1):  # other ones have the rows of runs that were stopped
            self.part = part_of(self.path, number)
            with suppress(FileExistsError):
                return FileIO(self.part, "xb")
        raise AssertionError

    def add(self, path: str, result: Mapping[str, Any]) -> None:
        """Write the row of one image.

        Args:
            path: the image. result: what `predict_batch` returns for it.
        """
        if self.header:
            self._write(_csv_line(cells_of(path, result, self.columns).values()))
        else:  # a surrogate becomes its escape, which is read as the same name again
            line = json.dumps({"path": path, **result}, ensure_ascii=False) + "\n"
            self._write(line.encode("utf-8", "backslashreplace"))
        self.rows += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                os.replace(self.part, self.path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self._file.close()
            if kind is not None and not self.rows:
                self.part.unlink(missing_ok=True)
                about_file(self.part).unlink(missing_ok=True)

    def kept(self) -> str:
        """Where the rows are if the block was left early, in words; empty if there are none."""
        if not self.rows:
            return ""
        kept = f"Their rows are in {printable(str(self.part))}."
        return kept if self._about is None else f"{kept} {GOES_ON}"

    def _write(self, text: bytes) -> None:
        rest = memoryview(text)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # no half of a row stays
                self._file.truncate(self._size)
            raise self._refused(error) from error
        self._size = self._file.tell()

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"--output {self.path} cannot be written ({reason(error)}): make room, or choose another place."
        )


def part_of(path: Path, number: int = 1) -> Path:
    """The file that the rows of a file are written to, of which there may be several."""
    return path.with_name(f"{path.name}{PART}{number if number > 1 else ''}")


def about_file(path: Path) -> Path:
    """The file that says what made the rows of a file, or of the one that its rows are written to."""
    part = path if path.suffix.startswith(PART) else part_of(path)
    return part.with_name(f"{part.name}.json")


def columns_of(class_names: Sequence[str], readable: bool, more: Sequence[str]) -> dict[str, str | None]:
    """The columns of a table of predictions: by name, the class whose probability it has, None for other columns."""
    figures = ("path", *FIGURES, READABLE_NAME) if readable else ("path", *FIGURES)
    return dict.fromkeys(figures) | {f"p({name})": name for name in class_names} | dict.fromkeys(more)


def header_of(path: Path, columns: Iterable[str]) -> bytes:
    """The first line of a CSV file; empty if the ending is another one."""
    return _csv_line(columns) if path.suffix.lower() == ".csv" else b""


def cells_of(path: str, result: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The row of an image in a table, by column; None where it has no value."""
    probabilities = result.get("probabilities", {})
    found = {
        column: result.get(column) if name is None else probabilities.get(name) for column, name in columns.items()
    }
    return found | {"path": path, "abstained": bool(result.get("abstained"))}


def _csv_line(cells: Iterable[Any]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(map(csv_cell, cells))
    return utf8_text(line.getvalue()).encode()


def lock_file(part: Path, descriptor: int) -> None:
    """Keep other processes from writing the same file; the system takes the lock away if this one dies.

    Raises:
        UsageError: another process writes it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{part} is being written by another process: wait until it ends.") from error
    except OSError:  # a file system without locks
        return


class PredictionTable:
    """A table on stdout; usable in `with`. It is printed at the end of the block, however that ends.

    Its columns: path, prediction, confidence, and the second-best class (if abstained, the two best).

    Args:
        explain: the texts stand below the table.
    """

    def __init__(self, explain: bool) -> None:
        self.explain = explain
        self._rows: list[tuple[str, str, str, str]] = []
        self._texts: list[str] = []

    @property
    def rows(self) -> int:
        """How many were added."""
        return len(self._rows)

    def __enter__(self) -> "PredictionTable":
        return self

    def add(self, path: str, result: Mapping[str, Any]) -> None:
        """Add the row of one image; see `PredictionFile.add`."""
        self._rows.append(_table_row(path, result))
        if self.explain:
            self._texts.append("(abstained)" if result.get("abstained") else result.get("full_response", "(not read)"))

    def __exit__(self, *_: object) -> None:
        if self._rows:
            print(format_table(self._rows, headers=("image", "prediction", "confidence", "next")))
            for row, text in zip(self._rows, self._texts, strict=False):
                print(f"\n{printable(row[0])}\n{printable_lines(text)}")
            sys.stdout.flush()  # before what is said of errors

    def kept(self) -> str:
        """Where the rows are if the block was left early, in words; empty if there are none."""
        return "Their rows are printed above." if self._rows else ""


def _table_row(path: str, result: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if "error" in result:
        return path, "-", "-", f"error: {result['error']}"
    best = sorted(result["probabilities"].items(), key=lambda item: -item[1])[:2]
    first, second = (f"{name} {probability:.4f}" for name, probability in best)
    if result.get("abstained"):
        return path, "(abstained)", f"{result['confidence']:.4f}", f"{first}, {second}"
    name = f" ({result[READABLE_NAME]})" if READABLE_NAME in result else ""
    return path, result["prediction"] + name, f"{result['confidence']:.4f}", second

"""Predictions for people and programs: a table, or a CSV or JSONL file that is written while they are computed."""

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm.common import RunError, UsageError, csv_cell, format_table, printable, printable_lines, reason

FIGURES = ("prediction", "confidence", "error_bound", "abstained", "error", "full_response")
READABLE_NAME = "readable_name"  # of a model that was trained with --class-map
PART = ".part"
LONGEST_START = 1000  # bytes of a file that are looked at before it is replaced


def check_replaceable(path: Path) -> None:
    """Check that a file that predictions are to replace holds predictions itself, or nothing.

    Raises:
        UsageError: it holds something else, which would be lost.
    """
    try:
        with path.open("rb") as file:
            start = file.read(LONGEST_START)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--output {path} cannot be read ({reason(error)}): choose another place.") from error
    own = b'{"path": ' if path.suffix.lower() == ".jsonl" else ",".join(["path", *FIGURES]).encode()
    if start and not start.startswith(own):
        raise UsageError(f"--output {path} exists and holds no predictions: it would be lost. Choose another name.")


class PredictionFile:
    """A CSV file with a column a class, or JSON lines; usable in `with`.

    Each row is written when it is added, to FILE.part (FILE.part2, if that is there already). This becomes FILE if the
    block ends without an error; else it stays, and holds all rows that were added.

    Attributes:
        rows: how many were added.

    Args:
        path: its ending, .csv or .jsonl, decides the format.
        class_names: C names, the columns of the probabilities.
        readable: the results have readable names, which become a column of the CSV file.
        more: further keys of the results that become columns of the CSV file, the last ones.

    Raises:
        RunError: a row or the file cannot be written.
    """

    def __init__(
        self, path: str | Path, class_names: Sequence[str], readable: bool = False, more: Sequence[str] = ()
    ) -> None:
        self.path, self.class_names, self._more = Path(path), class_names, more
        self._figures = (*FIGURES, READABLE_NAME) if readable else FIGURES
        self.rows = self._size = 0
        self._lines = self.path.suffix.lower() == ".jsonl"

    def __enter__(self) -> "PredictionFile":
        number = 1
        while True:
            self.part = self.path.with_name(f"{self.path.name}{PART}{number if number > 1 else ''}")
            try:
                self._file = self.part.open("xb", buffering=0)
                break
            except FileExistsError:  # the rows of a run that was stopped
                number += 1
            except OSError as error:
                raise self._refused(error) from error
        if not self._lines:
            self._write(_csv_line(["path", *self._figures, *(f"p({name})" for name in self.class_names), *self._more]))
        return self

    def add(self, path: str, result: dict[str, Any]) -> None:
        """Write the row of one image.

        Args:
            path: the image. result: what `predict_batch` returns for it.
        """
        if self._lines:
            row = json.dumps({"path": path, **result}, ensure_ascii=False) + "\n"
        else:
            probabilities = result.get("probabilities", {})
            cells = [*map(result.get, self._figures), *map(probabilities.get, self.class_names)]
            row = _csv_line([path, *cells, *map(result.get, self._more)])
        self._write(row)
        self.rows += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self.part, self.path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self._file.close()
            if kind is not None and not self.rows:
                self.part.unlink(missing_ok=True)

    def kept(self) -> str:
        """Where the rows are if the block was left early, in words; empty if there are none."""
        return f"Their rows are in {printable(str(self.part))}." if self.rows else ""

    def _write(self, text: str) -> None:
        # A surrogate becomes its escape: in JSON lines it is read as the same name again.
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):  # no half of a row stays
                os.truncate(self.part, self._size)
            raise self._refused(error) from error
        self._size = self._file.tell()

    def _refused(self, error: OSError) -> RunError:
        return RunError(
            f"--output {self.path} cannot be written ({reason(error)}): make room, or choose another place."
        )


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO(newline="")
    csv.writer(line).writerow(map(csv_cell, cells))
    return line.getvalue()


class PredictionTable:
    """A table on stdout; usable in `with`. It is printed at the end of the block, however that ends.

    Its columns: path, prediction, confidence, and the second-best class (if abstained, the two best).

    Args:
        explain: the texts stand below the table.
    """

    def __init__(self, explain: bool) -> None:
        self.explain = explain
        self.results: dict[str, dict[str, Any]] = {}

    @property
    def rows(self) -> int:
        """How many were added."""
        return len(self.results)

    def __enter__(self) -> "PredictionTable":
        return self

    def add(self, path: str, result: dict[str, Any]) -> None:
        """Add the row of one image; see `PredictionFile.add`."""
        self.results[path] = result

    def __exit__(self, *_: object) -> None:
        if self.results:
            rows = [_table_row(path, result) for path, result in self.results.items()]
            print(format_table(rows, headers=("image", "prediction", "confidence", "next")))
            for path, result in self.results.items() if self.explain else ():
                text = "(abstained)" if result.get("abstained") else result.get("full_response", "(not read)")
                print(f"\n{printable(path)}\n{printable_lines(text)}")
            sys.stdout.flush()  # before what is said of errors

    def kept(self) -> str:
        """Where the rows are if the block was left early, in words; empty if there are none."""
        return "Their rows are printed above." if self.results else ""


def _table_row(path: str, result: dict[str, Any]) -> tuple[str, str, str, str]:
    if "error" in result:
        return path, "-", "-", f"error: {result['error']}"
    best = sorted(result["probabilities"].items(), key=lambda item: -item[1])[:2]
    first, second = (f"{name} {probability:.4f}" for name, probability in best)
    if result.get("abstained"):
        return path, "(abstained)", f"{result['confidence']:.4f}", f"{first}, {second}"
    name = f" ({result[READABLE_NAME]})" if READABLE_NAME in result else ""
    return path, result["prediction"] + name, f"{result['confidence']:.4f}", second

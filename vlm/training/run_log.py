"""The figures of a training run: one JSON line each in `log.jsonl`, and the trackers of --report-to."""

import json
import math
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from time import time
from typing import Any

from vlm.common import Stopped, is_main_process, note, reason, replacing
from vlm.config import LOG
from vlm.training.tracked_results import ShownResults
from vlm.training.trackers import TrackedRun
from vlm.training.tracking import Tracking


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a `log.jsonl`, oldest first; none if there is no such file.

    A line that is damaged, such as a last one that was cut short because the program was killed, is left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    entries = []
    # splitlines() would also split at separators that JSON allows inside of a text
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


class RunLog:
    """Writes the figures of one run to `log.jsonl` and passes them on to trackers. Usable in `with`.

    It does nothing on processes other than the main one. A tracker that fails is left out (vlm/training/tracking.py).

    Args:
        folder: the output folder; it is made if it does not exist.
        trackers: names of trackers, such as tensorboard or wandb.
        project: the project of the run in these trackers.
        settings: shown in the trackers as the configuration of the run.
        resume_after: the step after which an earlier run in `folder` is resumed: its log and its runs in the trackers
            go on, and lines of later steps are dropped, because these steps come again. None begins a new log.

    Raises:
        UsageError: a tracker is not installed, or cannot be used as it is set up.
    """

    def __init__(
        self,
        folder: str | Path,
        trackers: Sequence[str] = (),
        project: str = "",
        settings: dict[str, Any] | None = None,
        resume_after: int | None = None,
    ) -> None:
        self.path = Path(folder) / LOG
        self._file: FileIO | None = None
        self._unsaved = b""  # what a full disk had no room for
        self._trackers: list[Tracking] = []
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries: list[dict[str, Any]] = []
        if resume_after is not None:
            entries = [entry for entry in read_log(self.path) if entry["step"] <= resume_after]
        ids = {entry["kind"]: entry["id"] for entry in entries if "id" in entry}
        try:
            for name in trackers:
                run = TrackedRun(self.path.parent, project, settings or {}, resume_after, ids.get(name))
                self._trackers.append(Tracking(name, run))
        except BaseException:
            self.close(failed=True)
            raise
        self._begin(entries)
        for tracker in self._trackers:
            if tracker.id and tracker.id != ids.get(tracker.name):
                self._write({"kind": tracker.name, "step": 0, "id": tracker.id})

    def log(self, kind: str, step: int, **figures: Any) -> None:
        """Append one line: kind, step, time (seconds since 1970) and the figures. NaN and infinity become null.

        Trackers show the figures as kind/name, such as train/loss; `epoch` has no kind.
        """
        if self._file is None:
            return
        self._write({"kind": kind, "step": step, "time": round(time(), 3)} | figures)
        named = {
            name if name == "epoch" else f"{kind}/{name}": _plain(value, float("nan"))
            for name, value in figures.items()
        }
        for tracker in self._trackers:
            tracker.log(named, step)

    def show(self, step: int, make: Callable[[], ShownResults]) -> None:
        """Give the trackers the tables and figures of the test, which are made only if there is a tracker."""
        if any(tracker.is_open for tracker in self._trackers):
            results = make()
            for tracker in self._trackers:
                tracker.show(results, step)

    @property
    def places(self) -> list[str]:
        """For each tracker, where its run is."""
        return [place for tracker in self._trackers if (place := tracker.place)]

    def close(self, failed: bool = False) -> None:
        """Close the log and the trackers, which have a bounded time to upload the rest. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._trackers:
            self._trackers.pop().close(failed)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Stopped))  # a run that was stopped can be resumed

    def _begin(self, entries: list[dict[str, Any]]) -> None:
        with replacing(self.path) as path:
            path.write_text("".join(_line(entry) for entry in entries), encoding="utf-8")
        self._file = self.path.open("ab", buffering=0)

    def _write(self, entry: dict[str, Any]) -> None:
        """Write a line. If there is no room for it, it is written with a later one, and the run goes on."""
        if self._file is None:
            return
        was_full = bool(self._unsaved)
        self._unsaved += _line(entry).encode()
        try:
            while self._unsaved:
                self._unsaved = self._unsaved[self._file.write(self._unsaved) :]
        except OSError as error:
            if not was_full:
                note(f"warning: {self.path} could not be written ({reason(error)}). The training goes on: make room.")


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, not_finite: float | None = None) -> Any:
    """A value as JSON has it: NumPy's and torch's become Python's, NaN and infinity become `not_finite`."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, not_finite) for item in value]
    return not_finite if isinstance(value, float) and not math.isfinite(value) else value

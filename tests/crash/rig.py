"""A training of a tiny model in forked processes, which start in a moment, and what must be true after each."""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from faults import Watch
from halves import save_images
from matplotlib.figure import Figure
from tiny import save_tiny_model
from transformers import AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

import train_vlm
import vlm.report
import vlm.training.running  # all that a run imports, before the first fork
from vlm.common import UsageError
from vlm.common.checksums import check_checksums

WEIGHTS = ("final_model/model.safetensors", "best_model/model.safetensors")
FOREIGN = {"notes.txt": "mine", "wandb/mine.txt": "mine too", "best_model.txt": "not a model"}
PATIENCE = 120.0  # seconds


@dataclass
class Ended:
    """How a process ended: exit code, or minus the signal; what it printed; the seconds that it took."""

    code: int
    text: str
    seconds: float


@dataclass
class Unbroken:
    """A run that nobody disturbed: its weights, names of files, counts of file operations, and how long it took."""

    weights: list[bytes] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    counts: dict[str, int] = field(default_factory=dict)
    largest: int = 0
    seconds: float = 0.0


class Rig:
    """Trains in a folder, as often as asked.

    Args:
        folder: for everything. tune: see --tune.
    """

    def __init__(self, folder: Path, tune: str) -> None:
        self.folder = folder
        self.figures = folder / "figures"
        folder.mkdir(parents=True)
        self.figures.mkdir()
        (folder / "images").mkdir()
        save_tiny_model(folder / "model")
        save_images(folder / "images")
        self.flags = ["--model", str(folder / "model"), "--dataset", str(folder / "images"), "--device", "cpu"]
        self.flags += ["--tune", tune, "--epochs", "3", "--batch-size", "6", "--gradient-accumulation-steps", "1"]
        self.flags += ["--learning-rate", "1e-2", "--save-minutes", "0.0001", "--threads", "1"]
        gc.collect()
        gc.freeze()  # a collection in a child would copy all of the parent's memory
        self.unbroken = self._run_undisturbed()

    def output(self, name: str) -> Path:
        """A new output folder, in which somebody has files of his own, with a cache of its own next to it."""
        output = self.folder / name / "out"
        for file, text in FOREIGN.items():
            (output / file).parent.mkdir(parents=True, exist_ok=True)
            (output / file).write_text(text)
        return output

    def start(self, output: Path, disturb: Callable[[Path], Any] = Watch, kill_after: float | None = None) -> Ended:
        """Start or resume the training in a process of its own, and wait for its end.

        Args:
            disturb: is called in the process with the output folder.
            kill_after: seconds after which it is killed.
        """
        resumes = (output / "training_metadata.json").exists()
        arguments = ["--resume", "--output-dir", str(output)] if resumes else self._fresh(output)

        def train() -> tuple[int, Any]:
            os.environ["VLM_CACHE"] = str(output.parent / "cache")
            Figure.savefig = self._savefig(Figure.savefig)
            watch = disturb(output)
            return train_vlm.main(arguments), watch

        return run_apart(train, output.parent, kill_after)

    def _fresh(self, output: Path) -> list[str]:
        return [*self.flags, "--output-dir", str(output)]

    def _savefig(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Draws each figure once for all runs: it takes longer than the rest of a run, and says nothing about files."""
        drawn = iter(range(100))

        def savefig(figure: Figure, file: Any, **options: Any) -> None:
            kept = self.figures / f"{next(drawn)}.{options['format']}"
            if not kept.exists():
                original(figure, kept, **options)
            file.write_bytes(kept.read_bytes()) if isinstance(file, Path) else file.write(kept.read_bytes())

        return savefig

    def _run_undisturbed(self) -> Unbroken:
        ended, output = Ended(-1, "", 0.0), Path()
        for name in ("drawing", "unbroken"):  # the first one draws the figures, the second one tells the time
            output = self.output(name)
            ended = self.start(output)
            if ended.code:
                raise SystemExit(f"the undisturbed run ended with {ended.code}:\n{ended.text}")
        return Unbroken(
            weights=[(output / name).read_bytes() for name in WEIGHTS],
            names={str(path.relative_to(output)) for path in output.rglob("*")},
            counts=json.loads((output.parent / "counts.json").read_text()),
            largest=max(path.stat().st_size for path in output.rglob("*.safetensors")),
            seconds=ended.seconds,
        )

    # What must be true

    def losses(self, output: Path, had_model: bool) -> list[str]:
        """What is lost after a run was disturbed: a model that is not whole, or somebody's own files."""
        found = []
        for file, text in FOREIGN.items():
            if not (output / file).is_file() or (output / file).read_text() != text:
                found.append(f"{file}, which no run wrote, is changed")
        model = output / "best_model"
        if model.exists() or had_model:
            try:
                check_checksums(model, "")
                AutoModelForImageTextToText.from_pretrained(model, local_files_only=True)
            except (UsageError, OSError, ValueError, RuntimeError) as error:
                found.append(f"best_model is not whole: {error}")
        return found

    def differences(self, output: Path, allowed: tuple[str, ...] = ()) -> list[str]:
        """What differs in a run that came to its end from the undisturbed one.

        Args:
            allowed: the beginnings of names that may be there.
        """
        found = [
            f"other weights in {name}"
            for name, expected in zip(WEIGHTS, self.unbroken.weights, strict=True)
            if (output / name).read_bytes() != expected
        ]
        names = {str(path.relative_to(output)) for path in output.rglob("*")}
        left = sorted(names - self.unbroken.names)
        found += [f"left behind: {name}" for name in left if not name.startswith(allowed)]
        found += [f"missing: {name}" for name in sorted(self.unbroken.names - names)]
        return found


def phase(output: Path) -> str:
    """How far the run in a folder has come, by its files."""
    for name, words in (("results.json", "the end"), ("final_model", "test"), ("training_metadata.json", "training")):
        if (output / name).exists():
            return words
    return "set-up"


def run_apart(work: Callable[[], tuple[int, Any]], folder: Path, kill_after: float | None) -> Ended:
    """Do some work in a process of its own, and wait for its end, or kill it after so many seconds.

    Args:
        work: returns the exit code, and what disturbed it.
        folder: gets printed.txt and, if a `Watch` was there to the end, its counts.json.
    """
    log = folder / "printed.txt"
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_the_child(work, folder, log)
    status = wait_for(child, kill_after)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, log.read_text(errors="replace"), time.monotonic() - began)


def _be_the_child(work: Callable[[], tuple[int, Any]], folder: Path, log: Path) -> None:
    """Never returns."""
    code = 99
    try:
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        code, watch = work()
        if isinstance(watch, Watch):
            (folder / "counts.json").write_text(json.dumps(watch.counts))
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        print(f"Traceback: {error!r}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, kill_after: float | None) -> int:
    """Wait for a process, or kill it after so many seconds; returns its status."""
    began = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() - began > (PATIENCE if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.002)


def prepare_for_forks() -> None:
    """Threads that the parent starts would be missing in its children."""
    torch.set_num_threads(1)
    disable_progress_bar()
    vlm.report.write_report  # noqa: B018  (imports what draws the figures)

"""What a run says while it works: notes and progress on stderr, `log.jsonl`, and Weights & Biases when asked for."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic, time
from typing import Any, TypeVar

from tqdm import tqdm

from vlm.common.errors import UsageError
from vlm.common.files import replacing

LOG_NAME = "log.jsonl"
SECONDS_BETWEEN_LINES = 10.0  # where stderr is no terminal
SECONDS_WORTH_A_LAST_LINE = 2.0
# wandb's own defaults wait 90 s for an unreachable server, and without end for the upload after the last step.
# Its capture of stdout and stderr is off, so that the program prints the same with and without it.
WANDB_SETTINGS = {"init_timeout": 20.0, "finish_timeout": 60.0, "console": "off"}

Item = TypeVar("Item")


def is_main_process() -> bool:
    """Whether this process is the one that speaks, of those that train together."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a line to stderr, above an open progress bar; on the main process only."""
    if is_main_process():
        tqdm.write(text, file=sys.stderr)


def _stderr_is_terminal() -> bool:
    """Whether bars can be drawn: some terminals, as in containers, say that they are 0 characters wide."""
    try:
        return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):
        return False


class Bar:
    """Progress with rate and time left: a bar on a terminal, else plain lines. Usable in `with`.

    Args:
        total: how many there are, or None if unknown.
        description: what is going on.
        unit: what is counted, in the plural.
        initial: how many were done earlier, in a run that is resumed.
        enabled: False shows nothing.
    """

    def __init__(
        self, total: int | None, description: str, unit: str = "images", initial: int = 0, enabled: bool = True
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.initial = self.done = initial
        self._figures: dict[str, Any] = {}
        self._started = self._said = monotonic()
        self._open = enabled and is_main_process()
        self._bar: tqdm | None = None
        if self._open and _stderr_is_terminal():
            # leave=None: a bar within another one disappears when it is complete
            self._bar = tqdm(
                total=total,
                desc=description,
                unit=f" {unit}",
                initial=initial,
                file=sys.stderr,
                dynamic_ncols=True,
                leave=None,
            )

    def update(self, n: int = 1, **figures: Any) -> None:
        """Count `n` more. `figures`, such as loss=0.31, are shown until they are given again."""
        self.done += n
        self._figures |= figures
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._shown()), refresh=False)
            self._bar.update(n)
        elif self._open and monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say(last=False)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For other work in between: the time that it takes counts neither in the rate nor in the time left."""
        began = monotonic()
        try:
            yield
        finally:
            away = monotonic() - began
            self._started += away
            if self._bar is not None:
                self._bar.start_t += away
                self._bar.last_print_t += away

    def close(self) -> None:
        """End the bar, or print the last line if it took long enough to matter. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._open and monotonic() - self._started >= SECONDS_WORTH_A_LAST_LINE:
            self._say(last=True)
        self._open = False

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, last: bool) -> None:
        self._said = monotonic()
        elapsed = max(self._said - self._started, 1e-6)
        rate = (self.done - self.initial) / elapsed
        count = f"{self.done:,} {self.unit}"
        if self.total:
            count = f"{self.done:,}/{self.total:,} {self.unit} ({self.done / self.total:.0%})"
        parts = [
            f"{self.description}: {count}",
            f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{rate:.2g} {self.unit}/s",
        ]
        if last:
            parts.append(f"took {tqdm.format_interval(elapsed)}")
        elif self.total and rate > 0:
            parts.append(f"{tqdm.format_interval(max(self.total - self.done, 0) / rate)} left")
        note(", ".join(parts + self._shown()))

    def _shown(self) -> list[str]:
        return [
            f"{name}={value if isinstance(value, int | str) else format(value, '.3g')}"
            for name, value in self._figures.items()
        ]


def progress(
    iterable: Iterable[Item],
    total: int | None,
    description: str,
    unit: str = "images",
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Go through `iterable` with a `Bar`. count: how many of the total an item is. To show figures, use `Bar`
    itself."""
    with Bar(total, description, unit) as bar:
        for item in iterable:
            yield item
            bar.update(count(item))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a `log.jsonl`, oldest first; none if there is no such file. A line that a kill cut short is left
    out."""
    path = Path(path)
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


class RunLog:
    """The figures of one run, as JSON lines and, when asked for, on Weights & Biases. Usable in `with`.

    Does nothing on processes other than the main one.

    Args:
        folder: the output folder; made if need be.
        use_wandb: log to Weights & Biases too; the environment variable WANDB_MODE is respected.
        project: the project there.
        settings: what is shown there as the run's configuration.
        resume: go on with the log, and with the W&B run, of an earlier run in `folder`; else begin a new log.

    Raises:
        UsageError: Weights & Biases cannot be used as it is set up.
    """

    def __init__(
        self, folder: str | Path, use_wandb: bool, project: str, settings: dict[str, Any], resume: bool = False
    ) -> None:
        self.path = Path(folder) / LOG_NAME
        self._file, self._wandb = None, None
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entries = read_log(self.path) if resume else []
        if use_wandb:
            earlier = [entry["id"] for entry in entries if entry["kind"] == "wandb"]
            self._wandb = _start_wandb(self.path.parent, project, settings, earlier[-1] if earlier else None)
        self._rewrite(entries)
        if self._wandb is not None and not self._wandb.offline:
            self._write({"kind": "wandb", "step": 0, "id": self._wandb.id})

    def log(self, kind: str, step: int, **figures: Any) -> None:
        """Append one line: kind, step, time (seconds since 1970) and the figures; a figure that is not finite becomes
        null.

        On W&B the figures are called kind/name, such as train/loss; `epoch` has no kind.
        """
        if self._file is None:
            return
        self._write({"kind": kind, "step": step, "time": round(time(), 3)} | figures)
        if self._wandb is not None:
            named = {
                name if name == "epoch" else f"{kind}/{name}": _plain(value, float("nan"))
                for name, value in figures.items()
            }
            self._try_wandb(lambda: self._wandb.log(named, step=step))

    def truncate_after(self, step: int) -> None:
        """Drop the lines above `step`, the step of the state that a run is resumed from, as they will come again."""
        if self._file is not None:
            self._rewrite([entry for entry in read_log(self.path) if entry["step"] <= step])

    def close(self, failed: bool = False) -> None:
        """Close the log and, waiting a minute at most, upload the rest to W&B. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._try_wandb(lambda: self._wandb.finish(exit_code=int(failed)))
            self._wandb = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def _rewrite(self, entries: list[dict[str, Any]]) -> None:
        if self._file is not None:
            self._file.close()
        with replacing(self.path) as path:
            path.write_text(
                "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8"
            )
        self._file = self.path.open("a", encoding="utf-8")

    def _try_wandb(self, action: Any) -> None:
        try:
            action()
        except Exception as error:
            note(f"Weights & Biases: {_one_line(error)}. The run goes on without it.")
            self._wandb = None


def _plain(value: Any, not_finite: float | None = None) -> Any:
    """A value as JSON has it: what NumPy and torch have becomes Python's, and `not_finite` stands for NaN and
    infinity."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, not_finite) for item in value]
    return not_finite if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(folder: Path, project: str, settings: dict[str, Any], run_id: str | None) -> Any:
    """A W&B run; recorded offline where the server cannot be reached."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            f"--use-wandb: wandb cannot be imported ({error}). Run `pip install wandb`, or leave out --use-wandb."
        ) from error
    known = {
        name: value
        for name, value in WANDB_SETTINGS.items()
        if name in wandb.Settings.model_fields and f"WANDB_{name.upper()}" not in os.environ
    }
    # create_new: another run that a notebook has open is neither ended nor mixed with this one
    where = {"project": project, "dir": str(folder.resolve()), "id": run_id, "resume": "allow" if run_id else None}
    start = partial(wandb.init, **where, config=settings, reinit="create_new")
    try:
        return start(settings=wandb.Settings(**known))
    except Exception as error:
        if isinstance(error, wandb.errors.CommError) and not isinstance(error, wandb.errors.AuthenticationError):
            note(
                f"Weights & Biases cannot be reached ({_one_line(error)}). It is recorded in {folder / 'wandb'}; upload with `wandb sync`."
            )
            return start(mode="offline", settings=wandb.Settings(**known))
        raise UsageError(
            f"--use-wandb: {_one_line(error)}\n       Log in with `wandb login`, or set WANDB_MODE=offline, or leave out --use-wandb."
        ) from error


def _one_line(error: Exception, longest: int = 200) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= longest else text[:longest] + "..."

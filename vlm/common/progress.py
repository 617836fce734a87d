"""What a program says while it works: notes and progress bars on stderr."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

from tqdm.asyncio import tqdm_asyncio

with warnings.catch_warnings():  # in a notebook without ipywidgets, where plain lines are written
    warnings.filterwarnings("ignore", message="IProgress not found")
    from tqdm.auto import tqdm

from vlm.common.processes import is_main_process
from vlm.common.text import printable, printable_lines

SECONDS_BETWEEN_LINES = 10.0  # if stderr is no terminal
SECONDS_WORTH_A_LAST_LINE = 2.0
DRAWS_WIDGETS = tqdm is not tqdm_asyncio  # tqdm.auto is another class in a notebook that has ipywidgets

Item = TypeVar("Item")


def note(text: str) -> None:
    """Print a line to stderr, above an open progress bar. Other processes than the main one print nothing.

    In a notebook, which shows stderr in red as if it were an error, the line goes to stdout.
    """
    if is_main_process():
        in_notebook = type(sys.stdout).__module__.startswith("ipykernel")
        tqdm.write(printable_lines(text), file=sys.stdout if in_notebook else sys.stderr)


def _can_draw() -> bool:
    """Whether bars can be drawn: in a notebook with widgets, or on a terminal.

    Some terminals, as in containers, report a width of 0 characters. They get plain lines.
    """
    if DRAWS_WIDGETS:
        return True
    try:
        return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):
        return False


class Bar:
    """Progress with rate and time left: a bar on a terminal or in a notebook, else plain lines. Usable in `with`.

    Args:
        total: how many items there are, or None if unknown.
        description: what is being done.
        unit: what is counted, in the plural.
        initial: how many items an interrupted run has done before.
        enabled: False shows nothing.
    """

    def __init__(
        self, total: int | None, description: str, unit: str = "images", initial: int = 0, enabled: bool = True
    ) -> None:
        self.total, self.description, self.unit = total, printable(description), unit
        self.initial = self.done = initial
        self._figures: dict[str, Any] = {}
        self._started = self._said = monotonic()
        self._open = enabled and is_main_process()
        self._bar: tqdm | None = None
        if self._open and _can_draw():
            # leave=None: a bar below another one disappears when it is complete
            self._bar = tqdm(
                total=total,
                desc=self.description,
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
        """For other work in between: its time counts neither in the rate nor in the time left."""
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

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(f"while {self.description}, {self._count()}")
        self.close()

    def _say(self, last: bool) -> None:
        self._said = monotonic()
        elapsed = max(self._said - self._started, 1e-6)
        rate = (self.done - self.initial) / elapsed
        parts = [
            f"{self.description}: {self._count()}",
            f"{rate:,.1f} {self.unit}/s" if rate >= 1 else f"{rate:.2g} {self.unit}/s",
        ]
        if last:
            parts.append(f"took {tqdm.format_interval(elapsed)}")
        elif self.total and rate > 0:
            parts.append(f"{tqdm.format_interval(max(self.total - self.done, 0) / rate)} left")
        note(", ".join(parts + self._shown()))

    def _count(self) -> str:
        if self.total:
            return f"{self.done:,}/{self.total:,} {self.unit} ({self.done / self.total:.0%})"
        return f"{self.done:,} {self.unit}"

    def _shown(self) -> list[str]:
        return [
            f"{name}={value if isinstance(value, int | str) else format(value, '.3g')}"
            for name, value in self._figures.items()
        ]


def with_bar(
    iterable: Iterable[Item],
    total: int | None,
    description: str,
    unit: str = "images",
    count: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items of `iterable` and show a `Bar`.

    Args:
        count: how many of the total an item is, such as the images in a batch.
    """
    with Bar(total, description, unit) as bar:
        for item in iterable:
            yield item
            bar.update(count(item))

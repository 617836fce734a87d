"""What Ctrl-C and SIGTERM do to a run: save and stop if there is something to save, else end it at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm.common import Stopped, is_main_process
from vlm.config import how_to_resume

TRAINING, TESTING = "training", "testing"  # phases that `Trainer` enters; before them there is nothing to save


class StopSignals:
    """Handles Ctrl-C (SIGINT) and SIGTERM, which clusters send.

    During the training the first signal asks the run to save and stop after the step, and the second ends it at once.
    Before the first step and after the last one there is nothing to save, so the first signal ends it.

    Args:
        output, dataset: the output folder and the dataset, for the message about how to continue.
    """

    def __init__(self, output: str, dataset: str | None = None) -> None:
        self.output, self.dataset = output, dataset
        self.asked = False
        self.phase = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside; afterwards they are handled as before.

        Only the main thread of a program may handle signals: in another thread they are left to it.
        """
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def should_stop(self) -> bool:
        """Whether the run was asked to stop after the step."""
        return self.asked

    def enter(self, phase: str) -> None:
        """Say what the run does from now on. A signal that came too late for the phase before takes effect here.

        Raises:
            Stopped: the training is over, and the run was asked to stop.
        """
        self.phase = phase
        if self.asked and phase == TESTING:
            raise self._stopped()

    def handle(self, number: int, frame: Any) -> None:
        """The signal handler."""
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked = True
        if self.phase != TRAINING:
            raise self._stopped()
        if is_main_process():
            print("\nstopping after this step; once more to stop at once.", file=sys.stderr)

    def _stopped(self) -> Stopped:
        if self.phase == TESTING:
            again = how_to_resume(Path(self.output), self.dataset)
            return Stopped(f"stopped after the training; continue with the test by {again}")
        return Stopped("stopped before the first step.")

"""A tracker in a thread of its own: the training never waits for it, and nothing that happens to it ends a run."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from queue import SimpleQueue
from time import monotonic
from typing import Any

from accelerate.tracking import GeneralTracker

from vlm.common import UsageError, note, one_line
from vlm.training.tracked_results import ShownResults, show_results
from vlm.training.tracker_check import in_short
from vlm.training.trackers import TITLES, TrackedRun, finish_tracker, place_of, start_tracker, tracked_id

# How long the run waits for a tracker before its first step and after its last one, and how long a call in between may
# take, for which nobody waits, in seconds.
TO_START, TO_FINISH, TO_LOG = 120.0, 90.0, 600.0

Call = tuple[Callable[[], Any], "Future[Any]"]


class Tracking:
    """A tracker that was started. One that fails or does not answer is left out from then on, and a note says so.

    Its calls run one after the other in one thread, as MLflow's run belongs to the thread that has started it.

    Args:
        name: one of `TITLES`.

    Attributes:
        id: see `tracked_id`; None if the tracker could not be started.

    Raises:
        UsageError: its package is missing, or it cannot be used as it is set up.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name = name
        self.id: str | None = None
        self._tracker: GeneralTracker | None = None  # None: left out
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._waiting: deque[Future[Any]] = deque()
        self._broken = False
        self._began = monotonic()  # the call that runs
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()
        try:
            self._tracker = self._answer(self._ask(partial(start_tracker, name, run)), TO_START)
            self.id = tracked_id(self._tracker)
        except UsageError:
            self._calls.put(None)
            raise
        except Exception as error:
            self._leave_out(error)

    @property
    def is_open(self) -> bool:
        """Whether the tracker was neither left out nor closed."""
        return self._tracker is not None

    @property
    def place(self) -> str | None:
        """The name of the tracker, and where its run is; None if it was left out."""
        return f"{TITLES[self.name]}: {place_of(self._tracker)}" if self._tracker is not None else None

    def log(self, figures: dict[str, float], step: int) -> None:
        """Pass figures on by their names."""
        if self._tracker is not None:
            self._tell(partial(self._tracker.log, figures, step=step))

    def show(self, results: ShownResults, step: int) -> None:
        """Pass on the tables and figures of the test."""
        if self._tracker is not None:
            self._tell(partial(show_results, self._tracker, results, step))

    def close(self, failed: bool) -> None:
        """Wait for what is on its way, and end the run of the tracker. A second call does nothing."""
        self._check()
        if self._tracker is None:
            return
        end = self._ask(partial(finish_tracker, self._tracker, failed))
        try:
            self._answer(end, TO_FINISH)
        except Exception as error:
            self._check()
            if self._tracker is not None:
                note(f"{TITLES[self.name]}: {in_short(error)}. Its record of the run may not be complete.")
        self._tracker = None
        self._calls.put(None)

    def _ask(self, call: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put((call, future))
        return future

    def _tell(self, call: Callable[[], Any]) -> None:
        self._check()
        if self._tracker is not None:
            self._waiting.append(self._ask(call))

    def _check(self) -> None:
        """Leave the tracker out if a call has failed, or takes too long."""
        while self._waiting and self._waiting[0].done():
            if error := self._waiting.popleft().exception():
                self._leave_out(error)
                return
        if self._waiting and monotonic() - self._began > TO_LOG:
            self._leave_out(_no_answer(TO_LOG))

    def _answer(self, future: "Future[Any]", seconds: float) -> Any:
        """What a call returns. What it prints is left out: stdout is for results, and `place` says where the run is.

        Raises:
            TimeoutError: it takes longer. What the call raises is raised here.
        """
        with redirect_stdout(StringIO()):
            wait([future], seconds)
        if not future.done():
            raise _no_answer(seconds)
        return future.result()

    def _leave_out(self, error: BaseException) -> None:
        note(f"{TITLES[self.name]}: {in_short(error)}. The run goes on without it.")
        self._tracker = None
        self._waiting.clear()
        self._broken = True
        self._calls.put(None)

    def _work(self) -> None:
        """Make the calls; after one that has failed, no other is made."""
        while (item := self._calls.get()) is not None:
            call, future = item
            self._began = monotonic()
            try:
                if self._broken:
                    raise RuntimeError("an earlier call has failed")
                future.set_result(call())
            except BaseException as error:
                self._broken = True
                future.set_exception(error if isinstance(error, Exception) else RuntimeError(one_line(error)))


def _no_answer(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer for {seconds:.0f} s")

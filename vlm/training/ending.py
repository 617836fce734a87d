"""Whether a training ends before its last step: because no model gets better (--patience), or for --time-limit."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator

from vlm.common import RunError, note
from vlm.config import RESULTS
from vlm.training.deadline import Deadline
from vlm.training.resume_state import Progress
from vlm.training.saving import Saver
from vlm.training.setup import Run
from vlm.training.time_needed import TimeNeeded


@dataclass(frozen=True)
class Ended:
    """A training that ended early.

    Attributes:
        by: patience or time_limit. given: the value of that flag. step: the last one. steps: of the whole training.
    """

    by: str
    given: int | str
    step: int
    steps: int

    def to_json(self) -> dict[str, Any]:
        """`ended_early` in `results.json`."""
        return asdict(self)


class Ending:
    """Decides between two steps whether the training goes on.

    Args:
        steps: of the whole training. between: the steps after which that is asked.
    """

    def __init__(self, run: Run, saver: Saver, deadline: Deadline, steps: int, between: int) -> None:
        self.run, self.deadline, self.steps, self.between = run, deadline, steps, between
        is_asked = deadline.limit and run.accelerator.is_main_process  # it decides for all
        self._needed = TimeNeeded(run, saver) if is_asked else None
        self._began = 0.0
        self._before = Progress()

    def measure(self, progress: Progress) -> None:
        """Time what comes after the last step, if there is a time limit. Nothing is written yet.

        Raises:
            RunError: there is no time for a step, and nothing to test that an earlier command has not tested.
        """
        if progress.step >= self.steps:
            return
        if self._needed is not None:
            self._needed.measure(self.deadline)
            note(f"time limit: evaluation, saving and test need {self._needed.in_words}.\n")
        untrained = self.run.settings.zero_shot and progress.zero_shot is None
        self.begin(progress, untrained, tested=(self.run.output / RESULTS).is_file())

    def begin(self, progress: Progress, untrained: bool = False, tested: bool = False) -> bool:
        """The training begins, or goes on after a step. All processes wait for each other here.

        Args:
            untrained: whether the test of the untrained model comes first.
            tested: whether the model of this step is tested already.

        Returns:
            Whether there is no time for a step.

        Raises:
            RunError: so it is, and there is nothing to test.
        """
        self._began = time.monotonic()
        self._before = Progress(step=progress.step, seconds=progress.seconds)
        if progress.step >= self.steps:
            return False
        (time_is_up,) = any_process(self.run.accelerator, self.time_is_up(progress, untrained=untrained))
        if time_is_up and (tested or not progress.step):
            raise self._too_short(progress.step)
        return time_is_up

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long."""
        if self._needed is not None:
            self._needed.evaluation = seconds

    def time_is_up(self, progress: Progress, evaluation: bool = False, untrained: bool = False) -> bool:
        """Whether there is no time for more steps. Processes other than the main one do not know, and answer no.

        Args:
            evaluation: whether one comes before these steps.
            untrained: whether the test of the untrained model comes before them.
        """
        if self._needed is None:
            return False
        more = self.between * self._step_seconds(progress) + (self._needed.evaluation if evaluation else 0.0)
        more += self._needed.untrained if untrained else 0.0
        return self.deadline.left < more + self._needed.seconds

    def why(self, progress: Progress, time_is_up: bool) -> Ended | None:
        """Why the training ends here, after the evaluation of this step; None if it goes on, or was the last step."""
        patience, limit = self.run.settings.patience, self.deadline.limit
        if progress.step >= self.steps:
            return None
        if time_is_up and limit:
            return Ended("time_limit", limit, progress.step, self.steps)
        if patience and progress.without_better >= patience:
            return Ended("patience", patience, progress.step, self.steps)
        return None

    def _too_short(self, step: int) -> RunError:
        """The error of a run that has no time for a step after this one; other processes than the main one only know
        that it is so."""
        if self._needed is None:
            return self.deadline.too_short(0.0, "", step)
        return self.deadline.too_short(self._needed.seconds, self._needed.in_words, step)

    def _step_seconds(self, progress: Progress) -> float:
        """The mean of a step of this command; the seconds of the last one are counted only after this is asked."""
        steps = progress.step - self._before.step
        if steps <= 1:
            return steps * (time.monotonic() - self._began)
        return (progress.seconds - self._before.seconds) / (steps - 1)


def any_process(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """For each wish, whether any process has it. All processes wait for each other here."""
    if accelerator.num_processes == 1:
        return list(wishes)
    found = torch.tensor([float(wish) for wish in wishes], device=accelerator.device)
    return [value > 0 for value in accelerator.reduce(found, "sum").tolist()]

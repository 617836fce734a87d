"""--time-limit: when a command has to be done."""

import time
from dataclasses import dataclass
from math import inf

from vlm.common import RunError
from vlm.config import Settings, in_words, rounded_up, seconds_of

RESERVE = 1.2  # the next command, and its steps, may take longer than what was measured


@dataclass
class Deadline:
    """When a command has to be done.

    Attributes:
        limit: as it was given; None: there is no limit. started, ends: seconds of `time.monotonic`.
    """

    limit: str | None
    started: float
    ends: float

    @classmethod
    def of(cls, settings: Settings, started: float | None = None) -> "Deadline":
        """The one that the settings ask for.

        Args:
            started: when the command began; None: now.
        """
        started = time.monotonic() if started is None else started
        seconds = seconds_of(settings.time_limit) if settings.time_limit else None
        return cls(settings.time_limit, started, inf if seconds is None else started + seconds)

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def end_of_part(self, count: int) -> float:
        """When the next of `count` equal parts of the time that is left ends."""
        return time.monotonic() + self.left / count

    def check(self) -> None:
        """Called before the first step, after and within what may take long.

        Raises:
            RunError: the time is over.
        """
        if self.left <= 0:
            passed = time.monotonic() - self.started
            raise RunError(
                f"--time-limit {self.limit} was over after {in_words(passed)}, before the training could begin. "
                "Give a longer one; vision features that were computed are kept."
            )

    def check_features(self) -> None:
        """Called while the vision features are computed.

        Raises:
            RunError: the time is over.
        """
        if self.left <= 0:
            raise RunError(
                f"--time-limit {self.limit} is over, and the vision features are not all computed. They are kept: "
                "start the same command again, and it goes on with them."
            )

    def too_short(self, needed: float, said: str, tested_step: int = 0) -> RunError:
        """The error of a run that has no time for a step.

        Args:
            needed: seconds for one evaluation, saving and the test. said: the same in words.
            tested_step: of an earlier command, whose results stay; 0 if there is none.
        """
        before = time.monotonic() - self.started
        kept = f"the results of step {tested_step:,} stay as they are" if tested_step else "vision features are kept"
        return RunError(
            f"--time-limit {self.limit} leaves no time for a step: {in_words(before)} passed before it, and "
            f"evaluation, saving and test need {said}. Give --time-limit {rounded_up(RESERVE * (before + needed))} "
            f"or longer; {kept}."
        )

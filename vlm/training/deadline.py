"""--time-limit: when a command has to be done."""

import time
from dataclasses import dataclass
from math import inf
from pathlib import Path

from vlm.common import RunError, resume_command
from vlm.config import Settings, in_words, seconds_of


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

    def too_short(self, needed: float, output: Path) -> RunError:
        """The error of a run that has no time for a first step.

        Args:
            needed: seconds for one evaluation, saving and the test. output: the output folder.
        """
        before = in_words(time.monotonic() - self.started)
        return RunError(
            f"--time-limit {self.limit} leaves no time for a step: {before} passed before the first one, and "
            f"evaluation, saving and test need about {in_words(needed)}. Continue with {resume_command(output)} "
            "and a longer --time-limit; vision features are kept."
        )

"""fit: a run from its settings to its results."""

from collections.abc import Callable
from typing import Any

from vlm.common import RunError, WriteError
from vlm.config import Settings
from vlm.evaluation import load_metric
from vlm.training.deadline import Deadline
from vlm.training.loop import Trainer
from vlm.training.output import output_folder
from vlm.training.results import finish
from vlm.training.setup import Run, set_up
from vlm.training.streamed import StreamTrainer
from vlm.training.trackers import check_trackers


def trainer_of(
    run: Run,
    should_stop: Callable[[], bool] = lambda: False,
    enter: Callable[[str], None] = lambda phase: None,
    deadline: Deadline | None = None,
) -> Trainer:
    """What trains a run: on a stream, or on images at known places."""
    return (StreamTrainer if run.data.stream else Trainer)(run, should_stop, enter, deadline)


def fit(
    settings: Settings,
    should_stop: Callable[[], bool] = lambda: False,
    enter: Callable[[str], None] = lambda phase: None,
    dataset: object = None,
    when_set_up: Callable[[Run], None] = lambda run: None,
    deadline: Deadline | None = None,
) -> dict[str, Any]:
    """Train, evaluate, save.

    Args:
        should_stop: asked after every step; True saves a state and raises `Stopped`.
        dataset: a `Dataset` or `DatasetDict` in the place of the one that the settings name.
        enter: told when the training begins, and when it is over (vlm/training/stopping.py).
        when_set_up: told of the run when it can start.
        deadline: when the run has to be done; None: in the time of the settings from now on.

    Returns:
        The content of `results.json`; empty on processes other than the main one.

    Raises:
        UsageError: settings or data with which the run cannot start.
        RunError: it had to stop.
        Stopped: it was asked to stop.
    """
    check_trackers(settings.trackers)
    with output_folder(settings):
        metrics = [load_metric(name) for name in settings.metrics or ()]  # a mistake here should not wait for the end
        deadline = deadline or Deadline.of(settings)
        run = set_up(settings, dataset, check=deadline.check_features)
        when_set_up(run)
        trainer = trainer_of(run, should_stop, enter, deadline)
        if settings.resume:
            trainer.resume()
        with trainer.begin() as log:
            trainer.train()
            if not run.accelerator.is_main_process:
                return {}
            try:
                return finish(run, trainer.progress, metrics, log, trainer.ended)
            except WriteError as error:
                raise RunError(
                    f"{error.path} could not be written ({error.reason}). The training is done: make room, then "
                    f"continue with the test by --resume --output-dir {run.output}."
                ) from error

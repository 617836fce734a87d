"""fit: a run from its settings to its results."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.common import RunError, UsageError, WriteError, command_of, is_main_process, note
from vlm.config import BEST_MODEL, Settings, how_to_resume, read_run
from vlm.evaluation import load_metric
from vlm.inference import read_metadata
from vlm.sharing import check_push, push_model
from vlm.training.deadline import Deadline
from vlm.training.loop import Trainer
from vlm.training.output import output_folder
from vlm.training.results import finish
from vlm.training.setup import Run, set_up
from vlm.training.streamed import StreamTrainer


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
    brief: bool = False,
) -> dict[str, Any]:
    """Train, evaluate, save.

    Args:
        should_stop: asked after every step; True saves a state and raises `Stopped`.
        dataset: a `Dataset` or `DatasetDict` in the place of the one that the settings name.
        enter: told when the training begins, and when it is over (vlm/training/stopping.py).
        when_set_up: told of the run when it can start.
        deadline: when the run has to be done; None: in the time of the settings from now on.
        brief: see `set_up`.

    Returns:
        The content of `results.json`; empty on processes other than the main one.

    Raises:
        UsageError: settings or data with which the run cannot start.
        RunError: it had to stop.
        Stopped: it was asked to stop.
    """
    if settings.push_to_hub is not None and is_main_process():
        check_push(settings.push_to_hub, settings.public)
    with output_folder(settings):
        metrics = [load_metric(name) for name in settings.metrics or ()]  # a mistake here should not wait for the end
        deadline = deadline or Deadline.of(settings)
        run = set_up(settings, dataset, deadline=deadline, brief=brief)
        when_set_up(run)
        trainer = trainer_of(run, should_stop, enter, deadline)
        if settings.resume:
            _point_out_push(settings)
            trainer.resume()
        trainer.ending.measure(trainer.progress)
        with trainer.begin() as log:
            trainer.train()
            if not run.accelerator.is_main_process:
                return {}
            try:
                results = finish(run, trainer.progress, metrics, log, trainer.ended)
            except WriteError as error:
                raise RunError(
                    f"{error.path} could not be written ({error.reason}). The training is done: make room, then "
                    f"continue with the test by {how_to_resume(run.output, settings.dataset)}."
                ) from error
        if settings.push_to_hub:
            _push(run.output / BEST_MODEL, settings.push_to_hub, settings.public)
        return results


def _point_out_push(settings: Settings) -> None:
    """Say that the interrupted run was to push its model, if this command does not: a folder cannot start an upload."""
    before = read_run(Path(settings.output_dir)).get("settings", {}).get("push_to_hub")
    if before and not settings.push_to_hub:
        note(f"note: the interrupted run had --push-to-hub {before}. Give it again if the model is to be pushed.")


def _push(folder: Path, repo: str, public: bool) -> None:
    """Push the best model. If that fails, the run is none the worse: a warning says how to do it later."""
    try:
        note(f"The model is at {push_model(folder, read_metadata(folder), repo, public)}")
    except (UsageError, RunError) as error:
        arguments = ["--model-dir", str(folder), "--push-to-hub", repo, *(["--public"] if public else [])]
        command = f"{command_of('inference_vlm.py', 'vlm-predict')} {shlex.join(arguments)}"
        note(f"warning: the model was not pushed. {error} The run is finished. To push its model later:\n  {command}")

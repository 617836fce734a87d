"""Starts and ends the trackers of accelerate: TensorBoard, Weights & Biases, Trackio and MLflow.

Each keeps its files in a folder of its own name in the output folder. The environment variables of a tracker, such as
WANDB_MODE, MLFLOW_TRACKING_URI or TRACKIO_DIR, are respected.
"""

import importlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from vlm.common import UsageError, note, one_line
from vlm.training.tracker_check import in_short, not_importable, wandb_login

TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "Trackio", "mlflow": "MLflow"}
# wandb waits 90 s for an unreachable server by default, and without end for the upload after the last step.
# Its capture of stdout and stderr is off, so the program prints the same with and without it.
# It is silent, because `place_of` says where the run is, and its errors are raised.
WANDB_SETTINGS: dict[str, Any] = {"init_timeout": 20.0, "finish_timeout": 60.0, "console": "off", "silent": True}

# MLflow tries to reach a server for minutes by default, and tells how it makes its tables.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told about a training run.

    Attributes:
        output: the output folder.
        project: the project (W&B, Trackio) or experiment (MLflow). TensorBoard has none.
        settings: shown as the configuration of the run.
        resume_after: the step after which an earlier run goes on; None: a new run.
        id: what the tracker called the earlier run; None: a new run.
    """

    output: Path
    project: str
    settings: dict[str, Any]
    resume_after: int | None = None
    id: str | None = None

    @property
    def name(self) -> str:
        """What a new run is called: the output folder, and a part of the run's id, because names may come again."""
        return "-".join(filter(None, (self.output.resolve().name, self.settings.get("run_id", "")[:6])))

    @property
    def simple_settings(self) -> dict[str, Any]:
        """The settings for trackers that take no None and no lists: those become text."""
        return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in self.settings.items()}


def start_tracker(name: str, run: TrackedRun) -> GeneralTracker:
    """A started tracker. `name` is one of `TITLES`.

    Raises:
        UsageError: its package is missing, or it cannot be used as it is set up. Any other error is the tracker's own.
    """
    start = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow}[name]
    try:
        return start(run)
    except ImportError as error:
        raise UsageError(not_importable(name, one_line(error))) from error


def tracked_id(tracker: GeneralTracker) -> str | None:
    """What a resumed run needs to go on with the same run of the tracker; None if it needs nothing."""
    match tracker.name:
        case "wandb":  # an offline record has no run on the server to go on with
            return None if tracker.tracker.offline else tracker.tracker.id
        case "trackio":
            return tracker.tracker.name
        case "mlflow":
            return tracker.tracker.info.run_id
    return None


def place_of(tracker: GeneralTracker) -> str:
    """Where the run of a tracker is: a command that shows it, or an address."""
    match tracker.name:
        case "tensorboard":
            return f"tensorboard --logdir {shlex.quote(str(Path(tracker.tracker.log_dir)))}"
        case "wandb":
            run = tracker.tracker
            return f"wandb sync {shlex.quote(str(Path(run.dir).parent))}" if run.offline else str(run.url)
        case "trackio":
            folder, project = shlex.quote(os.environ["TRACKIO_DIR"]), shlex.quote(tracker.run_name)
            return f"TRACKIO_DIR={folder} trackio show --project {project}"
    import mlflow

    uri = str(mlflow.get_tracking_uri())
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def finish_tracker(tracker: GeneralTracker, failed: bool) -> None:
    """End the run of a tracker; W&B and MLflow show whether it failed."""
    match tracker.name:
        case "wandb":
            tracker.tracker.finish(exit_code=int(failed))
        case "mlflow":
            import mlflow

            mlflow.end_run("FAILED" if failed else "FINISHED")
        case _:
            tracker.finish()


def _tensorboard(run: TrackedRun) -> GeneralTracker:
    importlib.import_module("tensorboard")  # else accelerate tries tensorboardX, and its error names that
    # TensorBoard hides what an interrupted run recorded from `purge_step` on, because those steps come again.
    purge_step = None if run.resume_after is None else run.resume_after + 1
    tracker = TensorBoardTracker("", run.output / "tensorboard", purge_step=purge_step)
    tracker.start()
    if run.resume_after is None:  # accelerate would put the settings into two folders of their own
        rows = "".join(f"| {name} | {value} |\n" for name, value in run.simple_settings.items())
        tracker.tracker.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", 0)
    return tracker


def _wandb(run: TrackedRun) -> GeneralTracker:
    """A W&B run; recorded offline if the server cannot be reached."""
    import wandb

    known = {
        name: value
        for name, value in WANDB_SETTINGS.items()
        if name in wandb.Settings.model_fields and f"WANDB_{name.upper()}" not in os.environ
    }

    def start(**options: Any) -> GeneralTracker:
        tracker = WandBTracker(
            run.project,
            dir=str(run.output.resolve()),
            id=run.id,
            name=None if run.id else run.name,
            resume="allow" if run.id else None,
            config=run.settings,
            reinit="create_new",  # another run that a notebook has open is neither ended nor mixed with this one
            settings=wandb.Settings(**known),
            **options,
        )
        tracker.start()
        return tracker

    try:
        return start()
    except wandb.errors.CommError as error:
        if isinstance(error, wandb.errors.AuthenticationError):
            raise wandb_login(error) from error
        record = run.output / "wandb"
        note(
            f"Weights & Biases cannot be reached ({in_short(error)}). The run is recorded in {record}; "
            "upload it with `wandb sync`."
        )
        return start(mode="offline")
    except Exception as error:
        raise wandb_login(error) from error


def _trackio(run: TrackedRun) -> GeneralTracker:
    # Trackio reads the variable once, when it is imported: all runs of one process share the folder of the first.
    os.environ.setdefault("TRACKIO_DIR", str((run.output / "trackio").resolve()))
    importlib.import_module("trackio")
    tracker = TrackioTracker(
        run.project,
        name=run.id or run.name,
        resume="allow" if run.id else "never",
        config=run.settings,
        embed=False,  # in a notebook it would start a server
    )
    tracker.start()
    return tracker


def _mlflow(run: TrackedRun) -> GeneralTracker:
    for variable, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(variable, value)
    import mlflow

    artifacts = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        folder = (run.output / "mlflow").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        artifacts = (folder / "artifacts").as_uri()
        mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by the line above: the next run has a folder of its own
    name = None if run.id else run.name
    tracker = MLflowTracker(run.project, logging_dir=artifacts, run_id=run.id, run_name=name)
    tracker.start()
    if run.id is None:
        tracker.store_init_configuration(run.simple_settings)
    return tracker

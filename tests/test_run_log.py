"""log.jsonl and the trackers: the real TensorBoard and Weights & Biases (offline), doubles of Trackio and MLflow."""

import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import types
from contextlib import nullcontext

import numpy as np
import pytest
from accelerate import PartialState
from tiny import random_image

from vlm.common.errors import UsageError
from vlm.config import METADATA, PAGE, RESULTS, read_settings, resolve
from vlm.config.defaults import TRACKERS
from vlm.training import fit, tracking
from vlm.training.run_log import RunLog, read_log
from vlm.training.tracked_results import CLASSES, FIGURES, MISTAKES, ShownResults, Table
from vlm.training.tracker_check import check_trackers


@pytest.fixture(scope="module", autouse=True)
def accelerate_is_set_up():
    """The trackers of accelerate ask it whether they are on the main process."""
    PartialState(cpu=True)


@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    """Without the login and the settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield monkeypatch
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # else the next test gets the environment of this one


def test_log_lines_are_json_and_readable_at_once(tmp_path):
    with RunLog(tmp_path / "new" / "folder") as log:
        log.log("train", 3, epoch=0.5, loss=np.float32(0.5), learning_rate=1e-4, counts=np.array([1, 2]))
        log.log("validation", 3, loss=math.nan, accuracy=math.inf, per_class={"Käse": math.nan, "b": 1})
        lines = (tmp_path / "new/folder/log.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first.pop("time") > 1.6e9
    assert first == {"kind": "train", "step": 3, "epoch": 0.5, "loss": 0.5, "learning_rate": 1e-4, "counts": [1, 2]}
    assert (second["loss"], second["accuracy"], second["per_class"]) == (None, None, {"Käse": None, "b": 1})


def test_a_resumed_log_has_no_repeated_steps_and_survives_a_half_written_line(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(1, 6):
            log.log("train", step, loss=1 / step, name="line\u2028separator")
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write('{"kind": "train", "step": 6, "name": "é'.encode()[:-1])
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    with RunLog(tmp_path, resume_after=3) as log:
        log.log("train", 4, loss=0.25)
    entries = read_log(tmp_path / "log.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[2]["loss"] == 1 / 3 and entries[2]["name"] == "line\u2028separator"
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_begins_a_new_log_and_a_resumed_one_without_a_log_does_too(tmp_path):
    for resume_after in (0, None, None):
        with RunLog(tmp_path, resume_after=resume_after) as log:
            log.log("train", 1, loss=1.0)
        assert len(read_log(tmp_path / "log.jsonl")) == 1
    log.log("train", 2, loss=1.0)  # after closing: nothing
    log.close()
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_other_processes_write_no_log(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with RunLog(tmp_path / "out", ["tensorboard"]) as log:
        log.log("train", 1, loss=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_wandb_offline_run_holds_the_metrics_below_the_output_folder(tmp_path, wandb_environment, capfd):
    with RunLog(tmp_path, ["wandb"], "test-project", {"learning_rate": 2e-4, "tune": "lora"}) as log:
        log.log("train", 1, epoch=0.1, loss=0.5)
        log.log("validation", 1, epoch=0.1, accuracy=0.75, loss=math.nan)
    sys.modules[
        "wandb"
    ].teardown()  # the file is written by a process of wandb's, which is complete when that has ended
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = recorded.read_bytes()
    for name in (
        b"train/loss",
        b"validation/accuracy",
        b"validation/loss",
        b"epoch",
        b"test-project",
        b"learning_rate",
    ):
        assert name in content
    assert b"train/epoch" not in content
    assert [entry["kind"] for entry in read_log(tmp_path / "log.jsonl")] == ["train", "validation"]
    assert capfd.readouterr().out == ""


def test_missing_wandb_login_is_a_usage_error_before_anything_is_written(tmp_path, wandb_environment):
    wandb_environment.setenv("WANDB_MODE", "online")
    wandb_environment.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(UsageError, match=r"(?s)--report-to wandb: .*wandb login.*WANDB_MODE=offline"):
        RunLog(tmp_path, ["wandb"], "test-project")
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("given", ["nothing", "key", "netrc", "offline"])
def test_a_missing_wandb_login_is_an_error_before_anything_is_loaded(tmp_path, wandb_environment, given):
    wandb_environment.setenv("WANDB_MODE", "offline" if given == "offline" else "online")
    if given == "key":
        wandb_environment.setenv("WANDB_API_KEY", "0" * 40)
    (tmp_path / "no_netrc").write_text("machine api.wandb.ai login me password secret\n" if given == "netrc" else "")
    (tmp_path / "no_netrc").chmod(0o600)
    refused = pytest.raises(UsageError, match="there is no login for ")
    with refused if given == "nothing" else nullcontext():
        check_trackers(["wandb"])


def test_a_wrong_wandb_mode_is_a_usage_error(tmp_path, wandb_environment):
    wandb_environment.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UsageError, match="sometimes"):
        RunLog(tmp_path, ["wandb"], "test-project")
    with pytest.raises(UsageError, match="sometimes"):
        check_trackers(["wandb"])


class BrokenRun:
    offline, id = False, "abc123"

    def __init__(self):
        self.logged, self.exit_code = [], None

    def log(self, figures, step):
        self.logged.append((step, figures))
        if len(self.logged) == 2:
            raise ConnectionError("the network\nwent away")

    def finish(self, exit_code):
        self.exit_code = exit_code


def fake_wandb_init(monkeypatch, run, error_when_online=None):
    import wandb

    calls = []

    def init(**arguments):
        calls.append(arguments)
        if error_when_online is not None and arguments.get("mode") != "offline":
            raise error_when_online
        return run

    monkeypatch.setattr(wandb, "init", init)
    return calls


def test_a_wandb_error_during_the_run_is_noted_once_and_the_run_goes_on(tmp_path, wandb_environment, capsys):
    run = BrokenRun()
    fake_wandb_init(wandb_environment, run)
    with RunLog(tmp_path, ["wandb"], "p") as log:
        for step in range(1, 5):
            log.log("train", step, loss=1.0)
    assert len(run.logged) == 2
    assert capsys.readouterr().err == "Weights & Biases: the network went away. The run goes on without it.\n"
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl") if entry["kind"] == "train"] == [1, 2, 3, 4]


def test_an_unreachable_server_means_an_offline_record_and_a_note(tmp_path, wandb_environment, capsys):
    import wandb

    calls = fake_wandb_init(wandb_environment, BrokenRun(), wandb.errors.CommError("no such host"))
    RunLog(tmp_path, ["wandb"], "p").close()
    assert [call.get("mode") for call in calls] == [None, "offline"]
    assert calls[0]["settings"].init_timeout <= 30, "an unreachable server is noticed in seconds"
    assert "no such host" in capsys.readouterr().err


def test_a_rejected_login_is_a_usage_error(tmp_path, wandb_environment):
    import wandb

    fake_wandb_init(wandb_environment, BrokenRun(), wandb.errors.AuthenticationError("user is not logged in"))
    with pytest.raises(UsageError, match="user is not logged in"):
        RunLog(tmp_path, ["wandb"], "p")


def test_a_resumed_run_goes_on_with_its_wandb_run_and_a_failed_one_is_marked(tmp_path, wandb_environment):
    run = BrokenRun()
    calls = fake_wandb_init(wandb_environment, run)
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, ["wandb"], "p") as log:
        log.log("train", 1, loss=1.0)
        raise ZeroDivisionError
    assert run.exit_code == 1
    with RunLog(tmp_path, ["wandb"], "p", resume_after=0):
        pass
    assert run.exit_code == 0
    assert [call["id"] for call in calls] == [None, "abc123"]
    with RunLog(tmp_path, ["wandb"], "p", resume_after=0):
        pass
    assert calls[-1]["id"] == "abc123", "truncating keeps the id"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_a_usage_error(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=f"--report-to {name}: .*pip install {name}"):
        RunLog(tmp_path, [name])
    assert not (tmp_path / "log.jsonl").exists()


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), purge_orphaned_data=True).Reload()


def scalars(folder):
    """The figures that TensorBoard reads from a folder: tag -> list of (step, value)."""
    events = events_of(folder)
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_figures_and_a_resumed_run_takes_the_place_of_the_steps_that_come_again(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, ["tensorboard"], "p", {"learning_rate": 2e-4, "tune": "lora", "metrics": None}) as log:
        for step in (1, 2, 3):
            log.log("train", step, epoch=step / 4, loss=np.float32(0.5))
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "tensorboard"}
    with RunLog(tmp_path, ["tensorboard"], "p", resume_after=2) as log:
        log.log("train", 3, epoch=0.75, loss=0.25)
        log.log("validation", 3, epoch=0.75, loss=math.nan, accuracy=1.0)
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 0.5), (2, 0.5), (3, 0.25)]
    assert found["validation/accuracy"] == [(3, 1.0)] and math.isnan(found["validation/loss"][0][1])
    assert "epoch" in found and "train/epoch" not in found
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir()), "no folders without figures"
    (settings,) = events_of(tmp_path / "tensorboard").Tensors("settings/text_summary")
    assert b"| learning_rate | 0.0002 |" in (text := settings.tensor_proto.string_val[0]) and b"| tune | lora |" in text


def test_when_a_second_tracker_cannot_start_the_first_one_is_ended(tmp_path, monkeypatch, wandb_environment):
    run = BrokenRun()
    fake_wandb_init(wandb_environment, run)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="--report-to mlflow"):
        RunLog(tmp_path, ["wandb", "mlflow"], "p")
    assert run.exit_code == 1 and not (tmp_path / "log.jsonl").exists()


class Recorder(types.ModuleType):
    """In the place of a package: every function records its name and arguments, and returns what was set."""

    def __init__(self, name, **results):
        super().__init__(name)
        self.calls, self.results = [], results

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.calls.append((name, arguments, named)) or self.results.get(name)

    def of(self, wanted):
        """The (arguments, named arguments) of the calls of a function."""
        return [(arguments, named) for name, arguments, named in self.calls if name == wanted]


def test_trackio_records_in_the_output_folder_and_a_resumed_run_goes_on_under_its_name(tmp_path, monkeypatch):
    run = Recorder("run")
    run.name = "brave-fox-1"
    package = Recorder("trackio", init=run)
    monkeypatch.setitem(sys.modules, "trackio", package)
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    for resume_after in (None, 1):
        settings = {"tune": "lora", "run_id": "0123456789"}
        with RunLog(tmp_path, ["trackio"], "p", settings, resume_after=resume_after) as log:
            log.log("train", 1, loss=0.5)
            assert log.places == [f"Trackio: TRACKIO_DIR={tmp_path / 'trackio'} trackio show --project p"]
    first, second = (named for _, named in package.of("init"))
    assert first["project"] == second["project"] == "p" and first["config"] == settings
    assert (first["name"], first["resume"]) == (f"{tmp_path.name}-012345", "never")
    assert (second["name"], second["resume"]) == ("brave-fox-1", "allow")
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
    assert run.of("log") == [(({"train/loss": 0.5},), {"step": 1})] * 2 and len(run.of("finish")) == 2


@pytest.fixture
def mlflow(monkeypatch):
    """A double of the package, without the settings of whoever runs the tests."""
    active = types.SimpleNamespace(info=types.SimpleNamespace(run_id="0123abc"))
    package = Recorder("mlflow", search_experiments=[], create_experiment="1", start_run=active)
    limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    package.utils = types.SimpleNamespace(validation=limits)
    monkeypatch.setitem(sys.modules, "mlflow", package)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return package


def test_mlflow_records_in_the_output_folder_and_a_resumed_run_goes_on_under_its_id(tmp_path, mlflow, monkeypatch):
    with RunLog(tmp_path, ["mlflow"], "p", {"tune": "lora", "metrics": None}) as log:
        log.log("train", 1, loss=0.5)
        monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "sqlite:////there/mlflow.db", raising=False)
        assert log.places == ["MLflow: mlflow ui --backend-store-uri sqlite:////there/mlflow.db"]
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, ["mlflow"], "p", {"resume": True}, resume_after=1):
        raise ZeroDivisionError
    place = (tmp_path / "mlflow").resolve()
    assert mlflow.of("set_tracking_uri") == [((f"sqlite:///{place.as_posix()}/mlflow.db",), {})] * 2
    assert mlflow.of("create_experiment")[0][1]["artifact_location"] == (place / "artifacts").as_uri()
    assert [named["run_id"] for _, named in mlflow.of("start_run")] == [None, "0123abc"]
    assert mlflow.of("log_params") == [(({"tune": "lora", "metrics": "None"},), {})], "once, since they cannot change"
    assert mlflow.of("log_metrics") == [(({"train/loss": 0.5},), {"step": 1})]
    assert [arguments for arguments, _ in mlflow.of("end_run")] == [("FINISHED",), ("FAILED",)]


def test_mlflow_uses_the_server_that_the_environment_names(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    RunLog(tmp_path, ["mlflow"], "p").close()
    assert mlflow.of("set_tracking_uri") == [] and not (tmp_path / "mlflow").exists()


def test_a_full_disk_does_not_end_the_run_and_no_line_is_lost(tmp_path, capsys):
    """The room ends in the middle of a line; later there is room again."""
    resource = pytest.importorskip("resource")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path) as log:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
            for step in range(1, 6):
                log.log("train", step, loss=0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
        assert [entry["step"] for entry in read_log(log.path)] == [1, 2]
        log.log("train", 6, loss=0.5)
    assert [entry["step"] for entry in read_log(log.path)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err == (
        f"warning: {log.path} could not be written (file too large). The training goes on: make room.\n"
    )


@pytest.mark.parametrize("line", ["[1]", "3", '{"kind": "train"}', '{"step": "x"}', "[" * 100_000, '{"step": 1'])
def test_a_damaged_line_is_left_out(tmp_path, line):
    (tmp_path / "log.jsonl").write_text(f'{line}\n{{"kind": "train", "step": 2}}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"kind": "train", "step": 2}]
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").mkdir()
    assert read_log(tmp_path / "log.jsonl") == []


class SlowRun(BrokenRun):
    """A run of W&B of which one call waits without an end."""

    def __init__(self, waits_in, until):
        super().__init__()
        self.waits_in, self.until = waits_in, until

    def log(self, figures, step):
        self.logged.append((step, figures))
        if self.waits_in == "log":
            self.until.wait()

    def finish(self, exit_code):
        if self.waits_in == "finish":
            self.until.wait()
        super().finish(exit_code)


@pytest.mark.parametrize(
    ("waits_in", "said"),
    [
        ("log", "Weights & Biases: no answer for 0 s. The run goes on without it.\n"),
        ("finish", "Weights & Biases: no answer for 0 s. Its record of the run may not be complete.\n"),
    ],
)
def test_a_tracker_that_does_not_answer_is_left_out(tmp_path, wandb_environment, capsys, waits_in, said):
    until = threading.Event()
    for name in ("TO_LOG", "TO_FINISH"):
        wandb_environment.setattr(tracking, name, 0.2)
    run = SlowRun(waits_in, until)
    fake_wandb_init(wandb_environment, run)
    try:
        with RunLog(tmp_path, ["wandb"], "p") as log:
            log.log("train", 1, loss=1.0)
            if waits_in == "log":
                time.sleep(0.4)
            log.log("train", 2, loss=1.0)
    finally:
        until.set()
    assert capsys.readouterr().err == said
    assert [entry["step"] for entry in read_log(log.path) if entry["kind"] == "train"] == [1, 2]


@pytest.mark.parametrize("waits", [False, True])
def test_a_tracker_that_cannot_be_started_is_left_out(tmp_path, mlflow, monkeypatch, capsys, waits):
    until = threading.Event()

    def start_run(**named):
        if waits:
            until.wait()
        raise ConnectionError("connection refused")

    mlflow.start_run = start_run
    monkeypatch.setattr(tracking, "TO_START", 0.3)
    try:
        with RunLog(tmp_path, ["mlflow"], "p") as log:
            log.log("train", 1, loss=0.5)
            log.show(1, pytest.fail)
    finally:
        until.set()
    why = "no answer for 0 s" if waits else "connection refused"
    assert capsys.readouterr().err == f"MLflow: {why}. The run goes on without it.\n"
    assert read_log(log.path)[-1]["step"] == 1
    assert int(os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) <= 5, "MLflow tries for minutes by default"


def shown(folder):
    """A small test with one mistake, whose figures are there as files."""
    for file in FIGURES.values():
        random_image(1).save(folder / file)
    for file in (RESULTS, PAGE):
        (folder / file).write_text("{}")
    seen = [random_image(2), "a.png", "cat", "dog", 0.75, "Answer: dog | sure"]
    mistakes = [seen, [None, "b.png", "dog", "cat", 0.5, ""]]
    columns = ("image", "name", "true class", "prediction", "confidence", "text")
    tables = {CLASSES: Table(("class", "F1"), [["cat", 0.5], ["dog", 0.25]]), MISTAKES: Table(columns, mistakes)}
    return ShownResults(folder, {name: folder / file for name, file in FIGURES.items()}, tables)


def test_tensorboard_shows_the_figures_and_tables_of_the_test(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, ["tensorboard"], "p") as log:
        log.show(7, lambda: shown(tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {*FIGURES, "test/mistakes/01"}
    assert events.Images("test/mistakes/01")[0].step == 7
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("test/mistakes/text_summary"))
    assert text.splitlines()[2:] == [
        "| test/mistakes/01 | a.png | cat | dog | 0.7500 | Answer: dog \\| sure |",
        "|  | b.png | dog | cat | 0.5000 |  |",
    ]


def test_trackio_gets_the_figures_and_tables_with_images(tmp_path, monkeypatch):
    run = Recorder("run")
    run.name = "brave-fox-1"
    package = Recorder("trackio", init=run)
    package.Image, package.Table = lambda value: ("image", value), lambda dataframe: dataframe.values.tolist()
    monkeypatch.setitem(sys.modules, "trackio", package)
    with RunLog(tmp_path, ["trackio"], "p") as log:
        log.show(7, lambda: shown(tmp_path))
    (((values,), named),) = run.of("log")
    assert named == {"step": 7} and set(values) == {*FIGURES, CLASSES, MISTAKES}
    assert values["test/confusion_matrix"] == ("image", str(tmp_path / "confusion_matrix.png"))
    assert values[MISTAKES][0][0][0] == "image" and values[MISTAKES][0][1:5] == ["a.png", "cat", "dog", 0.75]


@pytest.mark.slow
def test_wandb_gets_figures_and_mistakes_as_images_in_the_folder_of_the_run(tmp_path, wandb_environment):
    """A `wandb.Table` would leave a copy of everything in the home folder."""
    wandb_environment.setenv("WANDB_DATA_DIR", str(tmp_path / "elsewhere"))
    with RunLog(tmp_path, ["wandb"], "p") as log:
        log.show(7, lambda: shown(tmp_path))
    sys.modules["wandb"].teardown()
    (media,) = (tmp_path / "wandb").glob("offline-run-*/files/media")
    images = {re.sub(r"_0_.*", "", path.relative_to(media).as_posix()) for path in media.rglob("*") if path.is_file()}
    assert {f"images/{name}" for name in (*FIGURES, MISTAKES)} <= images and f"html/{CLASSES}" in images
    (recorded,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"true class: cat, prediction: dog, confidence: 0.7500, text: Answer: dog | sure" in recorded.read_bytes()
    assert not list((tmp_path / "elsewhere").rglob("*.*"))


def test_mlflow_keeps_the_figures_and_tables_of_the_test_as_artifacts(tmp_path, mlflow):
    with RunLog(tmp_path, ["mlflow"], "p") as log:
        log.show(7, lambda: shown(tmp_path))
    artifacts = [arguments for arguments, _ in mlflow.of("log_artifact")]
    assert (str(tmp_path / "confusion_matrix.png"), "test") in artifacts and (str(tmp_path / RESULTS),) in artifacts
    assert [arguments[1] for arguments, _ in mlflow.of("log_image")] == ["test/mistakes/01.png"]
    (rows,) = (arguments[0]["rows"] for arguments, _ in mlflow.of("log_dict") if arguments[1] == "test/mistakes.json")
    assert [row["image"] for row in rows] == ["test/mistakes/01.png", None] and rows[0]["prediction"] == "dog"


@pytest.mark.slow
def test_a_tracker_lives_until_the_test_is_shown_and_is_ended_if_that_fails(tmp_path, wandb_environment):
    run = Recorder("run")
    run.id, run.offline = "abc123", False
    calls = fake_wandb_init(wandb_environment, run)
    given = {"demo": True, "max_samples": 20, "epochs": 1, "zero_shot": True, "track": ["wandb"]}
    with wandb_environment.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("vlm.training.results.write_report", lambda *arguments: 1 / 0)
        fit(resolve(given | {"output_dir": str(tmp_path / "out")}))
    assert run.of("finish")[-1][1] == {"exit_code": 1}
    saved = read_settings(json.loads((tmp_path / "out" / METADATA).read_text())["settings"])
    results = fit(resolve({"resume": True, "output_dir": str(tmp_path / "out")}, saved))
    assert run.of("finish")[-1][1] == {"exit_code": 0} and calls[1]["id"] == "abc123"
    config = calls[0]["config"]
    assert config["class_names"][0] == "zero" and config["dataset_kind"] == config["dataset_dataset"]
    assert "dataset_commit" in config and config["epochs"] == 1
    logged = {name: value for (figures,), _ in run.of("log") for name, value in figures.items()}
    assert logged["test/accuracy"] == results["test"]["accuracy"]
    assert logged["test/ece_high"] == results["test"]["calibration"]["after"]["ece"][2]
    assert logged["zero_shot/accuracy"] == results["zero_shot"]["accuracy"]
    assert {"train/loss", "validation/accuracy", *FIGURES, CLASSES, MISTAKES} <= logged.keys()
    assert [entry["kind"] for entry in read_log(tmp_path / "out" / "log.jsonl")].count("test") == 1

"""Several processes: one of them fails, and the launcher says which one, why, and how to go on."""

import json

import pytest
from commands import ROOT, TRACEBACK, run

from vlm.common import RunError, UsageError, exit_code, switches_as_before
from vlm.config import METADATA, RESULTS

with switches_as_before():  # the launcher sets environment variables for the processes that it starts
    import launch_processes

FLAGS = ["--demo", "--max-samples", 20, "--epochs", 3, "--batch-size", 2, "--device", "cpu"]
KILLED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train_vlm
from vlm.training.loop import Trainer

run_step = Trainer.run_step

def killed(self, *arguments):
    if self.progress.step == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return run_step(self, *arguments)

Trainer.run_step = killed
sys.exit(train_vlm.main())
"""


@pytest.mark.slow
def test_the_last_line_says_which_process_was_killed_and_the_run_can_be_resumed(tmp_path):
    script, output = tmp_path / "killed.py", tmp_path / "results"
    script.write_text(KILLED)
    launch = ["launch_processes.py", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    result = run(*launch, script, *FLAGS, "--output-dir", output)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: process 1 of this run was killed by SIGKILL, as the system does if memory runs out. "
        f"The others were ended. Continue with --resume --output-dir {output}."
    )
    assert result.stderr.count("error: ") == 1 and TRACEBACK not in result.stderr
    assert "gloo" not in result.stderr and "elastic" not in result.stderr
    result = run(*launch, ROOT / "train_vlm.py", "--resume", "--output-dir", output)
    assert result.returncode == 0 and (output / RESULTS).is_file(), result.stderr


class Failure:
    def __init__(self, exitcode, message="", timestamp=7):
        self.exitcode, self.timestamp = exitcode, timestamp
        self.error_file_data = {"message": {"message": message} if message else ""}

    def signal_name(self):
        return "SIGSEGV"


class Failed:
    def __init__(self, **failures):
        self.failures = {int(name[1:]): failure for name, failure in failures.items()}


LOST = "another process of this run has ended"


@pytest.mark.parametrize(
    ("failures", "said", "code"),
    [
        ({"p0": Failure(2, "--max-samples 3"), "p1": Failure(-15)}, "", 2),
        (
            {"p0": Failure(1, LOST, 3), "p1": Failure(-11, timestamp=9)},
            "process 1 of this run was killed by SIGSEGV.",
            1,
        ),
        ({"p0": Failure(1, LOST, 3), "p2": Failure(1, "no room.", 9)}, "process 2 of this run failed: no room. The", 1),
        (
            {"p1": Failure(1, LOST), "p0": Failure(1, "said already")},
            "process 0 of this run failed with exit code 1.",
            1,
        ),
        ({"p1": Failure(2, "no such file.")}, "process 1 of this run failed: no such file. The", 2),
        ({"p3": Failure(77)}, "process 3 of this run failed with exit code 77.", 1),
        ({"p0": Failure(2, "said already"), "p1": Failure(2, "said already")}, None, 2),
        ({"p0": Failure(130), "p1": Failure(130)}, None, 130),
    ],
)
def test_the_cause_is_the_process_that_did_not_only_lose_another_one(failures, said, code, tmp_path):
    text, found = launch_processes.explain(Failed(**failures), tmp_path)
    assert found == code
    assert text.startswith(f"error: {said}") if said else text == ""


def test_a_run_that_did_not_begin_or_is_finished_is_started_again(tmp_path):
    failed = Failed(p1=Failure(-9))
    assert launch_processes.explain(failed, tmp_path)[0].endswith(" Start it again.")
    (tmp_path / METADATA).touch()
    assert launch_processes.explain(failed, tmp_path)[0].endswith(f" Continue with --resume --output-dir {tmp_path}.")
    (tmp_path / RESULTS).touch()
    assert launch_processes.explain(failed, tmp_path)[0].endswith(" Start it again.")


@pytest.mark.parametrize(
    ("failures", "text", "code"),
    [
        ({"p0": Failure(1, "3 of 9 images could not be read")}, "", 1),
        (
            {"p1": Failure(-9)},
            "error: process 1 of this run was killed by SIGSEGV, as the system does if memory runs out. The others "
            "were ended. The same command with --resume goes on.",
            1,
        ),
    ],
)
def test_an_inference_goes_on_with_resume(failures, text, code):
    assert launch_processes.output_folder(["--num_processes", "2", "/x/inference_vlm.py", "--output", "x.csv"]) is None
    assert launch_processes.explain(Failed(**failures), None) == (text, code)


def test_the_output_folder_is_that_of_the_training(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    folder = launch_processes.output_folder
    assert str(folder(["--num_processes", "2", "train_vlm.py", "--output-dir=~/x", "--demo"])) == "/home/me/x"
    assert str(folder(["--num_processes", "2", "train_vlm.py", "--demo"])) == "vlm_results"


@pytest.mark.parametrize(
    ("rank", "error", "printed", "told"),
    [
        ("0", RunError("no room"), "error: no room\n", "no room"),
        ("1", RunError("no room"), "", "no room"),
        ("1", UsageError("no file"), "", "no file"),
        ("0", RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), "", LOST),
        ("1", RuntimeError("DistBackendError: ncclRemoteError: remote process exited"), "", LOST),
    ],
)
def test_a_process_tells_the_launcher_why_and_only_the_main_one_speaks(
    rank, error, printed, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vlm.common.processes.SECONDS_TO_BE_ENDED", 0.0)
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "why")}.items():
        monkeypatch.setenv(name, value)

    def fail():
        raise error

    exit_code(fail)
    assert capsys.readouterr().err == printed
    assert json.loads((tmp_path / "why").read_text())["message"]["message"] == told


def test_without_a_launcher_every_process_speaks_for_itself(monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("RANK", "1")

    def fail():
        raise RunError("no room")

    exit_code(fail)
    assert capsys.readouterr().err == "error: no room\n"

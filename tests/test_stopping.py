"""Runs that do not reach their end: stopped, killed, out of numbers, out of memory; and what is left to go on with."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from commands import PATIENCE, TRACEBACK, command, names_in, surroundings, train
from safetensors.torch import load_file

from vlm.classifier.classifier import LossOutput, VLMClassifier
from vlm.common import Stopped, resume_command
from vlm.config import IN_MEMORY
from vlm.training.loop import Trainer
from vlm.training.stopping import TESTING, TRAINING, StopSignals

# 20 images in steps of 2: 10 steps an epoch.
FLAGS = ["--demo", "--max-samples", 20, "--epochs", 8, "--batch-size", 2, "--eval-batch-size", 20, "--device", "cpu"]


def weights(output):
    return load_file(output / "final_model" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The weights of a run that nobody stopped."""
    output = tmp_path_factory.mktemp("unbroken")
    assert train(*FLAGS, "--output-dir", output) == 0
    return weights(output)


def stop_when(there, number, output):
    """Start the training in a process of its own and send it a signal once a file is there; exit code and stderr."""
    with subprocess.Popen(
        command("run_vlm_training.sh", *FLAGS, "--output-dir", output),
        env=surroundings(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while not (there.exists() and there.read_bytes()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(), process.stderr.read()


def goes_on_to_the_same_end(output, unbroken):
    """`--resume` finishes the run, with the weights of one that was never stopped."""
    assert not (output / "results.json").exists() and not (output / "final_model").exists()
    assert train("--resume", "--output-dir", output) == 0
    assert {"results.json", "best_model", "final_model"} <= names_in(output) and "resume_state" not in names_in(output)
    ended = weights(output)
    return ended.keys() == unbroken.keys() and all(torch.equal(ended[name], unbroken[name]) for name in unbroken)


@pytest.mark.slow
def test_ctrl_c_saves_the_state_and_says_how_to_go_on(tmp_path, unbroken):
    code, err = stop_when(tmp_path / "log.jsonl", signal.SIGINT, tmp_path)
    assert code == 130 and TRACEBACK not in err
    assert "stopping after this step; once more to stop at once." in err
    last = err.splitlines()[-1]
    assert last.startswith("stopped after step ") and " of 80; continue with " in last
    assert last.endswith(f"train_vlm.py --resume --output-dir {tmp_path}")
    assert goes_on_to_the_same_end(tmp_path, unbroken)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path, unbroken, capsys):
    code, _ = stop_when(tmp_path / "resume_state" / "state.json", signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL
    assert goes_on_to_the_same_end(tmp_path, unbroken)
    err = capsys.readouterr().err
    assert any(f"continuing after step {step} of 80." in err for step in range(10, 80, 10)), (
        "not from the last end of an epoch"
    )


def send_after(monkeypatch, step, *numbers):
    """Let this process send itself signals after an optimizer step."""
    original = Trainer.run_step

    def with_signals(self, *arguments):
        loss = original(self, *arguments)
        if self.progress.step + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(Trainer, "run_step", with_signals)


@pytest.mark.slow
def test_sigterm_as_clusters_send_it_saves_the_state_too(tmp_path, unbroken, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        send_after(patched, 13, signal.SIGTERM)
        assert train(*FLAGS, "--output-dir", tmp_path) == 130
    assert capsys.readouterr().err.endswith(f"stopped after step 13 of 80; continue with {resume_command(tmp_path)}\n")
    assert goes_on_to_the_same_end(tmp_path, unbroken)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys):
    send_after(monkeypatch, 5, signal.SIGINT, signal.SIGINT)
    assert train(*FLAGS, "--output-dir", tmp_path) == 130
    err = capsys.readouterr().err
    assert err.endswith("\nstopped.\n") and TRACEBACK not in err
    assert "resume_state" not in names_in(tmp_path)


def send_from(monkeypatch, place):
    """Let this process send itself a SIGTERM when a function of the program is called."""
    monkeypatch.setattr(place, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGTERM))


@pytest.mark.parametrize(
    "place",
    [
        "vlm.training.setup.preflight",
        "vlm.training.time_needed.TimeNeeded.measure",
        "vlm.training.loop.Trainer.test_untrained",
    ],
)
def test_before_the_first_step_it_ends_at_once_and_leaves_no_run(tmp_path, monkeypatch, capsys, place):
    (tmp_path / "there").mkdir()
    send_from(monkeypatch, place)
    for name in ("new", "there"):
        assert train(*FLAGS, "--zero-shot", "--time-limit", "2h", "--output-dir", tmp_path / name) == 130
        err = capsys.readouterr().err
        assert err.endswith("\nstopped before the first step.\n") and "stopping after this step" not in err
    assert names_in(tmp_path) == {"there"} and "training_metadata.json" not in names_in(tmp_path / "there")


@pytest.mark.slow
def test_during_the_final_test_it_ends_at_once_and_can_be_tested_later(tmp_path, unbroken, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        send_from(patched, "vlm.training.running.finish")
        assert train(*FLAGS, "--output-dir", tmp_path) == 130
    err = capsys.readouterr().err
    assert err.endswith(f"stopped after the training; continue with the test by {resume_command(tmp_path)}\n")
    assert "stopping after this step" not in err and not (tmp_path / "results.json").exists()
    assert train("--resume", "--output-dir", tmp_path) == 0
    assert (tmp_path / "results.json").exists()
    assert all(torch.equal(tensor, unbroken[name]) for name, tensor in weights(tmp_path).items())


def test_a_wish_that_came_too_late_for_the_last_step_ends_the_run_behind_it():
    signals = StopSignals("out")
    signals.enter(TRAINING)
    signals.handle(signal.SIGTERM, None)
    assert signals.should_stop()
    with pytest.raises(Stopped, match="stopped after the training"):
        signals.enter(TESTING)


def test_a_run_on_a_dataset_of_a_program_is_continued_by_a_call():
    signals = StopSignals("out", IN_MEMORY)
    signals.enter(TESTING)
    with pytest.raises(Stopped, match=r"continue with the test by train\(dataset, resume=True, output_dir='out'\)$"):
        signals.handle(signal.SIGTERM, None)


@pytest.mark.slow
def test_a_run_that_is_going_on_or_done_is_not_overwritten_by_chance(tmp_path, monkeypatch, capsys):
    send_after(monkeypatch, 5, signal.SIGINT)
    assert train(*FLAGS, "--output-dir", tmp_path) == 130
    monkeypatch.undo()
    few = ["--demo", "--max-samples", 10, "--epochs", 1, "--output-dir", tmp_path]
    capsys.readouterr()
    assert train(*few) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} holds an interrupted run: continue it with --resume, or delete it with --overwrite.\n"
    )
    assert train("--resume", "--epochs", 5, "--output-dir", tmp_path) == 2
    assert "--epochs 5 (the interrupted run has 8)" in capsys.readouterr().err
    assert train(*few, "--overwrite") == 0
    capsys.readouterr()
    assert not (tmp_path / ".previous_run").exists()
    for more in ([], ["--resume"]):  # though the finished run was started with --overwrite
        assert train(*few, *more) == 2
        assert "holds a finished run" in capsys.readouterr().err
    assert train("--resume", "--output-dir", tmp_path / "nothing") == 2
    assert "holds no run to continue" in capsys.readouterr().err


def test_signals_are_handled_as_before_afterwards_and_left_alone_in_a_thread():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals, found = StopSignals("out"), []

    def listen():
        with signals.listening():
            found.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))

    listen()
    with pytest.raises(KeyError), signals.listening():
        raise KeyError
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [(signals.handle, signals.handle), before]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path, capsys):
    code = train(*FLAGS, "--learning-rate", 1e30, "--max-grad-norm", 0, "--output-dir", tmp_path)
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and TRACEBACK not in err
    assert err.splitlines()[-1].startswith(
        "error: the loss is nan after step 10: try a lower --learning-rate (now 1e+30)"
    )
    assert "--dtype" not in err.splitlines()[-1], "it is float32 already"
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "final_model").exists()


def test_numbers_that_overflow_between_two_looks_at_the_loss_stop_at_the_evaluation(tmp_path, capsys):
    flags = [
        "--demo",
        "--max-samples",
        10,
        "--epochs",
        2,
        "--batch-size",
        10,
        "--learning-rate",
        1e30,
        "--max-grad-norm",
        0,
    ]
    code = train(*flags, "--device", "cpu", "--output-dir", tmp_path)
    err = capsys.readouterr().err
    assert code == 1 and TRACEBACK not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "NaN" in last and "--learning-rate" in last


def fail_after(monkeypatch, step, failure):
    """Let the forward pass of training fail after some steps of two images. failure: an exception, or a loss."""
    original, calls = VLMClassifier.forward, []

    def forward(self, batch, **options):
        calls.append(1)
        if len(calls) <= step:
            return original(self, batch, **options)
        if isinstance(failure, Exception):
            raise failure
        return LossOutput(original(self, batch, **options).loss * failure, torch.tensor(1))

    monkeypatch.setattr(VLMClassifier, "forward", forward)


def test_the_best_model_so_far_is_kept_where_the_loss_becomes_nan(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        fail_after(patched, 15, float("nan"))
        assert train(*FLAGS, "--output-dir", tmp_path) == 1
    err = capsys.readouterr().err
    assert "the loss is nan after step 20" in err and err.endswith(
        "The best model so far (step 10) is in best_model.\n"
    )
    kept = load_file(tmp_path / "best_model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    saved = load_file(tmp_path / "resume_state" / "trained.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values()), "what was saved last is from before"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:120] . DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9 bytes."
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB)"),
]


@pytest.mark.slow
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "mps"])
def test_out_of_memory_ends_with_advice(tmp_path, monkeypatch, capsys, error):
    fail_after(monkeypatch, 3, error)
    code = train(*FLAGS, "--output-dir", tmp_path)
    err = capsys.readouterr().err
    assert code == 1 and TRACEBACK not in err
    last = err.splitlines()[-1]
    assert last.startswith("error: out of memory")
    for flag in (
        "--batch-size",
        "--gradient-accumulation-steps",
        "--eval-batch-size",
        "--tune connector",
        "--dtype bfloat16",
        "--model",
    ):
        assert flag in last


def fill_disk(monkeypatch, *names):
    """No folder or file of these names can be put into its place."""
    original = os.fsync

    def fsync(handle):
        path = os.path.realpath(f"/proc/self/fd/{handle}")
        if any(f"/{name}" in path for name in names):
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="only Linux names the files of handles")
def test_a_run_on_a_full_disk_goes_on_and_says_what_is_missing(tmp_path, monkeypatch, capsys, unbroken):
    with monkeypatch.context() as patched:
        fill_disk(patched, "best_model", "resume_state")
        send_after(patched, 35, signal.SIGINT)
        assert train(*FLAGS, "--output-dir", tmp_path) == 130
    err = capsys.readouterr().err
    assert err.count("could not be saved in") == 1, "one warning, not one at each save"
    assert err.splitlines()[-1] == (
        "stopped after step 35 of 80; the state could not be saved (no space left on device), so make room, and that "
        f"of step 0 is taken; continue with {resume_command(tmp_path)}"
    )
    with monkeypatch.context() as patched:
        fill_disk(patched, "final_model")
        assert train("--resume", "--output-dir", tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: final_model could not be saved in {tmp_path} (no space left on device). Make room, then continue with "
        f"{resume_command(tmp_path)}."
    )
    with monkeypatch.context() as patched:
        fill_disk(patched, ".report.html")
        assert train("--resume", "--output-dir", tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {tmp_path / 'report.html'} could not be written (no space left on device). The training is done: make "
        f"room, then continue with the test by {resume_command(tmp_path)}."
    )
    (tmp_path / "final_model").rename(tmp_path / "final_model_of_this_test")
    assert goes_on_to_the_same_end(tmp_path, unbroken)


def test_another_python_is_told_where_the_packages_are(tmp_path, monkeypatch, capsys):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr(VLMClassifier, "forward", missing)
    assert train(*FLAGS, "--output-dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        f"error: {sys.executable} has no package tqdm. Start with ./run_vlm_training.sh" in error
        and TRACEBACK not in error
    )


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    fail_after(monkeypatch, 3, MemoryError())
    with pytest.raises(MemoryError) as caught:
        train(*FLAGS, "--debug", "--output-dir", tmp_path)
    assert "forward" in [entry.name for entry in caught.traceback]


def test_an_error_that_nobody_thought_of_says_what_was_being_done_and_how_to_see_more(tmp_path, monkeypatch, capsys):
    fail_after(monkeypatch, 3, IndexError("a mistake of the program"))
    assert train(*FLAGS, "--output-dir", tmp_path) == 1
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert re.fullmatch(r"error: while training, \d+/\d+ images \(\d+%\): IndexError: a mistake of the program", first)
    assert second == (
        "       If your flags and files are right, this is a mistake of the program: run it again with --debug, and "
        "report what it prints."
    )

"""A training that ends before its last step: --patience and --time-limit."""

import json
import re
import sys
from math import inf

import pytest
import torch
from commands import ROOT, TRACEBACK, names_in, run, train
from safetensors.torch import load_file
from test_resume import FLAGS, resumed, stop_after

from vlm.common.errors import RunError, Stopped, UsageError
from vlm.config import RESULTS, STATE, in_words, parse_arguments, resolve, rounded_up, seconds_of
from vlm.training import fit_folds, folds, time_needed
from vlm.training.deadline import Deadline
from vlm.training.running import fit
from vlm.training.schedule import learning_rate_at

LEARNS_NOTHING = {"learning_rate": 1e-30, "weight_decay": 0.0}  # so the first evaluation is the best one


def settings(output, **more):
    return resolve(FLAGS | {"output_dir": str(output), "probe": False} | more)


class StepsDone(Deadline):
    """A time limit that is over after so many steps. Its `count` is to be asked after each of them."""

    def __init__(self, steps):
        super().__init__("2h", 0.0, inf)
        self.steps = steps

    def count(self):
        self.steps -= 1
        return False

    @property
    def left(self):
        return inf if self.steps > 0 else 0.001  # of a second: too short for anything


def fit_for(steps, settings):
    """Train with a time limit that is over after so many steps."""
    deadline = StepsDone(steps)
    return fit(settings, deadline.count, deadline=deadline)


class OverDuringFeatures(StepsDone):
    """A time limit that is over when the first features are computed."""

    def check(self):
        """It is not over yet."""

    @property
    def left(self):
        return 0.0


def evaluated_steps(results):
    return [entry["step"] for entry in results["history"] if entry["kind"] == "validation"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5H", 5400), ("1d2h", 93600), (" 2h ", 7200)],
)
def test_a_time_has_units(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["90", "2 hours", "02:00:00", "", "h", "30m1h", "0s", "-1h", "infh"])
def test_an_unclear_time_is_refused(text):
    with pytest.raises(UsageError, match="--time-limit .*: expected .* such as 2h, 90m, 1h30m or 45s"):
        resolve(parse_arguments([f"--time-limit={text}"]))


def test_a_time_is_said_in_a_unit_of_which_there_are_some():
    assert [in_words(seconds) for seconds in (1.24, 100, 150, 9000, 200_000)] == [
        "1.2 s",
        "100 s",
        "2.5 min",
        "2.5 h",
        "2.3 days",
    ]


def test_a_resumed_run_has_no_time_limit_of_an_earlier_command():
    saved = resolve({"time_limit": "2h", "patience": 3}).complete(8, "both")
    again = resolve({"resume": True}, saved)
    assert (again.time_limit, again.patience) == (None, 3)
    assert resolve({"resume": True, "time_limit": "1h", "patience": 5}, saved).patience == 5


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "10s"), (91, "100s"), (180, "180s"), (181, "4m"), (3 * 3600, "180m"), (11000, "4h")]
)
def test_a_suggested_limit_is_long_enough_and_has_a_unit(seconds, text):
    assert rounded_up(seconds) == text and seconds_of(text) >= seconds


@pytest.mark.parametrize("done", ["vlm.training.setup.load_data", "vlm.training.alignment.name_embeddings"])
def test_a_limit_that_is_over_before_the_first_step_ends_the_run_there_and_leaves_nothing(tmp_path, monkeypatch, done):
    deadline = Deadline("2h", 0.0, inf)
    module, name = done.rsplit(".", 1)
    original = getattr(sys.modules[module], name)

    def over_afterwards(*arguments):
        deadline.ends = 0.0
        return original(*arguments)

    monkeypatch.setattr(done, over_afterwards)
    with pytest.raises(RunError, match=r"--time-limit 2h was over after .* before the training could begin"):
        fit(settings(tmp_path / "out", tune="connector", align_connector=True), deadline=deadline)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_a_limit_has_to_leave_time_for_is_measured_on_one_image_if_that_takes_long(tmp_path, monkeypatch):
    """If all parts are measured on all images of the sample, they may take longer than the limit itself."""
    timed = []
    original = time_needed.score_split

    def slow(classifier, split, *arguments):
        timed.append(len(split))
        now[0] += 1.0 * len(split)
        return original(classifier, split, *arguments)

    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(time_needed, "score_split", slow)
    with pytest.raises(RunError, match="leaves no time for a step"):
        fit(settings(tmp_path, time_limit="20s"))
    assert timed == [1, 1]
    timed.clear()
    with pytest.raises(Stopped):
        fit(settings(tmp_path, time_limit="2h"), stop_after(1))
    assert max(timed) > 10


@pytest.mark.slow
def test_patience_ends_a_training_and_a_resumed_one_at_the_same_step(tmp_path, monkeypatch, capsys):
    """5 steps an epoch; the best is that of step 5."""
    more = {"epochs": 6, "patience": 2, **LEARNS_NOTHING}
    results = fit(settings(tmp_path / "unbroken", **more))
    ended = {"by": "patience", "given": 2, "step": 15, "steps": 30}
    assert results["ended_early"] == ended and evaluated_steps(results) == [5, 10, 15]
    rates = {entry["step"]: entry["learning_rate"] for entry in results["history"] if entry["kind"] == "train"}
    assert rates[15] == learning_rate_at(14, 30, 0.05, 1e-30), "the schedule is that of the whole training"
    timings = results["timings"]
    assert timings["train_pictures_per_second"] * timings["train_seconds"] == pytest.approx(3 * 40, rel=0.1)
    words = "ended after step 15 of 30 because of 2 evaluations without a better model (--patience)"
    said = capsys.readouterr()
    assert f"{words}. The best model, of step 5, is tested." in said.err and words in said.out
    assert words in (tmp_path / "unbroken" / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "unbroken" / STATE).exists()

    output = tmp_path / "stopped"
    with pytest.raises(Stopped):
        fit(settings(output, **more), stop_after(12))
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):  # it is killed before the test
        patched.setattr("vlm.training.running.finish", lambda *arguments: 1 / 0)
        fit(resumed(output))
    results = fit(resumed(output))
    assert results["ended_early"] == ended and evaluated_steps(results) == [5, 10, 15]


@pytest.mark.slow
def test_a_time_limit_ends_with_a_tested_model_and_the_next_command_goes_on(tmp_path, capsys):
    """Until the last step, with the weights of a run without a limit."""
    whole = fit(settings(tmp_path / "unbroken"))
    output = tmp_path / "limited"
    results = fit_for(7, settings(output))
    assert results["ended_early"] == {"by": "time_limit", "given": "2h", "step": 7, "steps": 10}
    assert evaluated_steps(results) == [5, 7], "what was learned since the last evaluation is not lost"
    said = capsys.readouterr()
    assert (
        "ended after step 7 of 10 because of --time-limit 2h" in said.out
        and "time limit: evaluation, saving" in said.err
    )
    assert {RESULTS, "report.html", "best_model", "final_model", STATE} <= names_in(output)
    with pytest.raises(UsageError, match="or continue it after its --time-limit with --resume"):
        fit(settings(output))

    def times():
        return {path: path.stat().st_mtime_ns for path in output.iterdir() if path.name[0] != "."}

    before = times()
    with pytest.raises(RunError, match=r"no time for a step: .*; the results of step 7 stay as they are"):
        fit_for(0, resumed(output))
    assert times() == before and (output / RESULTS).is_file(), "the same results are not made again"

    with pytest.raises(Stopped):  # from then on it is an interrupted run
        fit(resumed(output), stop_after(1))
    assert RESULTS not in names_in(output)
    assert train("--resume", "--output-dir", output, "--time-limit", "9h") == 0
    again = json.loads((output / RESULTS).read_text())
    assert "ended_early" not in again and again["test"]["accuracy"] == whole["test"]["accuracy"]
    assert STATE not in names_in(output)
    ours, theirs = (load_file(tmp_path / name / "final_model/model.safetensors") for name in ("limited", "unbroken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_limit_without_time_for_a_step_says_so_and_tests_what_was_learned_before(tmp_path):
    more = r"Give --time-limit \d+[smh] or longer; vision features are kept\."
    with pytest.raises(RunError, match=f"--time-limit 2h leaves no time for a step: .* {more}"):
        fit_for(0, settings(tmp_path))
    assert not names_in(tmp_path), "a run without a step leaves nothing"
    with pytest.raises(Stopped):
        fit(settings(tmp_path), stop_after(3))
    results = fit_for(0, resumed(tmp_path))
    assert results["ended_early"]["step"] == 3 and evaluated_steps(results) == [3]


def test_a_limit_that_ends_while_features_are_computed_keeps_those_so_far(
    tiny_model, color_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))  # no other test has computed the features
    given = {"model": str(tiny_model), "dataset": str(color_folder), "epochs": 1, "output_dir": str(tmp_path / "out")}
    for _ in range(2):
        with pytest.raises(RunError, match="--time-limit 2h is over, .* start the same command again"):
            fit(resolve(given), deadline=OverDuringFeatures(0))
    first, second = re.findall(r"vision features to compute: (\d+) images", capsys.readouterr().err)
    assert int(second) < int(first) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_folds_of_a_cross_validation_share_its_time_evenly(tmp_path, monkeypatch, capsys):
    original, ends = fit, []

    def recorded(settings, stop, enter, dataset, set_up, deadline, brief):
        results = original(settings, stop, enter, dataset, set_up, deadline, brief)
        ends.append(deadline.ends - whole.started)
        return results

    monkeypatch.setattr(folds, "fit", recorded)
    cross = settings(tmp_path, folds=3, epochs=1, time_limit="900000s")
    whole = Deadline.of(cross)
    fit_folds(cross, deadline=whole)
    assert ends == pytest.approx([300_000, 450_000, 900_000], rel=0.01)
    said = capsys.readouterr().err
    assert said.count("One sample as the model sees it") == said.count("learning rate") == 1
    assert re.findall(r"^fold +(\d) of 3$", said, re.M) == ["1", "2", "3"], "what differs from fold to fold is said"


# Only the main process finds that the time is up, after some steps.
TIME_IS_UP = f"""
import os
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_vlm
from vlm.training.ending import Ending
asked = []
original = Ending.time_is_up
def time_is_up(self, *arguments, **options):
    asked.append(original(self, *arguments, **options))
    return os.environ["RANK"] == "0" and len(asked) > 4
Ending.time_is_up = time_is_up
sys.exit(train_vlm.main())
"""


@pytest.mark.slow
def test_several_processes_end_a_training_together(tiny_model, color_folder, tmp_path):
    script, output = tmp_path / "limited.py", tmp_path / "out"
    script.write_text(TIME_IS_UP)
    launch = ["launch_processes.py", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", script]
    flags = ["--model", tiny_model, "--dataset", color_folder, "--epochs", 400, "--batch-size", 2, "--device", "cpu"]
    result = run(*launch, *flags, "--eval-steps", 3, "--time-limit", "1h", "--output-dir", output)
    assert result.returncode == 0 and TRACEBACK not in result.stderr, result.stderr
    ended = json.loads((output / RESULTS).read_text())["ended_early"]
    assert (ended["by"], ended["given"]) == ("time_limit", "1h") and 3 <= ended["step"] <= 9
    assert result.stderr.count("time limit: evaluation, saving and test need about") == 1

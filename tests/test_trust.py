"""What a run says about trust, end to end: every option that acts after the training, in results.json, the model folder
and the page."""

import json

import pytest
import torch
from commands import run as run_script
from commands import train

from inference_vlm import load_model_and_metadata

pytestmark = pytest.mark.slow  # they share runs of many seconds

FLAGS = (
    "--demo",
    "--max-samples",
    60,
    "--epochs",
    2,
    "--objective",
    "both",
    "--label-smoothing",
    0.1,
    "--class-balance",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    trust = ("--calibration", "bias", "--score", "prior", "--target-precision", 0.2, "--zero-shot")
    assert train(*FLAGS, *trust, "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def test_what_was_asked_for_stands_in_the_results(results):
    calibration, abstention = results["test"]["calibration"], results["test"]["abstention"]
    assert calibration["method"] == "bias" and calibration["score"] == "prior" and len(calibration["bias"]) == 10
    assert set(calibration["scores"]) == {"sum", "prior", "head", "both"}
    assert abstention["target_precision"] == 0.2 and abstention["validation"]["accuracy"] >= 0.2
    assert abstention["below"] is not None and 0 <= abstention["test"]["coverage"] <= 1
    assert 0 <= results["zero_shot"]["accuracy"] <= 1
    assert results["validation"]["loss"] == min(
        entry["loss"]
        for entry in results["history"]
        if entry["kind"] == "validation" and entry["accuracy"] == results["validation"]["accuracy"]
    )


def test_the_probe_of_the_demo_is_that_of_the_encoder_before_the_training(results):
    probe = results["probe"]
    assert probe["tower"] == "random weights" and probe["accuracy"][1] <= probe["accuracy"][0] <= probe["accuracy"][2]
    ahead = probe["accuracy"][0] - results["test"]["accuracy"] > 0.02
    assert (probe["warning"] is not None) == ahead


def test_the_model_folder_has_the_same_calibration(run, results):
    classifier, _, metadata = load_model_and_metadata(run / "best_model", device="cpu")
    stored, said = metadata["calibration"], results["test"]["calibration"]
    assert (stored["temperature"], stored["bias"], stored["score"]) == (said["temperature"], said["bias"], "prior")
    assert stored["abstain_below"] == results["test"]["abstention"]["below"] == classifier.calibration.abstain_below
    assert len(stored["prior"]) == 10


def test_the_page_says_it_too(run, results):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert (
        "a bias for each class" in page
        and "Score of a class: prior" in page
        and "Abstaining: below a confidence" in page
    )
    assert "Zero-shot" in page and "Linear probe" in page


def test_training_in_bfloat16_goes_through_to_the_end(tmp_path):
    """Autocast, as on a GPU: the loss falls, and the folder holds the number format."""
    flags = ("--max-samples", 40, "--epochs", 3, "--dtype", "bfloat16", "--output-dir", tmp_path / "out")
    done = run_script("train_vlm.py", "--demo", *flags)  # one process has one number format
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in results["history"] if entry["kind"] == "validation"]
    assert losses[-1] < losses[0] and results["device"]["dtype"] == "bfloat16"
    classifier, _, _ = load_model_and_metadata(tmp_path / "out" / "best_model", device="cpu")
    assert classifier.model.dtype == torch.float32, "inference on a CPU takes float32"
    assert json.loads((tmp_path / "out" / "best_model" / "config.json").read_text())["dtype"] == "bfloat16"

"""An interrupted run that goes on ends with the same weights as an unbroken one, to the last bit."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from vlm.common.errors import Stopped, UsageError
from vlm.config import STATE, read_settings, resolve
from vlm.training.resume_state import read_state
from vlm.training.running import fit

# 40 images in steps of 8: 5 steps an epoch.
FLAGS = {
    "demo": True,
    "max_samples": 40,
    "epochs": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "eval_batch_size": 40,
}


def settings(output, **more):
    return resolve(FLAGS | {"output_dir": str(output)} | more)


def stop_after(step):
    """A `should_stop` that says yes once `step` steps are done."""
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) == step

    return should_stop


def resumed(output):
    saved = read_settings(json.loads((output / "training_metadata.json").read_text())["settings"])
    return resolve({"resume": True, "output_dir": str(output)}, saved)


@pytest.fixture(scope="module", params=["full", "lora"])
def unbroken(request, tmp_path_factory):
    """LoRA has dropout, so that the randomness of a step is tested too."""
    output = tmp_path_factory.mktemp(request.param) / "unbroken"
    more = {"tune": request.param, "learning_rate": 1e-3, "lora_dropout": 0.5}
    results = fit(settings(output, **more))
    return output, more, results


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 8])
def test_final_weights_equal_those_of_an_unbroken_run(unbroken, tmp_path, step):
    """Stopped within the first epoch, at its end, and within the second."""
    output, more, results = unbroken
    with pytest.raises(Stopped, match=f"after step {step} of 10; continue with .* --resume"):
        fit(settings(tmp_path, **more), stop_after(step))
    assert not (tmp_path / "results.json").exists()
    again = fit(resumed(tmp_path))
    for name in ("final_model", "best_model"):
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (tmp_path, output))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{name}: {key}"
    assert again["test"] == results["test"]
    steps = [
        entry["step"]
        for entry in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
        if entry["kind"] == "validation"
    ]
    assert steps == [5, 10]
    assert not (tmp_path / STATE).exists(), "a finished run needs no state"


@pytest.mark.slow
@pytest.mark.parametrize("unbroken", ["lora"], indirect=True)
def test_dropout_is_there_in_the_lora_run(unbroken, tmp_path):
    """Else the test above would not notice a wrong seed."""
    output, more, _ = unbroken
    fit(settings(tmp_path, **more | {"lora_dropout": 0.0}))
    ours, theirs = (load_file(folder / "final_model" / "model.safetensors") for folder in (tmp_path, output))
    assert any(not torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_run_that_was_killed_before_the_first_state_starts_from_the_beginning(unbroken, tmp_path):
    output, more, _ = unbroken
    (tmp_path / "training_metadata.json").write_text((output / "training_metadata.json").read_text())
    assert read_state(tmp_path) is None
    fit(resumed(tmp_path))
    ours, theirs = (load_file(folder / "final_model" / "model.safetensors") for folder in (tmp_path, output))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_a_run_with_other_data_is_refused_and_goes_on_with_its_own(tiny_model, color_folder, tmp_path):
    """Two classes are exchanged, then a class has another name, then an image is replaced."""
    images, output = shutil.copytree(color_folder, tmp_path / "images"), tmp_path / "out"
    cat, fish = images / "cat", images / "catfish"
    given = {"model": str(tiny_model), "dataset": str(images), "epochs": 1, "batch_size": 4, "output_dir": str(output)}
    with pytest.raises(Stopped):
        fit(resolve(given), stop_after(1))
    run_id = json.loads((output / "training_metadata.json").read_text())["run_id"]

    def exchange(one, other):
        one.rename(images / "between")
        other.rename(one)
        (images / "between").rename(other)

    for change, what in (
        (lambda: exchange(cat, fish), "images of train"),
        (lambda: cat.rename(images / "bat") if cat.exists() else (images / "bat").rename(cat), "class names"),
        (lambda: exchange(cat / "0.png", fish / "0.png"), "images of "),
    ):
        change()
        with pytest.raises(UsageError, match=f"the data are not those of the interrupted run: .*{what}"):
            fit(resumed(output))
        change()
    fit(resumed(output))
    assert json.loads((output / "best_model" / "training_metadata.json").read_text())["run_id"] == run_id


@pytest.mark.parametrize(
    ("name", "saved_as"),
    [("processes", "processes"), ("training images", "training images"), ("training images", "training pictures")],
)
def test_a_run_that_would_go_on_elsewhere_is_refused(tmp_path, name, saved_as):
    """A state of an earlier version has the number of images under another name."""
    with pytest.raises(Stopped):
        fit(settings(tmp_path), stop_after(1))
    state = tmp_path / STATE / "state.json"
    values = json.loads(state.read_text())
    values["fingerprint"][saved_as] = values["fingerprint"].pop(name) + 1
    state.write_text(json.dumps(values))
    (tmp_path / STATE / "checksums.json").unlink()
    with pytest.raises(UsageError, match=f"had [0-9]+ {name}, this one has [0-9]+"):
        fit(resumed(tmp_path))


@pytest.mark.slow
def test_a_finished_or_interrupted_run_is_not_overwritten_by_chance(unbroken, tmp_path, monkeypatch):
    output, more, _ = unbroken
    with pytest.raises(UsageError, match="holds a finished run: choose another --output-dir, or --overwrite it"):
        fit(settings(output, **more))
    with pytest.raises(UsageError, match="there is nothing to resume"):
        fit(resumed(output))
    with pytest.raises(Stopped):
        fit(settings(tmp_path, **more), stop_after(1))
    with pytest.raises(UsageError, match="holds an interrupted run: continue it with --resume"):
        fit(settings(tmp_path, **more))
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UsageError, match="pip install mlflow"):
        fit(settings(tmp_path, overwrite=True, track=["mlflow"], **more))
    assert (tmp_path / STATE).is_dir(), "a mistake in the flags deletes nothing"
    with pytest.raises(Stopped, match="after step 1 of"):
        fit(settings(tmp_path, overwrite=True, **more), stop_after(1))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dora", "rslora", "pissa"])
def test_each_variant_of_lora_goes_on_exactly(tmp_path, variant):
    more = {"tune": "lora", "lora_variant": variant, "learning_rate": 1e-3, "epochs": 1}
    fit(settings(tmp_path / "unbroken", **more))
    with pytest.raises(Stopped):
        fit(settings(tmp_path / "resumed", **more), stop_after(2))
    fit(resumed(tmp_path / "resumed"))
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / "final_model" / name) for run in ("unbroken", "resumed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name

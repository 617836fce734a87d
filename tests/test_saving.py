"""vlm/training/saving.py: a full disk does not end a training, and nothing is lost by it."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import names_in
from damage import flip_bit
from safetensors.torch import load_file
from tiny import tiny_classifier

from vlm.common import RunError, resume_command
from vlm.config import PREVIOUS_STATE, STATE, resolve
from vlm.training.resume_state import Belonging, Progress, load_state, read_state
from vlm.training.saving import Saver
from vlm.training.tuning import trained_parameters

STATES = (STATE, PREVIOUS_STATE)
BELONGING = Belonging("abc", {}, {}, {})


@pytest.fixture
def disk(monkeypatch):
    """A disk whose attribute `full` says whether there is room on it."""
    from vlm.common import folders

    disk, sync = SimpleNamespace(full=True), folders.sync

    def sync_if_there_is_room(path):
        if disk.full:
            raise OSError(28, "No space left on device", str(path))
        sync(path)

    monkeypatch.setattr(folders, "sync", sync_if_there_is_room)
    return disk


@pytest.fixture
def run(tiny_model, tmp_path):
    classifier = tiny_classifier(tiny_model)
    learned = trained_parameters(classifier)
    return SimpleNamespace(
        output=tmp_path,
        classifier=classifier,
        learned=learned,
        optimizer=torch.optim.AdamW(learned.values()),
        dtype=torch.float32,
        settings=resolve({"tune": "full"}),
        metadata={"class_names": [], "prompts": {}, "model_revision": None},
        accelerator=SimpleNamespace(is_main_process=True, scaler=None),
    )


def train(run, value):
    """Another value for every weight."""
    with torch.no_grad():
        for parameter in run.learned.values():
            parameter.fill_(value)


def values_of(folder):
    return {value for tensor in load_file(folder / "model.safetensors").values() for value in tensor.unique().tolist()}


def test_the_best_model_is_written_later_with_the_weights_it_had(run, disk, capsys):
    saver = Saver(run)
    train(run, 1.0)
    saver.best_model(run.metadata)
    for step in range(5):
        saver.state(Progress(step=step), BELONGING)
    assert names_in(run.output) == set() and set(saver.missing) == {"best_model", "resume_state"}
    assert capsys.readouterr().err == (
        f"warning: best_model could not be saved in {run.output} (no space left on device). The training goes on and "
        "tries again: make room.\n"
    )
    train(run, 2.0)
    disk.full = False
    saver.state(Progress(step=9), BELONGING)
    assert saver.missing == {} and saver.saved_step == 9
    assert capsys.readouterr().err == "best_model is saved now.\nresume_state is saved now.\n"
    assert values_of(run.output / "best_model") == {1.0}
    state, other = read_state(run.output), {name: torch.zeros_like(p) for name, p in run.learned.items()}
    load_state(state.folder, other, run.optimizer)
    assert all(torch.equal(tensor, torch.full_like(tensor, 2.0)) for tensor in (*other.values(), *run.learned.values()))
    saver.final_model()
    assert values_of(run.output / "final_model") == {2.0}


def test_after_a_damaged_state_the_whole_one_before_is_kept(run, disk):
    disk.full = False
    for step in (1, 2):
        Saver(run).state(Progress(step=step), BELONGING)
    flip_bit(run.output / STATE / "optimizer.safetensors")
    saver = Saver(run)
    saver.resumed_from(read_state(run.output))
    for step, before in ((3, 1), (4, 3)):
        saver.state(Progress(step=step), BELONGING)
        steps = [json.loads((run.output / name / "state.json").read_text())["progress"]["step"] for name in STATES]
        assert steps == [step, before]


def test_a_later_best_model_takes_its_place(run, disk):
    saver = Saver(run)
    for value in (1.0, 2.0):
        train(run, value)
        saver.best_model(run.metadata)
    train(run, 3.0)
    disk.full = False
    saver.final_model()
    assert [values_of(run.output / f"{name}_model") for name in ("best", "final")] == [{2.0}, {3.0}]


def test_at_the_end_it_is_an_error_that_says_what_is_missing(run, disk):
    saver = Saver(run)
    saver.best_model(run.metadata)
    with pytest.raises(RunError) as error:
        saver.final_model()
    assert str(error.value) == (
        f"best_model and final_model could not be saved in {run.output} (no space left on device). Make room, then "
        f"continue with {resume_command(run.output)}."
    )


def test_other_processes_than_the_main_one_write_nothing(run, disk):
    disk.full, run.accelerator.is_main_process = False, False
    saver = Saver(run)
    saver.best_model(run.metadata)
    saver.state(Progress(), BELONGING)
    saver.final_model()
    assert names_in(run.output) == set()

"""vlm/training/resume_state.py: which state a run continues from, and which it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from commands import names_in
from damage import cut_short, delete, empty, flip_bit, make_file, make_folder, nested, no_keys, other_type

from vlm.common import UsageError
from vlm.config import METADATA, PREVIOUS_STATE, STATE, resolve
from vlm.training.resume_state import (
    Belonging,
    Progress,
    check_belonging,
    delete_states,
    load_state,
    read_state,
    save_state,
)

FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")
SETTINGS = json.loads(json.dumps(resolve({"model": "m", "dataset": "d"}).complete(4, "both").to_json()))
NOW = Belonging("abc", SETTINGS, {"class names": "1", "images of train": "2"}, {"processes": 1, "training images": 8})


def save(output, step):
    """Save a state whose weights are all equal to its step."""
    learned = {"weight": torch.full((50, 50), float(step), requires_grad=True)}
    optimizer = torch.optim.AdamW(learned.values())
    learned["weight"].sum().backward()
    with torch.no_grad():
        optimizer.step()
        learned["weight"].fill_(step)
    save_state(output, learned, optimizer, Progress(step=step, best_accuracy=0.5), NOW, None)


def load(state):
    learned = {"weight": torch.zeros(50, 50, requires_grad=True)}
    load_state(state.folder, learned, torch.optim.AdamW(learned.values()))
    return learned["weight"].unique().tolist()


@pytest.fixture
def output(tmp_path):
    (tmp_path / METADATA).write_text(json.dumps({"run_id": "abc", "settings": SETTINGS}))
    for step in (1, 2, 3):
        save(tmp_path, step)
    return tmp_path


def test_the_newest_state_and_the_one_before_are_kept(output):
    assert names_in(output) == {METADATA, STATE, PREVIOUS_STATE}
    state = read_state(output)
    assert state.progress == Progress(step=3, best_accuracy=0.5) and load(state) == [3.0]
    check_belonging(state, output, NOW)
    (output / f"{STATE}.new").mkdir()  # of a save that was killed
    delete_states(output)
    assert names_in(output) == {METADATA} and read_state(output) is None


@pytest.mark.parametrize("damage", [flip_bit, cut_short, empty, delete, make_folder, other_type])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_is_named_and_the_one_before_is_used(output, capsys, name, damage):
    damage(output / STATE / name)
    state = read_state(output)
    assert state.progress.step == 2 and load(state) == [2.0]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{output / STATE / name} is ") and said.endswith(
        f" The state that was saved before it is used: {output / PREVIOUS_STATE}."
    )
    damage(output / PREVIOUS_STATE / name)
    with pytest.raises(UsageError) as error:
        read_state(output)
    message = str(error.value)
    assert message.startswith(f"--resume: {output / STATE / name} is ") and "\n" not in message
    assert "  " not in message
    assert message.endswith("There is no other state to continue from: start again with --overwrite.")


def test_a_state_that_is_a_file(output, capsys):
    make_file(output / STATE)
    assert read_state(output).progress.step == 2
    assert "is not a folder" in capsys.readouterr().err
    save(output, 3)
    assert read_state(output).progress.step == 3


@pytest.mark.parametrize("damage", [cut_short, empty, make_folder, other_type, no_keys, nested])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_state_of_an_earlier_version_is_refused_in_one_line(output, name, damage):
    """It has no checksums, and there is none before it."""
    earlier(output)
    damage(output / STATE / name)
    with pytest.raises(UsageError) as error:
        load(read_state(output))
    assert str(output / STATE / name) in str(error.value) and "--overwrite" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("step", "3"), ("history", {}), ("zero_shot", 3), ("unknown", 1), ("best_loss", None)]
)
def test_a_value_of_another_type_in_the_progress(output, key, value):
    values = earlier(output)
    values["progress"][key] = value
    (output / STATE / "state.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="state.json is damaged: it is not what a run saves"):
        read_state(output)


def test_a_state_of_an_earlier_version_is_taken(output):
    values = earlier(output)
    del values["data"], values["run_id"]
    (output / STATE / "state.json").write_text(json.dumps(values))
    state = read_state(output)
    check_belonging(state, output, NOW)
    assert load(state) == [3.0]


def earlier(output):
    """Make the state look like one of an earlier version; returns the values of its JSON."""
    import shutil

    shutil.rmtree(output / PREVIOUS_STATE)
    (output / STATE / "checksums.json").unlink()
    return json.loads((output / STATE / "state.json").read_text())


def test_a_state_of_other_data_is_refused_with_what_differs(output):
    data = {"class names": "1", "images of train": "other", "labels of train": "new in this version"}
    with pytest.raises(UsageError) as error:
        check_belonging(read_state(output), output, replace(NOW, data=data))
    assert str(error.value) == (
        "--resume: the data are not those of the interrupted run: images of train changed. Bring back the data as they "
        "were, or start again with --overwrite."
    )


def test_a_state_of_another_run_is_refused(output):
    (output / METADATA).write_text(json.dumps({"run_id": "another", "settings": SETTINGS}))
    with pytest.raises(UsageError, match=f"{STATE} belongs to another run than .*{METADATA}"):
        check_belonging(read_state(output), output, NOW)


def test_settings_that_were_changed_in_the_metadata_are_refused(output):
    changed = SETTINGS | {"learning_rate": 0.5, "workers": 2}  # a resumed run may have other workers
    (output / METADATA).write_text(json.dumps({"run_id": "abc", "settings": changed}))
    with pytest.raises(UsageError, match=r"are not those of the saved state: --learning-rate 0.5 instead of 0.0002\. "):
        check_belonging(read_state(output), output, NOW)

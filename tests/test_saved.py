"""vlm/config/saved.py: the metadata of a run that is resumed may be damaged."""

import json

import pytest
from commands import names_in, train
from damage import cut_short, empty, make_folder, nested, no_keys, other_type

from vlm.config import METADATA, resolve
from vlm.config.rules import flag_of

SETTINGS = resolve({"demo": True}).complete(4, "both").to_json()


@pytest.mark.parametrize("damage", [cut_short, empty, make_folder, nested, no_keys, other_type])
def test_damaged_metadata_are_named_with_a_cure(tmp_path, capsys, damage):
    (tmp_path / METADATA).write_text(json.dumps({"settings": SETTINGS}))
    damage(tmp_path / METADATA)
    assert train("--resume", "--output-dir", tmp_path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    if damage is not make_folder:  # then there are no metadata
        assert said.startswith(f"error: {tmp_path / METADATA} ") and said.endswith(" Start again with --overwrite.")
    assert names_in(tmp_path) == {METADATA}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "3"),
        ("epochs", 3.5),
        ("learning_rate", [1]),
        ("demo", "yes"),
        ("track", "wandb"),
        ("model", {}),
        ("batch_size", True),
    ],
)
def test_settings_of_another_type_are_named(tmp_path, capsys, name, value):
    (tmp_path / METADATA).write_text(json.dumps({"settings": SETTINGS | {name: value}}))
    assert train("--resume", "--output-dir", tmp_path) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert (
        said
        == f"error: {METADATA} is damaged: its {flag_of(name)} is {value!r}. Copy its folder again, or train again."
    )


def test_a_copy_of_the_metadata_that_is_there_is_named(tmp_path, capsys):
    (tmp_path / "best_model").mkdir()
    (tmp_path / "best_model" / METADATA).write_text("{}")
    (tmp_path / METADATA).write_text("{")
    assert train("--resume", "--output-dir", tmp_path) == 2
    copy = tmp_path / "best_model" / METADATA
    assert capsys.readouterr().err.endswith(f" Copy {copy} there, or start again with --overwrite.\n")

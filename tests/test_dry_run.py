"""`--dry-run`: what the whole run would be, from its first steps, and nothing left behind."""

import os
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from commands import names_in, train
from test_data import images
from test_output import everything

from vlm.data import Data, Rows, Split
from vlm.families import cache_root
from vlm.training.dry_run import MOST_CLASSES, Seconds, class_rows, evaluations, steps_within
from vlm.training.time_needed import MARGIN, OTHERS


def data_of(classes, each=2):
    labels = [i % classes for i in range(classes * each)]
    part = Split(Rows([None] * len(labels), labels, [""] * len(labels)), range(len(labels)), labels)
    return Data(part, part.take([0]), part.take([]), [f"c{i}" for i in range(classes)], edge=8)


def rows_of(printed):
    """The values of the table by the names of its rows."""
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in printed.splitlines())}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in, and an empty cache of features."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_a_dry_run_of_a_published_kind_of_model_says_everything_and_leaves_nothing(
    elsewhere, tiny_model, color_folder, capsys
):
    flags = ("--model", tiny_model, "--dataset", color_folder, "--epochs", 5, "--eval-steps", 2, "--batch-size", 4)
    assert train(*flags, "--gradient-accumulation-steps", 1, "--time-limit", "9h", "--dry-run") == 0
    said = capsys.readouterr()
    rows = rows_of(said.out)
    assert [line.split()[-3:] for line in said.out.splitlines()[2:5]] == [["8", "2", "2"]] * 3
    assert said.err.count("[[") == 2, "the sentence, and the conversation with its loss tokens"
    assert rows["steps"].startswith("30 of 4 images (6 an epoch), ") and "GiB (estimated)" in rows["memory"]
    assert "for 36 images, less if some are kept already" in rows["vision features"]
    assert "for 15 on validation, calibration and test" in rows["evaluation"], "each second step ends each epoch, too"
    assert rows["time limit"] == "9h: all 30 steps"
    assert rows["the whole run"].startswith("about ")
    assert rows["the whole run"].endswith("(free texts, other images), on a machine as busy as now")
    assert rows["tokens of a response"].count("median") == 1
    assert not os.listdir() and names_in(elsewhere) == {"here"} and not cache_root().exists()


@pytest.mark.slow
def test_views_of_images_are_counted_and_their_features_are_read_in_the_steps(
    elsewhere, tiny_model, color_folder, capsys
):
    flags = (
        "--model",
        tiny_model,
        "--dataset",
        color_folder,
        "--epochs",
        3,
        "--augment",
        "light",
        "--augment-views",
        2,
    )
    assert train(*flags, "--dry-run") == 0
    assert "for 60 images" in rows_of(capsys.readouterr().out)["vision features"], "24 x 2 + 6 + 6"
    assert names_in(elsewhere) == {"here"}


@pytest.mark.slow
def test_a_run_in_the_output_folder_is_not_touched(elsewhere, demo_run, capsys):
    before = everything(demo_run)
    assert train("--demo", "--max-samples", 60, "--dry-run", "--epochs", 0, "--output-dir", demo_run) == 0
    said = capsys.readouterr()
    assert f"without --dry-run, this command stops: {demo_run} holds a finished run" in said.err
    assert "steps" not in rows_of(said.out) and "for 1 on validation" in rows_of(said.out)["evaluation"]
    assert everything(demo_run) == before and names_in(elsewhere) == {"here"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--resume",), "leave out --resume"),
        (("--metrics", "no.py:f"), "no.py"),
        (("--output-dir", "set/out"), "in the folder of --dataset"),
        (("--label-column", "x"), "no columns"),
    ],
)
def test_wrong_usage_is_found_as_in_a_real_run(elsewhere, capsys, flags, said):
    images(elsewhere / "here/set", {"cat": 8, "dog": 8})
    assert train("--dataset", "set", *flags, "--dry-run") == 2
    assert said in capsys.readouterr().err and os.listdir() == ["set"]


def test_several_processes_are_refused(elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("--demo", "--dry-run") == 2
    assert "start it without the launcher" in capsys.readouterr().err


def test_the_table_of_many_classes_has_the_first_and_the_rest():
    few, many = class_rows(data_of(3), {"c1": "one"}), class_rows(data_of(100), {})
    assert few == [("c0", 2, 1, 0), ("c1 (one)", 2, 0, 0), ("c2", 2, 0, 0), ("all", 6, 1, 0)]
    assert len(many) == MOST_CLASSES + 2 and many[-2:] == [("60 more classes", 120, 0, 0), ("all", 200, 1, 0)]
    assert np.array([row[1:] for row in many[:-1]]).sum(0).tolist() == list(many[-1][1:])


@pytest.mark.parametrize(
    ("total", "epoch", "every", "count"), [(20, 5, None, 4), (20, 5, 2, 12), (20, 5, 5, 4), (0, 5, None, 1)]
)
def test_evaluations_are_counted_as_the_training_makes_them(total, epoch, every, count):
    assert evaluations(total, epoch, every) == count


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (9, "no time for a step: give a longer one"),
        (OTHERS + MARGIN * 4 + 10, "about 4 of 10 steps"),
        (1000, "all 10 steps"),
    ],
)
def test_a_time_limit_is_told_in_steps(limit, said):
    """An image takes 1 s, and a step 2 s; 10 steps have 4 evaluations in between."""
    data = SimpleNamespace(validation=[0], test=[0, 0])
    settings = SimpleNamespace(eval_steps=2)
    trainer = SimpleNamespace(run=SimpleNamespace(data=data), settings=settings, total_steps=10, steps_per_epoch=10)
    assert steps_within(trainer, Seconds(None, 2.0, 1.0, 0.0), limit) == said

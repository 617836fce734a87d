"""The notebook runs from its first to its last cell, and is stored as people should see it."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from commands import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

NOTEBOOK = ROOT / "notebooks" / "inference.ipynb"
FUNCTIONS = ("load_model_and_metadata(", "predict_single_image(", "predict_batch(")
BROKEN = "not an image, or damaged, or of an unknown format"


def execute(folder, monkeypatch, **options):
    """The notebook, run in its own folder with this Python, on the model in a folder."""
    monkeypatch.setenv("VLM_MODEL_DIR", str(folder))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # as for a user
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        **options,
    )
    client.execute()
    return notebook


def outputs(notebook, cell_id):
    """The outputs of a cell: the text of all streams, and the images."""
    found = next(cell.outputs for cell in notebook.cells if cell.id == cell_id)
    assert not [output for output in found if output.output_type == "error"]
    text = "".join(output.text for output in found if output.output_type == "stream" and output.name == "stdout")
    data = [output.data["image/png"] for output in found if "data" in output and "image/png" in output.data]
    return text, [Image.open(io.BytesIO(base64.b64decode(item))) for item in data]


def check(notebook):
    """What a reader sees, whatever the model is."""
    classes = outputs(notebook, "load")[0].splitlines()[1].split(":")[1].strip().split(", ")
    assert len(classes) == 10 and classes[0] == "zero"
    names = outputs(notebook, "images")[0].split(": ")[1].strip().split(", ")
    assert len(names) == 12
    found = re.fullmatch(
        r"digit_0\.png: (\w+), confidence ([01]\.\d{4})\n\n(.+)\n", outputs(notebook, "single")[0], flags=re.DOTALL
    )
    assert found[1] in classes and found[3].startswith("Reasoning")
    *lines, last = outputs(notebook, "batch")[0].splitlines()
    assert last.split() == ["broken.png", "error:", *BROKEN.split()]
    assert [line.split()[0] for line in lines] == names
    assert all(line.split()[1] in classes and 0 < float(line.split()[2]) <= 1 for line in lines)
    assert lines[0].split() == ["digit_0.png", found[1], found[2]], "one by one and in a batch are the same"
    for cell_id in ("figure", "bars"):
        text, (image,) = outputs(notebook, cell_id)
        assert text == "" and image.width > 400 and len(image.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.slow
def test_it_runs_on_a_trained_model(demo_run, monkeypatch):
    notebook = execute(demo_run / "best_model", monkeypatch)
    check(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    warnings = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert warnings == []


def test_without_a_model_it_says_how_to_get_one(tmp_path, monkeypatch):
    with pytest.raises(
        CellExecutionError, match=r"nowhere is not there\. Train a model first: \./run_vlm_training\.sh --demo"
    ):
        execute(tmp_path / "nowhere", monkeypatch)


def test_it_is_stored_with_its_outputs_and_without_paths_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run once, from top to bottom"
    for function in FUNCTIONS:
        assert any(function in cell.source for cell in code)
    stored = NOTEBOOK.read_text(encoding="utf-8")
    texts = re.sub(r'"image/png": "[^"]*"', "", stored)
    assert not re.search(r"/(tmp|home|root|Users|work|private|var)/|\\\\Users", texts)
    assert Path.home().as_posix() not in texts or Path.home() == Path("/")
    assert len(stored) < 150_000, "a large file is slow to show"

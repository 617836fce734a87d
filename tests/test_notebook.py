"""The notebooks run from their first to their last cell, and are stored without outputs."""

import base64
import io
import re
import sys
from types import SimpleNamespace

import nbformat
import pytest
from commands import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

FOLDER = ROOT / "notebooks"
NAMES = ("train.ipynb", "inference.ipynb")
BROKEN = "not an image, or damaged, or of an unknown format"


def execute(name, cwd, monkeypatch, **variables):
    """A notebook, run in a folder with this Python. The demo is trained for a shorter time."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # as for a user
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("max_samples=400, epochs=8", "max_samples=40, epochs=1")
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(cwd)}},
    )
    client.execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    red = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert red == [], "a notebook shows stderr as if it were an error"
    return notebook


def repository():
    """What the badge of a notebook calls the repository: a placeholder until it has a public name."""
    return re.search(r"colab.research.google.com/github/([\w.-]+/[\w.-]+)/", (FOLDER / NAMES[0]).read_text())[1]


def cell(notebook, cell_id):
    return next(cell for cell in notebook.cells if cell.id == cell_id)


def outputs(notebook, cell_id):
    """The outputs of a cell: the text of all streams, and the images."""
    found = cell(notebook, cell_id).outputs
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
    *lines, broken, last = outputs(notebook, "batch")[0].splitlines()
    assert broken.split() == ["broken.png", "error:", *BROKEN.split()] and last.startswith("image 13 ")
    assert [line.split()[0] for line in lines] == names
    assert all(line.split()[1] in classes and 0 < float(line.split()[2]) <= 1 for line in lines)
    assert lines[0].split() == ["digit_0.png", found[1], found[2]], "one by one and in a batch are the same"
    for cell_id in ("figure", "bars"):
        text, (image,) = outputs(notebook, cell_id)
        assert text == "" and image.width > 400 and len(image.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.slow
def test_inference_runs_on_a_trained_model_in_a_copy_of_the_repository(demo_run, monkeypatch):
    check(execute("inference.ipynb", FOLDER, monkeypatch, VLM_MODEL_DIR=demo_run / "best_model"))


@pytest.mark.slow
def test_training_runs_on_the_demo_and_on_images_of_ones_own(tmp_path, tiny_model, monkeypatch):
    notebook = execute("train.ipynb", tmp_path, monkeypatch, VLM_MODEL=tiny_model)
    assert re.match(r"accuracy 0\.\d{3}, 95% interval", outputs(notebook, "metrics")[0])
    for cell_id, output in (("result", "notebook"), ("own", "own")):
        html = next(item.data["text/html"] for item in cell(notebook, cell_id).outputs if "data" in item)
        assert f"vlm_results/{output}/report.html" in html and html.count("<img ") == 3
        assert (tmp_path / "vlm_results" / output / "report.html").is_file()
    assert "<table" in cell(notebook, "history").outputs[0].data["text/html"]
    assert outputs(notebook, "figure")[1][0].width > 300
    names = [line.split()[0] for line in outputs(notebook, "predict")[0].splitlines()]
    assert names == ["digit_3.png", "image", "image", "image"]


@pytest.mark.slow
def test_inference_of_a_model_that_is_not_there_says_so_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(CellExecutionError) as caught:
        execute("inference.ipynb", tmp_path, monkeypatch, VLM_MODEL_DIR=tmp_path / "nowhere")
    assert caught.value.traceback.count("\n") < 30 and "nowhere is not a folder: train a model first" in str(
        caught.value
    )
    assert "vlm/inference" not in str(caught.value), "no traceback of the program"


@pytest.mark.parametrize("name", NAMES)
def test_they_are_stored_without_outputs_and_open_in_colab(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert (
        f"(https://colab.research.google.com/github/{repository()}/blob/main/notebooks/{name})"
        in notebook.cells[0].source
    )
    assert f"install --quiet git+https://github.com/{repository()}" in code[0].source


@pytest.mark.parametrize("name", NAMES)
def test_in_colab_the_first_cell_installs_the_program_if_it_is_missing(name, monkeypatch):
    """Run as IPython turns it into Python, with a shell that only notes what it is asked for."""
    asked = []
    shell = SimpleNamespace(run_line_magic=lambda magic, line, **_: asked.append(f"{magic} {line}"))
    setup = nbformat.read(FOLDER / name, as_version=4).cells[1].source.partition("\n\nDEMO")[0]
    code = TransformerManager().transform_cell(setup)
    for missing in (False, True):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, missing=missing: None if missing else "found")
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
        exec(code, {"get_ipython": lambda: shell})
    installed = f"pip install --quiet git+https://github.com/{repository()}"
    assert asked == ["matplotlib inline", "matplotlib inline", installed]

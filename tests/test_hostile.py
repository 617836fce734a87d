"""Names that somebody chose to do harm, of classes, images and results: nothing obeys them, and no result is lost."""

import csv
import json
import os
import unicodedata

import pytest
from commands import TRACEBACK, classify, train
from tiny import random_image

# Without line ends and control characters, which are refused in classes: see below.
CLASSES = [
    "=cmd|' calc'!A0",
    "-rf",
    "<script>alert(1)<script>",
    'it\'s "quoted" & $(id) `id` %s {classes}',
    "🦊👩\u200d🔬",
    "@SUM(1)",
]
FILES = [
    "\x1b[2J\x1b]0;owned\x07.png",
    "line\nerror: all is well\r.png",
    "-rf.png",
    "=1+1.png",
    "<img src=x onerror=alert(1)>.png",
    '\'; drop table "x".png',
    "a..png",
    "caf\u00e9.png",
    "cafe\u0301.png",  # the same in another normal form
    "\u202egnp.png",
    os.fsdecode(b"caf\xe9.png"),  # not UTF-8
    "é" * 125 + "x.png",  # 255 bytes
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of hostile classes with hostile images."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for place, file in enumerate(FILES):
            random_image(100 * number + place).save(folder / name / file, format="PNG")
    return folder


def harmless(text):
    """Whether a text has nothing that a terminal obeys."""
    return not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.slow
def test_hostile_names_are_trained_on_and_classified(hostile, tiny_model, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--model", tiny_model, "--dataset", hostile, "--epochs", 1, "--batch-size", 8, "--device", "cpu"]
    code = train(*flags, "--output-dir", output)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert harmless(out) and harmless(err)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert len(results["test"]["per_class"]) == len(CLASSES)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<script>alert" not in page
    assert not set("\x1b\x07\r\u202e") & set(page)

    for name in ("x.csv", "x.jsonl"):
        code = classify("--model-dir", output / "best_model", "--device", "cpu", "--output", tmp_path / name, hostile)
        assert code == 0 and harmless("".join(capsys.readouterr()))
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + len(CLASSES) * len(FILES)
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    expected = {str(hostile / name / file) for name in CLASSES for file in FILES}
    assert {line["path"] for line in lines} == expected, "exact, to find the files again"

    code = classify("--model-dir", output / "best_model", "--device", "cpu", "--explain", hostile / CLASSES[1])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "") and harmless(out)
    assert len(out.split("\n\n")[0].splitlines()) == 2 + len(FILES), "a name adds no line"


@pytest.mark.parametrize(
    "name", ["a\x1b[2Jb", "a\nerror: all is well", "a\r", os.fsdecode(b"caf\xe9"), "\u202ea", "\u200b"]
)
def test_a_hostile_class_is_named_without_harm(tmp_path, capsys, name):
    for folder in (name, "b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        random_image(0).save(tmp_path / "data" / folder / "a.png")
    code = train("--model", "missing", "--dataset", tmp_path / "data", "--output-dir", tmp_path / "out")
    out, err = capsys.readouterr()
    message = err[err.index("error: ") :]
    assert (code, out) == (2, "") and TRACEBACK not in err
    assert len(message.splitlines()) <= 2 and harmless(err)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("-")])
def test_a_hostile_file_that_is_no_image_is_named_without_harm(demo_run, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"no image")
    code = classify("--model-dir", demo_run / "best_model", "--device", "cpu", name)
    out, err = capsys.readouterr()
    assert (code, len(out.splitlines()), len(err.splitlines())) == (1, 3, 1)
    assert harmless(out) and harmless(err)


@pytest.mark.parametrize(
    "name", ["=1+1.csv", "\x1b[2J.csv", "a\nb.jsonl", os.fsdecode(b"caf\xe9.csv"), "é" * 97 + ".jsonl"]
)
def test_results_may_have_any_name(demo_run, tmp_path, capsys, name):
    image = sorted((demo_run.parent / "vlm_results" / "demo_images").iterdir())[0]
    code = classify("--model-dir", demo_run / "best_model", "--device", "cpu", "--output", tmp_path / name, image)
    out, err = capsys.readouterr()
    assert (code, out) == (0, "") and err.startswith("1 rows in ") and len(err.splitlines()) == 1 and harmless(err)
    assert os.listdir(tmp_path) == [name]

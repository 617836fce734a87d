"""`python inference_vlm.py`: what it prints where, what it writes, how it ends."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, TRACEBACK, classify, command, names_in, surroundings
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three digits, one of them in a folder further down, and files that are no images."""
    folder = tmp_path_factory.mktemp("my images")
    (folder / "more, of them").mkdir()
    for name, digit in zip(("a.png", "b.jpg", "more, of them/ü.png"), load_digits().images, strict=False):
        Image.fromarray((digit * 15).astype(np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_the_table_goes_to_stdout_and_nothing_else(infer, images):
    code, out, err = infer(images)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["image", "prediction", "confidence", "next"]
    names = [str(images / name) for name in ("a.png", "b.jpg", "more, of them/ü.png")]
    assert [line[: len(name)] for line, name in zip(lines[2:], names, strict=True)] == names
    for line in lines[2:]:
        prediction, confidence, second, probability = line.split()[-4:]
        assert prediction != second and 1 >= float(confidence) >= float(probability) >= 0


def test_files_and_folders_are_taken_in_the_order_given(infer, images):
    code, out, _ = infer(images / "b.jpg", images / "more, of them", images / "a.png", "--batch-size", 2)
    assert code == 0
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == [
        str(images / name) for name in ("b.jpg", "more, of them/ü.png", "a.png")
    ]


def test_explain_prints_the_text_of_each_image_below_the_table(infer, images):
    _, plain, _ = infer(images)
    code, out, _ = infer(images, "--explain")
    assert code == 0 and out.startswith(plain)
    assert out.removeprefix(plain).count("\nReasoning: Looking at this image") == 3


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_and_json_lines_hold_the_same(infer, images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("x.csv", "x.jsonl"):
        code, out, err = infer(images, tmp_path / "broken.png", "--explain", "--output", tmp_path / name)
        assert (code, out) == (1, "")
        assert err.splitlines()[0] == f"4 rows in {tmp_path / name}"
        assert "1 of 4 images could not be read, such as " + str(tmp_path / "broken.png") in err.splitlines()[1]
    rows, entries = (
        read_csv(tmp_path / "x.csv"),
        [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()],
    )
    assert [row["path"] for row in rows] == [entry["path"] for entry in entries]
    for row, entry in zip(rows[:3], entries[:3], strict=True):
        assert set(entry) == {"path", "prediction", "confidence", "probabilities", "error_bound", "full_response"}
        assert set(row) == {
            "path",
            "prediction",
            "confidence",
            "error_bound",
            "abstained",
            "error",
            "full_response",
        } | {f"p({name})" for name in entry["probabilities"]}
        assert (row["prediction"], row["full_response"], row["error"]) == (
            entry["prediction"],
            entry["full_response"],
            "",
        )
        assert row["abstained"] == "False"
        assert float(row["confidence"]) == entry["confidence"] == max(entry["probabilities"].values())
        assert {name: float(row[f"p({name})"]) for name in entry["probabilities"]} == entry["probabilities"]
    assert entries[3]["prediction"] is None and entries[3]["error"] == rows[3]["error"] != ""
    assert (rows[3]["prediction"], rows[3]["confidence"], rows[3]["p(zero)"]) == ("", "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"broken.png", "x.csv", "x.jsonl"}, (
        "nothing is left beside them"
    )


def test_a_threshold_of_the_command_line_leaves_predictions_out(infer, images, tmp_path):
    _, plain, _ = infer(images)
    confidences = [float(line.split()[-3]) for line in plain.splitlines()[2:]]
    threshold = sorted(confidences)[1] + 0.001  # keeps one of three
    code, out, _ = infer(images, "--abstain-below", threshold)
    assert code == 0
    for before, after, confidence in zip(plain.splitlines()[2:], out.splitlines()[2:], confidences, strict=True):
        assert ("(abstained)" in after) is (confidence < threshold)
        prediction = before.split()[-4]
        assert (
            confidence >= threshold
            or f"(abstained)  {confidence:.4f}" in after
            and f"{prediction} {confidence:.4f}, " in after
        )
    assert infer(images, "--abstain-below", 0)[1] == plain
    for name in ("x.csv", "x.jsonl"):
        infer(images, "--abstain-below", 1, "--output", tmp_path / name)
    rows, entries = (
        read_csv(tmp_path / "x.csv"),
        [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()],
    )
    assert [(row["prediction"], row["abstained"]) for row in rows] == [("", "True")] * 3
    assert [(entry["prediction"], entry["abstained"]) for entry in entries] == [(None, True)] * 3
    assert all(float(row["confidence"]) == entry["confidence"] > 0 for row, entry in zip(rows, entries, strict=True))


@pytest.fixture
def broken_off(monkeypatch):
    """Lets the model fail or be stopped in its second batch: call it with what happens then."""
    from vlm.inference import classifying

    def arrange(happens):
        def classify(*arguments):
            if next(calls):
                happens()
            return real(*arguments)

        calls = iter([False, True, False])
        monkeypatch.setattr(classifying, "classify", classify)

    real = classifying.classify
    return arrange


def fail():
    raise RuntimeError("CUDA error:\nfifty\nlines")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_computed_before_a_stop_is_kept(infer, images, tmp_path, broken_off, number):
    broken_off(lambda: os.kill(os.getpid(), number))
    code, out, err = infer(images, "--batch-size", 2, "--output", tmp_path / "x.csv")
    assert (code, out) == (130, "") and names_in(tmp_path) == {"x.csv.part", "x.csv.part.json"}
    assert err.startswith(f"stopped after 2 of 3 images. Their rows are in {tmp_path / 'x.csv.part'}. ")
    assert [row["path"] for row in read_csv(tmp_path / "x.csv.part")] == [str(images / "a.png"), str(images / "b.jpg")]
    broken_off(lambda: os.kill(os.getpid(), number))
    code, out, err = infer(images, "--batch-size", 2)
    assert (code, err) == (130, "stopped after 2 of 3 images. Their rows are printed above.\n")
    assert [line.split("  ")[0] for line in out.splitlines()[2:]] == [str(images / "a.png"), str(images / "b.jpg")]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "afterwards the signal does what it did before"


def test_what_was_computed_before_an_error_is_kept(infer, images, tmp_path, broken_off):
    broken_off(fail)
    code, out, err = infer(images, "--batch-size", 2, "--output", tmp_path / "x.jsonl")
    assert (code, out) == (1, "") and len((tmp_path / "x.jsonl.part").read_text().splitlines()) == 2
    kept, error, cure = err.splitlines()
    rows = f"Their rows are in {tmp_path / 'x.jsonl.part'}."
    assert kept.startswith(f"2 of 3 images were classified before the error. {rows} ")
    assert error == "error: while classifying, 2/3 images (67%): RuntimeError: CUDA error:" and "--debug" in cure


def test_a_reader_that_went_away_hears_nothing(infer, images, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        code, _, err = infer(images)
    assert (code, err) == (1, "")


def test_names_that_are_not_utf_8_and_a_terminal_of_ascii_lose_no_row(demo_run, images, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write((images / "a.png").read_bytes())
    program = command("inference_vlm.py", "--model-dir", demo_run / "best_model", "--device", "cpu", "--explain")
    environment = surroundings(PYTHONIOENCODING="ascii", PYTHONUTF8=1)
    done = subprocess.run([*program, name, images / "more, of them"], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode("ascii").splitlines()
    assert "caf\\udce9.png  " in lines[2] and "\\xfc.png  " in lines[3]


def test_a_file_that_is_not_there_leaves_the_others_classified(infer, images, tmp_path):
    code, out, err = infer(images / "a.png", tmp_path / "missing.png", images / "b.jpg")
    plain = infer(images / "a.png", images / "b.jpg")[1].splitlines()[2:]
    first, missing, last = out.splitlines()[2:]
    assert code == 1 and [first.split(), last.split()] == [line.split() for line in plain]
    assert missing.split()[1:3] == ["-", "-"] and missing.endswith("missing.png: no such file or directory")
    assert f"1 of 3 images could not be read, such as {tmp_path / 'missing.png'}; the others are classified." in err


def test_a_table_where_no_image_can_be_read(infer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, out, err = infer(tmp_path)
    assert code == 1 and "not an image" in out.splitlines()[2]
    assert "1 of 1 images could not be read" in err and TRACEBACK not in err
    assert infer(tmp_path, "--output", tmp_path / "x.csv")[0] == 1
    assert read_csv(tmp_path / "x.csv")[0]["error"].endswith("not an image, or damaged, or of an unknown format")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png does not exist"),
        (["empty"], "empty has no image"),
        (
            ["a.png", "--model-dir", "nothing"],
            "nothing is not a folder: train a model first (./run_vlm_training.sh --demo)",
        ),
        (["a.png", "--model-dir", "empty"], "no training_metadata.json in empty or next to it"),
        (["a.png", "--output", "x.xls"], "--output x.xls: expected a name that ends in .csv, .jsonl or .parquet"),
        (["a.png", "--output", "a.png/x.csv"], "a.png/x.csv cannot be written"),
        (["a.png", "--output", ""], "--output .: expected a name that ends in .csv, .jsonl or .parquet"),
        (["a.png", "--output", "x" * 250 + ".csv"], ": expected a name of at most 200 bytes"),
        (["a.png", "--batch-size", str(10**27)], ": expected a whole number of at least 1, and at most"),
        (["a.png", "--model-dir", "x" * 5000], "x: expected a name that is not too long for a file or folder"),
        (["a.png", "--batch-size", "0"], "--batch-size 0: expected a whole number of at least 1"),
        (["a.png", "--dtype", "float16"], "float16 works on CUDA only"),
        (["a.png", "--abstain-below", "50"], "--abstain-below 50.0: expected a probability, 0 to 1."),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(infer, images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Image.open(images / "a.png").save(tmp_path / "a.png")
    code, out, err = infer(*arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ") and message in err
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "empty"}


def test_no_image_at_all_is_wrong_usage(infer):
    code, out, err = infer()
    assert (code, out) == (2, "") and "IMAGE_OR_FOLDER" in err


def test_the_traceback_is_there_with_debug(infer, tmp_path):
    from vlm.common.errors import UsageError

    with pytest.raises(UsageError, match="missing.png"):
        infer(tmp_path / "missing.png", "--debug")


def test_the_default_folder_is_where_training_puts_the_best_model(demo_run, images, monkeypatch, capsys):
    monkeypatch.chdir(demo_run.parent)
    assert demo_run.name == "vlm_results"
    assert classify(images / "a.png", "--device", "cpu") == 0
    assert str(images / "a.png") in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    program = (
        "import sys, inference_vlm\n"
        "try: inference_vlm.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert result.stdout.splitlines()[-1] == "[]" and "--model-dir FOLDER" in result.stdout and result.stderr == ""

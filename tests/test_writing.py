"""Predictions on the way to a file or a table: nothing that was computed is lost."""

import csv
import json
from contextlib import contextmanager

import pytest

from vlm.common import RunError
from vlm.inference import PredictionFile, PredictionTable

NAMES = ["=cmd|'/C calc'!A0", "dog"]
RESULT = {
    "prediction": NAMES[0],
    "confidence": 0.75,
    "probabilities": dict(zip(NAMES, (0.75, 0.25), strict=True)),
    "error_bound": 0.0,
    "full_response": "-1 is the answer",
}
BYTES = "caf\udce9.png"  # a name that is not UTF-8, as Python reads it


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_in_csv_no_text_is_a_formula_and_numbers_stay_numbers(tmp_path):
    with PredictionFile(tmp_path / "x.csv", NAMES) as file:
        file.add("-rf.png", RESULT | {"confidence": -0.5})
        file.add("@x.png", {"prediction": None, "error": "+x"})
    first, second = read_csv(tmp_path / "x.csv")
    assert (first["path"], first["prediction"], first["full_response"]) == (
        "'-rf.png",
        "'" + NAMES[0],
        "'-1 is the answer",
    )
    assert (first["confidence"], first[f"p({NAMES[0]})"]) == ("-0.5", "0.75")
    assert (second["path"], second["error"], second["p(dog)"]) == ("'@x.png", "'+x", "")


@pytest.mark.parametrize("path", ["-rf.png", BYTES, "a\nb\x1b.png", "a\u202eb.png"])
def test_json_lines_are_exact(tmp_path, path):
    with PredictionFile(tmp_path / "x.jsonl", NAMES) as file:
        file.add(path, RESULT)
    assert read_lines(tmp_path / "x.jsonl") == [{"path": path, **RESULT}]


def test_a_name_that_is_not_utf_8_costs_no_row(tmp_path, capsys):
    with PredictionFile(tmp_path / "x.csv", NAMES) as file, PredictionTable(explain=True) as table:
        for path in ("a.png", BYTES, "b.png"):
            file.add(path, RESULT)
            table.add(path, RESULT)
    assert [row["path"] for row in read_csv(tmp_path / "x.csv")] == ["a.png", r"caf\udce9.png", "b.png"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:5]] == [
        "a.png",
        r"caf\udce9.png",
        "b.png",
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rows_are_kept_if_the_work_ends_early(tmp_path, name, error):
    (tmp_path / name).write_text("of an earlier run")
    for part in (f"{name}.part", f"{name}.part2"):  # the second does not take the place of the first
        with pytest.raises(error), PredictionFile(tmp_path / name, NAMES) as file:
            file.add("a.png", RESULT)
            assert "a.png" in (tmp_path / part).read_text(), "each row is there when it is added"
            raise error
        assert file.kept() == f"Their rows are in {tmp_path / part}." and file.rows == 1
    assert (tmp_path / name).read_text() == "of an earlier run"
    assert names_in(tmp_path) == {name, f"{name}.part", f"{name}.part2"}


def test_without_rows_nothing_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), PredictionFile(tmp_path / "x.csv", NAMES) as file:
        raise KeyboardInterrupt
    assert names_in(tmp_path) == set() and file.kept() == ""


@contextmanager
def room_for(size):
    """Files cannot grow above so many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_rows(tmp_path):
    message = r"cannot be written \(file too large\): make room"
    with pytest.raises(RunError, match=message), PredictionFile(tmp_path / "x.jsonl", NAMES) as file:
        file.add("a.png", RESULT)
        with room_for((tmp_path / "x.jsonl.part").stat().st_size + 10):
            file.add("b.png", RESULT)
    assert [row["path"] for row in read_lines(tmp_path / "x.jsonl.part")] == ["a.png"] and file.rows == 1


def test_the_table_shows_the_rows_so_far(capsys):
    with pytest.raises(KeyboardInterrupt), PredictionTable(explain=False) as table:
        table.add("a.png", RESULT)
        raise KeyboardInterrupt
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "a.png"
    assert table.kept() == "Their rows are printed above."


def test_names_and_texts_cannot_write_to_the_terminal(capsys):
    with PredictionTable(explain=True) as table:
        table.add("a\x1b[2J\nb.png", RESULT | {"full_response": "one\ntwo\x1b[31m\r\u202e"})
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3 + 1 + 1 + 2 and not set("\x1b\r\u202e") & set(out)

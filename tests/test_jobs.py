"""Predictions of many images: stopped anywhere and gone on with, and shared among processes."""

import fcntl
import json
import os
import re
import shutil

import numpy as np
import pytest
from commands import classify, names_in, run
from PIL import Image
from sklearn.datasets import load_digits

from vlm.common import RunError, Stopped, UsageError, brief
from vlm.config import METADATA
from vlm.inference import Item, Options, PredictionFile, classify_items, load_model_and_metadata, update_metadata
from vlm.inference.job import check_all_read
from vlm.inference.records import Tally, merge, read_begun, read_records
from vlm.machine import Team

FORMATS = ("csv", "jsonl", "parquet")
COUNT = 9  # the last one is no image


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, digit in enumerate(load_digits().images[: COUNT - 1]):
        Image.fromarray((digit * 15).astype(np.uint8)).save(folder / f"{i}.png")
    (folder / "8.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def infer(demo_run, capsys):
    """Runs the command line on the demo's model, two images at a time; returns the exit code and stderr."""

    def call(*arguments, model=demo_run / "best_model"):
        capsys.readouterr()
        flags = ("--model-dir", model, "--device", "cpu", "--batch-size", 2)
        return classify(*flags, *arguments), capsys.readouterr().err

    return call


@pytest.fixture
def unbroken(infer, images, tmp_path_factory):
    """The bytes of the file that is written without a break, by its ending."""
    folder = tmp_path_factory.mktemp("unbroken")

    def of(ending):
        assert infer(images, "--output", folder / f"x.{ending}")[0] == 1
        return (folder / f"x.{ending}").read_bytes()

    return of


@pytest.fixture
def begin(infer, images, monkeypatch):
    """Leaves what a job leaves that is killed in the middle of its fifth row; returns the file with the rows."""
    from vlm.inference import job

    def leave(output, *flags):
        def stop_after_five(*arguments):
            yield from list(real(*arguments))[:5]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(job, "classify_items", stop_after_five)
            code, err = infer(images, "--output", output, *flags)
        assert code == 130
        part = next(output.parent.glob(f"{output.name}*.part"))
        assert err.splitlines()[-1] == (  # on a busy machine the progress stands before it
            f"stopped after 5 of {COUNT} images. Their rows are in {part}. The same command with --resume goes on."
        )
        part.write_bytes(part.read_bytes()[:-20])
        return part

    real = job.classify_items
    return leave


@pytest.mark.parametrize("ending", FORMATS)
def test_a_killed_job_goes_on_without_a_row_twice_or_lost(infer, images, unbroken, begin, tmp_path, ending):
    begin(tmp_path / f"x.{ending}")
    code, err = infer(images, "--output", tmp_path / f"x.{ending}", "--resume")
    assert code == 1 and f"{COUNT} rows in {tmp_path / f'x.{ending}'}" in err.splitlines()
    assert f"1 of {COUNT} images could not be read, such as {images / '8.png'}; the others" in err
    assert (tmp_path / f"x.{ending}").read_bytes() == unbroken(ending)
    assert names_in(tmp_path) == {f"x.{ending}"}


def test_a_stop_while_the_file_is_put_together_loses_nothing(infer, images, unbroken, tmp_path, monkeypatch):
    from vlm.inference import job

    def stop(*_):
        raise KeyboardInterrupt

    arguments = (images, "--output", tmp_path / "x.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_parquet", stop)
        code, err = infer(*arguments)
    assert code == 130 and err.splitlines()[-1].startswith("stopped after the last image. The same")
    assert names_in(tmp_path) == {"x.parquet.1of1.jsonl", "x.parquet.1of1.jsonl.part.json"}
    assert infer(*arguments, "--resume")[0] == 1
    assert (tmp_path / "x.parquet").read_bytes() == unbroken("parquet") and names_in(tmp_path) == {"x.parquet"}


def test_images_of_an_earlier_command_that_could_not_be_read_count_too(infer, images, tmp_path):
    arguments = (images / "8.png", images / "0.png", "--output", tmp_path / "x.jsonl")
    infer(*arguments)
    rows = (tmp_path / "x.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.jsonl.part").write_text(rows[0])
    code, err = infer(*arguments, "--resume")
    assert code == 2 and "x.jsonl.part: x.jsonl.part.json, which says what made its rows, is not there. Start" in err
    begun = read_begun(tmp_path / "x.jsonl.part", b"", [str(images / "8.png")])
    assert (begun.tally.rows, begun.tally.failed, begun.tally.first) == (1, 1, str(images / "8.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--explain"], r"part was begun with --explain False, and now it is True\. Give the same, or start again"),
        (["--exhaustive-scoring"], r"part was begun with --exhaustive-scoring False, and now it is True\."),
        (["--abstain-below", "0.9"], r"part was begun with --abstain-below None, and now it is 0\.9\."),
        (["--dtype", "bfloat16"], r"part was begun with --dtype float32, and now it is bfloat16\."),
    ],
)
def test_other_flags_are_refused(infer, images, begin, tmp_path, flags, message):
    part = begin(tmp_path / "x.csv")
    before = part.read_bytes()
    code, err = infer(images, "--output", tmp_path / "x.csv", "--resume", *flags)
    assert code == 2 and re.search(message, err) and part.read_bytes() == before


def test_another_model_is_refused(infer, images, begin, demo_run, tmp_path):
    begin(tmp_path / "x.csv")
    shutil.copytree(demo_run / "best_model", tmp_path / "other")
    metadata = json.loads((tmp_path / "other" / METADATA).read_text())
    update_metadata(tmp_path / "other", metadata | {"trained": "again"})
    code, err = infer(images, "--output", tmp_path / "x.csv", "--resume", model=tmp_path / "other")
    assert code == 2 and err.endswith(
        "x.csv.part was begun by another model. Give the same, or start again without --resume.\n"
    )


def test_other_images_are_refused(infer, images, begin, tmp_path):
    begin(tmp_path / "x.jsonl")
    flags = ("--output", tmp_path / "x.jsonl", "--resume")
    code, err = infer(images / "0.png", images / "2.png", images / "1.png", *flags)
    assert code == 2 and err == (
        f"error: {tmp_path / 'x.jsonl.part'}: row 2 is that of {images / '1.png'}, but now image 2 is "
        f"{images / '2.png'}. Give the same images in the same order, or start again without --resume.\n"
    ).replace(str(images / "1.png"), brief(images / "1.png")).replace(str(images / "2.png"), brief(images / "2.png"))
    code, err = infer(images / "0.png", images / "1.png", *flags)
    assert code == 2 and "but now there are only so many images." in err


def test_what_is_complete_or_not_begun_is_said(infer, images, tmp_path):
    arguments = (images / "0.png", "--output", tmp_path / "x.csv", "--resume")
    code, err = infer(*arguments)
    assert code == 0 and f"there is nothing of {brief(tmp_path / 'x.csv')} yet, so it starts with the first" in err
    code, err = infer(*arguments)
    assert (code, err) == (
        2,
        f"error: --resume: {tmp_path / 'x.csv'} is complete. Leave out --resume to compute it again.\n",
    )
    code, err = infer(images / "0.png", images / "1.png", "--output", tmp_path / "x.csv", "--resume")
    assert code == 2 and "x.csv is the complete file of other images than these 2. Give another --output" in err
    code, err = infer(images / "0.png", "--resume")
    assert code == 2 and "--resume: name the file of the predictions with --output" in err


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_complete_file_is_that_of_the_same_images_or_of_others(infer, images, tmp_path, ending):
    output = ("--output", tmp_path / f"x.{ending}", "--resume")
    assert infer(images / "0.png", images / "1.png", *output)[0] == 0
    before = (tmp_path / f"x.{ending}").read_bytes()
    assert "is complete. Leave out" in infer(images / "0.png", images / "1.png", *output)[1]
    for others in (["0.png", "1.png", "2.png"], ["0.png"], ["1.png", "0.png"]):
        code, err = infer(*(images / name for name in others), *output)
        assert code == 2 and f"of other images than these {len(others)}" in err
    assert (tmp_path / f"x.{ending}").read_bytes() == before and names_in(tmp_path) == {f"x.{ending}"}


def test_the_progress_of_a_process_says_that_it_is_a_share(demo_run, images, tmp_path, monkeypatch):
    from vlm.inference import Files, Job, classifying, run_job

    shown = []

    class Bar(classifying.Bar):
        def __init__(self, total, description, **more):
            shown.append((total, description))
            super().__init__(total, description, **more)

    monkeypatch.setattr(classifying, "Bar", Bar)
    team = Team()
    monkeypatch.setattr(team, "size", 2)
    monkeypatch.setattr(team, "done", lambda: (_ for _ in ()).throw(KeyboardInterrupt))  # the other one is not there
    model, _, metadata = load_model_and_metadata(demo_run / "best_model", device="cpu")
    job = Job(tmp_path / "x.csv", model.class_names, False, team)
    with pytest.raises(Stopped):
        run_job(model, metadata, Files([str(images / f"{i}.png") for i in range(4)]), Options(2), job)
    assert shown == [(2, "classifying (process 1 of 2, its share)")]


def test_without_resume_the_rows_of_an_earlier_job_stay(infer, images, begin, tmp_path):
    part = begin(tmp_path / "x.csv")
    before = part.read_bytes()
    code, err = infer(images, "--output", tmp_path / "x.csv")
    assert code == 1 and f"note: {part} has rows of a job that did not end; --resume would go on with it." in err
    assert part.read_bytes() == before and names_in(tmp_path) == {"x.csv", "x.csv.part", "x.csv.part.json"}
    part = begin(tmp_path / "x.parquet")
    code, err = infer(images, "--output", tmp_path / "x.parquet")
    assert code == 2 and f"{part} has rows of a job that did not end. Add --resume to go on, or delete it" in err


def test_another_number_of_processes_is_refused(infer, images, tmp_path):
    (tmp_path / "x.csv.1of2.csv.part").touch()
    code, err = infer(images, "--output", tmp_path / "x.csv", "--resume")
    assert code == 2 and "is of a job that did not end, by 2 processes, and now there is 1. Start it with" in err
    assert f"VLM_PROCESSES=2 and --resume, or delete the files {'x.csv'}.*of2.*" in err


def test_parquet_is_read_with_one_call_and_has_the_columns_of_csv(infer, images, tmp_path):
    import datasets
    import pandas as pd

    for ending in FORMATS:
        infer(images, "--explain", "--output", tmp_path / f"x.{ending}")
    table, rows = pd.read_parquet(tmp_path / "x.parquet"), pd.read_csv(tmp_path / "x.csv")
    assert list(table.columns) == list(rows.columns) and len(table) == COUNT
    numbers = [name for name in rows.columns if name.startswith("p(")] + ["confidence", "error_bound"]
    np.testing.assert_array_equal(table[numbers], rows[numbers])
    assert table.path.tolist() == rows.path.tolist() and table.abstained.tolist() == [False] * COUNT
    assert table.prediction.isna().tolist() == [False] * (COUNT - 1) + [True] and table.error[COUNT - 1]
    read = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert read["path"] == rows.path.tolist() and "Looking at this image" in read["full_response"][0]


def test_names_that_are_not_utf_8_are_the_same_text_in_parquet_and_csv(demo_run, images, tmp_path):
    import pandas as pd

    folder = tmp_path / "images"
    for name in (b"tw\xe9", b"zero"):
        (folder / os.fsdecode(name)).mkdir(parents=True)
        shutil.copy(images / "8.png", folder / os.fsdecode(name) / os.fsdecode(b"broken\xe9.png"))
        shutil.copy(images / "1.png", folder / os.fsdecode(name))
    arguments = ("--model-dir", demo_run / "best_model", "--dataset", folder, "--report-dir", tmp_path / "report")
    for ending in ("csv", "parquet"):
        assert classify(*arguments, "--device", "cpu", "--output", tmp_path / f"x.{ending}") == 1
    table, rows = pd.read_parquet(tmp_path / "x.parquet"), pd.read_csv(tmp_path / "x.csv")
    for name in ("path", "error", "label"):
        assert table[name].fillna("").tolist() == rows[name].fillna("").tolist(), name
    assert "tw\\udce9" in set(table["label"])
    results = json.loads((tmp_path / "report" / "results.json").read_text("utf-8"))
    assert results["unknown_classes"]["classes"] == {"tw\udce9": 1}


def test_only_the_first_of_several_processes_says_that_images_could_not_be_read(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    check_all_read(Tally(2, 1, "x.png"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        RunError, match=r"^1 of 2 images could not be read, such as x\.png; the others are classified\.$"
    ):
        check_all_read(Tally(2, 1, "x.png"))


def test_a_pipe_is_no_file_to_write(infer, images, tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    code, err = infer(images, "--output", tmp_path / "x.csv")
    assert code == 2 and err == f"error: --output {tmp_path / 'x.csv'} is no file: choose another name.\n"


@pytest.mark.parametrize("name", ["x.parquet.1of1.jsonl.part", "x.parquet.1of1.jsonl"])
def test_a_job_that_another_process_still_writes_is_not_to_be_deleted(infer, images, begin, tmp_path, name):
    begin(tmp_path / "x.parquet").rename(tmp_path / name)
    with (tmp_path / name).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for more in ([], ["--resume"]):
            code, err = infer(images, "--output", tmp_path / "x.parquet", *more)
            assert code == 2 and err.endswith(
                f"error: {tmp_path / name} is being written by another process: wait until it ends.\n"
            )
    assert (tmp_path / name).exists()


def test_a_parquet_file_of_something_else_is_not_replaced(infer, images, tmp_path):
    import pandas as pd

    pd.DataFrame({"mine": [1]}).to_parquet(tmp_path / "x.parquet")
    code, err = infer(images, "--output", tmp_path / "x.parquet")
    assert code == 2 and "exists and holds no predictions: it would be lost" in err


@pytest.mark.slow
def test_two_processes_make_one_file_in_the_order_of_the_images(demo_run, images, infer, tmp_path):
    import pandas as pd

    flags = ("--model-dir", demo_run / "best_model", "--device", "cpu", "--batch-size", 2)
    program = ("run_vlm_inference.sh", *flags, "--output")
    shutil.copytree(images, tmp_path / "images")
    images = tmp_path / "images"
    (images / "1.png").write_bytes(b"no image")  # is the second process's
    result = run(*program, tmp_path / "x.parquet", images, VLM_PROCESSES=2)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.splitlines()[-2:] == [
        f"{COUNT} rows in {tmp_path / 'x.parquet'}",
        f"error: 2 of {COUNT} images could not be read, such as {images / '1.png'}; the others are classified.",
    ]
    assert infer(images, "--output", tmp_path / "one.parquet")[0] == 1
    found, expected = (pd.read_parquet(tmp_path / f"{name}.parquet") for name in ("x", "one"))
    numbers = [name for name in found.columns if name.startswith("p(")]
    np.testing.assert_allclose(found[numbers], expected[numbers], atol=1e-4)
    assert found.path.tolist() == expected.path.tolist()
    assert names_in(tmp_path) == {"x.parquet", "one.parquet", "images"}
    result = run(*program, tmp_path / "x.parquet", images, "--resume", VLM_PROCESSES=2)
    assert result.returncode == 2 and result.stderr.endswith("Leave out --resume to compute it again.\n")
    assert result.stderr.count("error: ") == 1


def test_several_processes_need_a_file(infer, images, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, err = infer(images)
    assert code == 2 and err.startswith("error: 2 processes: name the file of the predictions with --output")


# Rows that are read back

NAMES = ["=cmd", "cat, dog", 'a "quote"']
ROWS = [
    ("=a.png", {"prediction": "=cmd", "confidence": 0.5, "full_response": 'Reasoning: a\r\n"b",\nAnswer: =cmd'}),
    ("caf\udce9 ü\u2028.png", {"prediction": None, "error": 'a "b", c\n'}),
    ("c,d.png", {"prediction": "cat, dog", "probabilities": dict.fromkeys(NAMES, 1 / 3), "full_response": ""}),
]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_that_is_cut_off_anywhere_has_all_rows_before(tmp_path, ending):
    ends = []
    with PredictionFile(tmp_path / f"x.{ending}", NAMES) as file:
        for name, result in ROWS:
            ends.append(file.part.stat().st_size)
            file.add(name, result)
    content, names = (tmp_path / f"x.{ending}").read_bytes(), [name for name, _ in ROWS]
    ends.append(len(content))
    for size in range(len(content) + 1):
        (tmp_path / "cut").write_bytes(content[:size])
        begun = read_begun(tmp_path / "cut", file.header, names)
        whole = max((i for i, end in enumerate(ends) if end <= size), default=0)
        assert begun.tally.rows == whole and begun.tally.failed == (whole > 1)
        assert begun.size == (ends[whole] if size >= ends[0] else 0)
    records = list(read_records(tmp_path / f"x.{ending}", file.header))
    assert b"".join(record.raw for record in records) == content[len(file.header) :]
    assert [record.values["path"] for record in records] == [record.name for record in records]


def test_damage_in_the_middle_is_no_end(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"path": "a"}\n{"path": \n{"path": "b"}\n')
    with pytest.raises(UsageError, match=r"x\.jsonl: line 2 is damaged\. Start again without --resume"):
        list(read_records(tmp_path / "x.jsonl", b""))
    with pytest.raises(UsageError, match="other columns than this command writes"):
        list(read_records(tmp_path / "x.jsonl", b"path,prediction\r\n"))
    (tmp_path / "x.csv").write_bytes(b"path,error\r\na,\r\nb\r\nc,\r\n")
    with pytest.raises(UsageError, match="the row of b is damaged"):
        list(read_records(tmp_path / "x.csv", b"path,error\r\n"))


def test_shares_are_put_together_in_turn_and_changes_are_noticed(tmp_path):
    names = [f"{i}.png" for i in range(7)]
    shares = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for number, share in enumerate(shares):
        with PredictionFile(share, NAMES) as file:
            for name in names[number::3]:
                file.add(name, {"prediction": None})
    assert [record.name for record in merge(shares, b"", names)] == names
    with pytest.raises(UsageError, match="has no row of 7.png: the images have changed"):
        list(merge(shares, b"", [*names, "7.png"]))
    with pytest.raises(UsageError, match="row 2 is that of 1.png, but now image 2 is new.png"):
        list(merge(shares, b"", ["0.png", "new.png"]))


def test_two_commands_do_not_write_the_same_file(tmp_path):
    with PredictionFile(tmp_path / "x.csv", NAMES) as file:
        file.add("a.png", ROWS[2][1])
        begun = read_begun(file.part, file.header, ["a.png"])
        with (
            pytest.raises(UsageError, match=r"x\.csv\.part is being written by another process"),
            PredictionFile(tmp_path / "x.csv", NAMES, begun=begun),
        ):
            pass
    assert len(list(read_records(tmp_path / "x.csv", file.header))) == 1


# Items


def test_items_are_taken_when_it_is_their_turn_and_names_may_repeat(demo_run):
    model, _, metadata = load_model_and_metadata(demo_run / "best_model", device="cpu")
    digits = [Image.fromarray((digit * 15).astype(np.uint8)).convert("RGB") for digit in load_digits().images[:3]]
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield Item("same name", lambda i=i: digits[i % 3], {"label": i}, exact=i % 3)

    outcomes = classify_items(model, metadata, items(), Options(batch_size=2, explain=False, show_progress=False))
    first = [next(outcomes) for _ in range(4)]
    outcomes.close()
    assert len(taken) < 12 and [outcome.item.more["label"] for outcome in first] == [0, 1, 2, 3]
    for outcome in first:
        assert outcome.scores.shape == (10,) and "probabilities" in outcome.result
    np.testing.assert_allclose(first[0].scores, first[3].scores, atol=1e-4)


class Store:
    def __init__(self):
        self.words = set()

    def set(self, word, _):
        self.words.add(word)

    def check(self, words):
        return self.words.issuperset(words)


def test_processes_share_all_items_and_the_first_one_waits(monkeypatch):
    from vlm.machine import team as module

    store, found, order = Store(), [], []
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(store, 0, 3)]))
    monkeypatch.setattr(module.time, "sleep", lambda _: store.set("done 2", ""))  # it ends while the first one waits
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "3")
        team = Team()
        found.append(list(team.share(range(10))))
        assert len(found[-1]) == team.count(10)
        assert team.named == f" (process {number + 1} of 3, its share)"
        team.after_first(lambda number=number: order.append(number))
        if number == 1:
            team.done()
    assert sorted(sum(found, [])) == list(range(10)) and order == [0]
    monkeypatch.setenv("RANK", "0")
    Team().done()
    assert store.words == {"checked", "done 0", "done 1", "done 2"}


def test_a_failed_check_of_the_first_process_is_its_error(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fail():
        raise RunError("no room")

    with pytest.raises(RunError, match="no room"):
        Team().after_first(fail)

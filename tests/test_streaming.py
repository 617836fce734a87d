"""Training on a stream: its order, what it leaves out, and that a resumed run goes on at the same place."""

import io
import json
import tarfile
from itertools import islice

import datasets
import pytest
import torch
from commands import ROOT, TRACEBACK, run, train
from PIL import Image
from safetensors.torch import load_file
from test_ending import fit_for
from tiny import random_image

from vlm.common import Stopped, UsageError
from vlm.config import METADATA, RESULTS, read_settings, resolve
from vlm.data import Place, Stream, load_data
from vlm.data.stream import Row
from vlm.training.running import fit

NAMES = ["cat", "dog", "owl"]
BEGIN = Place()


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def colored(label, i):
    """An image that tells its class by its color."""
    color = [i % 100, i // 100 % 100, 40]
    color[label] = 200 + i % 40
    return Image.new("RGB", (20, 14), tuple(color))


def write_shards(folder, split, count, shards, first=0):
    """WebDataset shards NAME-00000.tar with a .png and a .cls for each image, classes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{split}-{shard:05}.tar", "w") as tar:
            for i in range(shard, count, shards):
                label = (first + i) % len(NAMES)
                image = random_image(1000 * first + i, 20, 14) if i % 2 else colored(label, first + i)
                for ending, content in (("png", png(image)), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{first + i:06}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", 60, 4)
    write_shards(folder, "validation", 12, 1, first=1000)
    write_shards(folder, "test", 12, 1, first=2000)
    return folder


def settings(folder, output="out", **more):
    given = {"model": "m", "dataset": str(folder), "output_dir": str(output), "streaming": True, "max_steps": 6}
    given |= {"class_names": NAMES, "batch_size": 2, "gradient_accumulation_steps": 2, "shuffle_buffer": 8}
    return resolve(given | {"device": "cpu", "max_samples": 9} | more)


def names_read(stream, count, place=BEGIN, *processes):
    return [(row.name, row.label, hash(row.image)) for row, _ in islice(stream.read(place, *processes), count)]


def test_the_splits_are_kept_and_train_is_a_sample(shards):
    data = load_data(settings(shards))
    assert data.class_names == NAMES and data.stream is not None
    assert (len(data.validation), len(data.test)) == (9, 9)
    rows = dict(data.summary)
    assert rows["dataset"].endswith("(folder, streamed)")
    assert rows["train"].endswith("images (a sample of train, which is streamed)")


def test_an_epoch_has_every_row_once_and_each_has_another_order(shards):
    stream = load_data(settings(shards)).stream
    first, second = names_read(stream, 60), names_read(stream, 60, Place(1, 0))
    images = [image for _, _, image in first]
    assert len(set(images)) == 60 and set(images) == {image for _, _, image in second}
    assert images != [image for _, _, image in second]
    assert names_read(stream, 90)[60:] == second[:30]


def test_reading_goes_on_at_any_place(shards):
    stream = load_data(settings(shards)).stream
    whole = list(islice(stream.read(Place()), 75))
    for done in (1, 17, 59, 60, 61):
        _, place = whole[done - 1]
        assert [row for row, _ in islice(stream.read(place), 5)] == [row for row, _ in whole[done : done + 5]]


def test_processes_share_the_rows(shards):
    stream = load_data(settings(shards)).stream
    parts = [names_read(stream, 30, Place(), process, 2) for process in range(2)]
    images = [image for part in parts for _, _, image in part]
    assert len(set(images)) == 60


def test_missing_splits_are_the_first_of_train_and_are_left_out_of_the_training(tmp_path):
    write_shards(tmp_path / "d", "train", 60, 2)
    data = load_data(settings(tmp_path / "d", max_samples=6))
    assert dict(data.summary)["validation"] == "6 images (the first of train)"
    stream, kept = data.stream, []
    for row, _ in islice(stream.read(Place()), 60):
        kept += filter(None, [stream.sample(row)])
    held_out = {split[i].key for split in (data.validation, data.test) for i in range(6)}
    assert len(kept) == 48 and not held_out & {sample.key for sample in kept}
    assert stream.left_out == {"in validation or test, too": 12}
    assert not {data.train[i].key for i in range(len(data.train))} & held_out


def a_stream(rows):
    return Stream(lambda epoch, start, process, processes: iter(rows[start:]), {0: 0, 1: 1, "cat": 0})


def test_rows_without_a_label_or_an_image_are_left_out_counted_and_noted(capsys):
    good = png(colored(0, 0))
    rows = [
        Row(good, 0, None, "a"),
        Row(b"no image", 1, None, "b"),
        Row(good, None, None, "c"),
        Row(good, -1, None, "d"),
    ]
    stream = a_stream([*rows, Row(None, 1, None, "e"), Row(good, " cat ", "a text", "f")])
    samples = [stream.sample(row) for row, _ in islice(stream.read(Place()), 6)]
    assert [sample and (sample.name, sample.label, sample.reasoning) for sample in samples] == [
        *(("a", 0, None), None, None, None, None),
        ("f", 0, "a text"),
    ]
    assert stream.left_out == {"unreadable": 2, "without a label": 2}
    assert "left out of the training, unreadable: b: " in capsys.readouterr().err


def test_a_label_that_is_no_class_is_left_out_and_counted(capsys):
    stream = a_stream([])
    assert stream.sample(Row(png(colored(0, 0)), "cow", None, "b")) is None
    assert stream.left_out == {"with a label that is none of the classes": 1}
    assert "none of the classes: b: cow" in capsys.readouterr().err


def parquet(folder, split, labels, first=0):
    folder.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": png(random_image(first + i, 20, 14)), "path": None}} for i in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float64")})
    columns = {"image": [row["image"] for row in rows], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


def test_a_test_split_without_labels_is_replaced_and_float_labels_are_numbers(tmp_path):
    parquet(tmp_path / "d", "train", [*([0.0, 1.0, 2.0] * 30), None])
    parquet(tmp_path / "d", "test", [-1.0] * 12, first=500)
    data = load_data(settings(tmp_path / "d"))
    assert dict(data.summary)["test"].endswith("(the first of train, as test has no labels)")
    kept = [data.stream.sample(row) for row, _ in islice(data.stream.read(Place()), 91)]
    assert data.stream.left_out["without a label"] == 1 and {sample.label for sample in filter(None, kept)} == {0, 1, 2}


@pytest.mark.slow
def test_a_stream_of_which_nothing_can_be_trained_on_ends(tiny_model, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "sample", lambda self, row: None)
    with pytest.raises(UsageError, match="none of the images can be trained on"):
        fit(settings(shards, tmp_path, model=str(tiny_model)))


def test_a_stream_without_rows_is_an_error_and_no_loop():
    with pytest.raises(UsageError, match="no rows for this process"):
        next(a_stream([]).read(Place()))


def test_class_names_have_to_be_known(shards):
    with pytest.raises(UsageError, match="the column cls does not say which classes there are"):
        load_data(settings(shards, class_names=None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streaming"], "--streaming needs --max-steps N"),
        (["--max-steps", 5], "--max-steps is for --streaming"),
        (["--streaming", "--max-steps", 5, "--epochs", 2], "--streaming and --epochs exclude each other"),
        (["--streaming", "--max-steps", 5, "--shots", 2], "leave these out"),
        (["--streaming", "--max-steps", 5, "--augment", "light"], "leave these out"),
    ],
)
def test_wrong_usage(flags, message, capsys):
    assert train("--model", "m", "--dataset", "d", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_single_file_is_not_streamed(tmp_path):
    (tmp_path / "d.csv").write_text("image,label\na.png,cat\n")
    with pytest.raises(UsageError, match="a file. --streaming reads a dataset on the hub, or a folder of shards"):
        load_data(settings(tmp_path / "d.csv"))


def final_weights(output):
    return load_file(output / "final_model" / "model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_the_same_place(tiny_model, shards, tmp_path):
    """18 steps of 4 images are more than one epoch of 60."""
    more = {"model": str(tiny_model), "max_steps": 18, "eval_steps": 7}
    results = fit(settings(shards, tmp_path / "unbroken", **more))
    assert (
        results["pictures"]["train"] == 72
        and results["pictures"]["left_out"] == {}
        and [e["step"] for e in results["history"] if e["kind"] == "validation"]
    )
    for workers, stop in ((0, 5), (2, 16)):
        output = tmp_path / f"stopped_{stop}"
        answers = iter([False] * (stop - 1) + [True])
        with pytest.raises(Stopped, match=f"stopped after step {stop} of 18"):
            fit(settings(shards, output, workers=workers, **more), lambda answers=answers: next(answers))
        goes_on_to_the_same_end(output, tmp_path / "unbroken")
    output = tmp_path / "limited"
    assert fit_for(11, settings(shards, output, **more))["ended_early"]["step"] == 11
    goes_on_to_the_same_end(output, tmp_path / "unbroken")


def goes_on_to_the_same_end(output, unbroken):
    """A resumed run finishes with the weights of an unbroken one."""
    saved = read_settings(json.loads((output / METADATA).read_text())["settings"])
    fit(resolve({"resume": True, "output_dir": str(output)}, saved))
    expected = final_weights(unbroken)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in final_weights(output).items())


@pytest.mark.slow
def test_two_processes_learn_from_all_images(tiny_model, shards, tmp_path):
    launch = ["launch_processes.py", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", ROOT / "train_vlm.py"]
    flags = ["--model", tiny_model, "--dataset", shards, "--streaming", "--max-steps", 5, "--class-names", *NAMES]
    flags += ["--batch-size", 2, "--gradient-accumulation-steps", 1, "--device", "cpu", "--max-samples", 9]
    result = run(*launch, *flags, "--output-dir", tmp_path / "out")
    assert result.returncode == 0 and TRACEBACK not in result.stderr, result.stderr
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["pictures"]["train"] == 20

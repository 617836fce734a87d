"""Odd and wrong input given to the whole program: it copes, or it ends with a line or two that say what to do."""

import io
import json
import re
import shutil
import socket

import datasets
import numpy as np
import pytest
from commands import TRACEBACK, classify, names_in, run, train
from PIL import Image
from test_data import draw, images
from test_sources import table

CLASSES = {"cat": 4, "dog": 4}


@pytest.fixture
def refused(tiny_model, tmp_path, capsys):
    """Trains with flags that cannot work; returns the error, of two lines at most, after checking how the program
    ended."""

    def call(*flags, model=tiny_model, quiet=True):
        given = ["--model", model] if model and "--demo" not in flags else []
        capsys.readouterr()
        code = train(*given, "--output-dir", tmp_path / "out", *flags)
        out, err = capsys.readouterr()
        notes, colon, message = err.rpartition("error: ")
        assert (code, out) == (2, "") and colon and TRACEBACK not in err
        assert len(message.splitlines()) <= 2 and (not quiet or notes == "")
        assert not (tmp_path / "out" / "results.json").exists()
        return message

    return call


def saved(folder, **splits):
    """A dataset in a folder, by save_to_disk; each split is given by its labels."""
    parts = {
        name: table(labels or [0], ["cat", "dog"]).filter(lambda _, keep=bool(labels): keep)
        for name, labels in splits.items()
    }
    datasets.DatasetDict(parts).save_to_disk(str(folder))
    return folder


@pytest.mark.slow
def test_several_processes_say_it_once_and_keep_the_exit_code(tmp_path):
    result = run(
        "run_vlm_training.sh",
        "--demo",
        "--max-samples",
        3,
        "--device",
        "cpu",
        "--output-dir",
        tmp_path / "out",
        VLM_PROCESSES=2,
    )
    assert result.returncode == 2
    assert result.stderr.count("error: --max-samples 3") == 1
    assert "torch.distributed" not in result.stderr and "ChildFailedError" not in result.stderr
    assert TRACEBACK not in result.stderr


def test_a_model_of_an_architecture_that_is_not_known(refused, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertModel"]}))
    message = refused("--dataset", images(tmp_path / "data", CLASSES), model=folder, quiet=False)
    assert "bert" in message


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_model_folder_with_a_file_missing(refused, tiny_model, tmp_path, missing):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / missing).unlink()
    assert f"model {folder}: " in refused("--dataset", images(tmp_path / "data", CLASSES), model=folder, quiet=False)


def test_a_model_that_is_not_there(refused, tmp_path):
    assert "model ./nothing: " in refused(
        "--dataset", images(tmp_path / "data", CLASSES), model="./nothing", quiet=False
    )


@pytest.mark.slow
def test_the_first_start_without_the_hub_names_the_demo(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    surroundings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HUB_OFFLINE": None,
        "HF_HOME": tmp_path / "huggingface",
    }
    result = run("run_vlm_training.sh", cwd=tmp_path, **surroundings)
    assert (result.returncode, result.stdout) == (2, "")
    first, second = result.stderr.splitlines()
    assert first.startswith("error: dataset Mirali33/mb-domars16k: ")
    assert second.strip().startswith("Without the hub, give folders to --model and --dataset") and "--demo" in second


def test_columns_that_are_not_there(refused, tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("file,kind,size\na.png,cat,big\n")
    message = refused("--dataset", tmp_path / "data.csv", "--image-column", "file", "--label-column", "kinds")
    assert message.startswith("--label-column kinds: ")
    assert refused("--dataset", tmp_path / "data.csv").startswith("--label-column: ")


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({"cat": 3}, "cat"),
        ({"cat": 1, "dog": 5}, "cat (1)"),
        ({"train/cat": 3, "train/dog": 3, "test/bird": 1}, "bird"),
        ({"test/cat": 3, "test/dog": 3}, "test"),
    ],
)
def test_images_that_cannot_be_learned_from(refused, tmp_path, there, named):
    assert named in refused("--dataset", images(tmp_path / "data", there))


def test_images_without_folders_of_classes(refused, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(6):
        draw(tmp_path / "flat" / f"{i}.png")
    assert refused("--dataset", tmp_path / "flat") == (
        f"--dataset {tmp_path / 'flat'}: the images are directly in this folder, so their classes are unknown. "
        "Make one folder for each class.\n"
    )


def test_an_empty_split_and_a_label_outside_the_names(refused, tmp_path):
    assert "val" in refused("--dataset", saved(tmp_path / "a", train=[0, 1] * 3, val=[], test=[0, 1]))
    data = saved(tmp_path / "b", train=[0, 1] * 3, val=[0, 1], test=[0, 1])
    assert refused("--dataset", data, "--class-names", "a b c").startswith("--class-names has 3 names")
    for name in (tmp_path / "nothing", "D/nothing.csv"):  # the second could be owner/name
        assert refused("--dataset", name).startswith(f"--dataset {name}: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-size", 0], "--batch-size 0: expected a whole number of at least 1"),
        (["--epochs", -1], "--epochs -1: expected a whole number of at least 0"),
        (["--learning-rate", "nan"], "--learning-rate nan: expected a number above 0"),
        (["--metrics", "nothing.py:f"], "nothing.py"),
        (["--prompt-template", "@nothing.txt"], "--prompt-template @nothing.txt: not a readable text file"),
        (["--max-samples", 9], "--max-samples 9: expected at least one for each of the 10 classes"),
        (["--dtype", "float16", "--device", "cpu"], "float16 works on CUDA only"),
        (["--model", "a/b"], "--demo brings its own model and dataset"),
    ],
)
def test_settings_that_cannot_work(refused, flags, said):
    assert said in refused("--demo", *flags)


def test_a_place_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "a file").touch()
    for place in (
        tmp_path / "a file",
        tmp_path / "a file" / "results",
        "/proc/results",
    ):  # root may write to any real folder
        message = refused("--demo", "--output-dir", place)
        assert message.startswith(f"--output-dir {place} cannot be written (") and message.endswith(
            "): choose another folder.\n"
        )
    assert names_in(tmp_path) == {"a file"}


def odd_images(folder):
    """Ten images of each of two classes, of every kind that people have."""
    ramp = np.linspace(0, 255, 24 * 16, dtype=np.uint8).reshape(24, 16)
    grey = Image.fromarray(ramp)
    color = Image.merge("RGB", [grey, grey.rotate(180), grey])
    wide = Image.fromarray(ramp.astype(np.uint16) * 200)
    kinds = {
        "1x1.png": color.resize((1, 1)),
        "16 bits.png": wide,
        "32 bits.tif": Image.fromarray(ramp.astype(np.float32) / 7),
        "black and white.png": grey.convert("1"),
        "cmyk.jpg": color.convert("CMYK"),
        "grey.png": grey,
        "grey and alpha.png": grey.convert("LA"),
        "palette.gif": color.convert("P"),
        "rgba.webp": color.convert("RGBA"),
        "very wide.bmp": color.resize((900, 1)),
    }
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for file, image in kinds.items():
            (image if name == "cat" else image.rotate(90, expand=True)).save(folder / name / file)
    frames = [color, color.rotate(90)]
    for kind in ("gif", "png"):
        color.save(folder / "dog" / f"animated.{kind}", save_all=True, append_images=frames, duration=50)
    return folder


@pytest.mark.slow
def test_images_of_every_kind_are_trained_on_and_classified(tiny_model, tmp_path, capsys):
    folder = odd_images(tmp_path / "data")
    flags = ["--model", tiny_model, "--dataset", folder, "--epochs", 1, "--batch-size", 4, "--device", "cpu"]
    assert train(*flags, "--output-dir", tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert sum(results["pictures"].values()) == 22 and results["pictures"]["skipped"] == 0
    capsys.readouterr()
    assert classify("--model-dir", tmp_path / "out" / "best_model", "--device", "cpu", folder) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 + 22 and "error" not in out and err == ""


@pytest.mark.slow
def test_unreadable_images_are_counted_in_the_results(tiny_model, tmp_path, capsys):
    folder = images(
        tmp_path / "data", {"train/cat": 15, "train/dog": 15, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1}
    )
    half = io.BytesIO()
    Image.new("RGB", (30, 30)).save(half, "PNG")
    (tmp_path / "data" / "train" / "cat" / "3.png").write_bytes(half.getvalue()[:50])
    flags = ["--model", tiny_model, "--dataset", folder, "--epochs", 1, "--batch-size", 8, "--device", "cpu"]
    assert train(*flags, "--output-dir", tmp_path / "out") == 0
    assert re.search(r"1 unreadable image$", capsys.readouterr().err, re.MULTILINE)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["pictures"] == {"train": 29, "validation": 2, "test": 2, "skipped": 1}
    assert json.loads((tmp_path / "out" / "training_metadata.json").read_text())["dataset"]["unreadable"] == 1


def test_more_than_5_percent_unreadable_images_stop(refused, tmp_path):
    folder = images(
        tmp_path / "data", {"train/cat": 15, "train/dog": 15, "val/cat": 1, "val/dog": 1, "test/cat": 1, "test/dog": 1}
    )
    for name in ("cat", "dog"):
        (tmp_path / "data" / "train" / name / "3.png").write_bytes(b"no image")
    assert refused("--dataset", folder, quiet=False).startswith("2 of 30 images of train ")

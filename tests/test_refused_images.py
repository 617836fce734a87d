"""An image that a model's processor refuses is an unreadable image: named, counted, left out."""

import json

import pytest
import torch
from commands import train
from hub_layout_qwen2_vl import save_published
from PIL import Image
from test_data import images, load
from tiny import random_image, refusing, tiny_classifier

from vlm.common import RunError, UsageError
from vlm.data import Sample, UnreadableImage, leave_out_refused
from vlm.families import load_family
from vlm.inference import load_model_and_metadata, predict_batch, predict_single_image

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_published(tmp_path_factory.mktemp("qwen"))


def with_thin_images(root, *places, count=25):
    """An image folder with three splits of two classes, and thin images at some places."""
    folder = images(root, {f"{split}/{name}": count for split in ("train", "val", "test") for name in ("cat", "dog")})
    for i, place in enumerate(places):
        (root / place).mkdir(exist_ok=True)
        random_image(1000 + i, *((1, 500) if i % 2 else (500, 1))).save(root / place / f"thin {i}.png")
    return folder


def test_thin_images_leave_the_splits_and_are_counted(qwen, tmp_path, capsys):
    data = load(with_thin_images(tmp_path, "train/cat", "test/dog"))
    assert [len(getattr(data, role)) for role in SPLITS] == [51, 50, 51] and not data.skipped
    before = data.fingerprint
    leave_out_refused(data, load_family(qwen, torch.float32, torch.device("cpu"), {}).refusal_of_size)
    assert [len(getattr(data, role)) for role in SPLITS] == [50, 50, 50] and len(data.skipped) == 2
    said = capsys.readouterr().err
    assert "train/cat/thin 0.png: 500 x 1 pixels, but Qwen2-VL takes images at most 200 times as long as wide" in said
    assert dict(data.summary)["train"].startswith("50 images") and "2 unreadable" in dict(data.summary)["skipped"]
    assert data.source["splits"]["test"]["pictures"] == 50 and data.source["unreadable"] == 2
    assert {part for part in before if before[part] != data.fingerprint[part]} == {
        f"{part} of {role}" for part in ("labels", "images", "reasonings") for role in ("train", "test")
    }


def test_too_many_refused_images_and_a_class_without_any_other_are_errors(tmp_path):
    thin = lambda width, height: "too thin" if max(width, height) > 200 * min(width, height) else None  # noqa: E731
    data = load(with_thin_images(tmp_path / "many", *["train/cat"] * 4))
    with pytest.raises(UsageError, match="4 of 54 images of train are unreadable"):
        leave_out_refused(data, thin)
    data = load(with_thin_images(tmp_path / "class", "train/owl", "train/owl"))
    with pytest.raises(UsageError, match="no readable image of owl"):
        leave_out_refused(data, thin)


def test_only_extreme_sizes_are_tried_if_none_is_refused(tmp_path):
    root = tmp_path / "data"
    images(root, {"cat": 10, "dog": 10})
    for i in range(30):
        random_image(i, 20 + i, 60 - i).save(root / "cat" / f"{i} other.png")
    data, tried = load(root), []
    leave_out_refused(data, lambda *size: tried.append(size))
    assert len(tried) <= 8 < len({check.size for check in data.train.checks})
    leave_out_refused(data, lambda *size: "no" if size == (49, 31) else None)
    assert len(data.skipped) == 1


def test_a_refusal_is_tried_on_the_processor_of_any_other_family(tiny_model, monkeypatch):
    family = tiny_classifier(tiny_model).family
    assert family.refusal_of_size(1, 500) is None
    monkeypatch.setattr(family.processor, "image_processor", None)
    assert "1 x 500 pixels, which SmolVLM cannot take" in family.refusal_of_size(1, 500)


def test_an_image_that_fails_in_the_middle_of_a_run_is_named(tiny_model, monkeypatch):
    family = tiny_classifier(tiny_model).family
    monkeypatch.setattr(family, "encode_images", refusing((7, 9), family.encode_images))
    with pytest.raises(RunError, match=r"b\.png: 7 x 9 pixels, .*no such shape.*--resume"):
        family.encode_samples([Sample(random_image(0), 0, "a.png"), Sample(random_image(1, 7, 9), 0, "b.png")])

    def gone():
        raise UnreadableImage("c.png: no such file")

    with pytest.raises(RunError, match=r"c\.png: no such file\. .*--resume"):
        family.encode_samples([Sample(gone, 0, "c.png")])


@pytest.mark.slow
def test_training_and_inference_go_on_without_a_thin_image(qwen, tmp_path, capsys):
    folder = with_thin_images(tmp_path / "data", "train/cat", count=20)
    flags = ["--model", qwen, "--dataset", folder, "--epochs", 1, "--batch-size", 8, "--device", "cpu", "--seed", 0]
    out = tmp_path / "out"
    assert train(*flags, "--max-pixels", 3136, "--output-dir", out) == 0
    assert "thin 0.png: 500 x 1 pixels" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["pictures"] == {"train": 40, "validation": 40, "test": 40, "skipped": 1}
    model, processor, metadata = load_model_and_metadata(out / "best_model", device="cpu")
    paths = [f"{folder}/train/cat/{name}" for name in ("0.png", "thin 0.png", "1.png")]
    found = predict_batch(model, processor, paths, metadata, show_progress=False)
    assert list(found) == paths and "error" in found[paths[1]] and found[paths[1]]["prediction"] is None
    assert "500 x 1 pixels" in found[paths[1]]["error"] and found[paths[2]]["prediction"] in ("cat", "dog")
    kept = predict_batch(model, processor, paths, metadata, show_progress=False, feature_cache=True)
    assert kept[paths[1]] == found[paths[1]]
    with pytest.raises(UnreadableImage, match="500 x 1 pixels"):
        predict_single_image(model, processor, Image.open(paths[1]), metadata)

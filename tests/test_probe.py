"""The probe is the head, tested alone; and what may be chance."""

import numpy as np
import pytest
import torch
from tiny import random_image, save_tiny_model

from vlm.config import resolve
from vlm.data import Data, Rows, Split
from vlm.evaluation.head_fit import fit_head, vectors_of_split
from vlm.evaluation.linear_probe import compare, probe
from vlm.evaluation.reliability import may_be_chance
from vlm.families import fill_cache, load_family
from vlm.training.tuning import prepare_tuning


def split_of(labels, seed):
    """Dark and bright images, with noise."""
    images = [
        random_image(seed + i).point(lambda value, label=label: value // 3 + 60 * label)
        for i, label in enumerate(labels)
    ]
    return Split(Rows(images, labels, [str(i) for i in range(len(labels))]), range(len(labels)), labels)


@pytest.fixture
def data():
    labels = [i % 3 for i in range(30)]
    return Data(split_of(labels, 0), split_of(labels[:12], 100), split_of(labels[:15], 200), ["a", "b", "c"], edge=20)


@pytest.fixture
def family(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    family = load_family(save_tiny_model(tmp_path / "model"), torch.float32, torch.device("cpu"), {})
    prepare_tuning(family, resolve({"tune": "connector"}))
    return family


def test_the_figures_are_those_of_the_head_on_the_test_split(family, data):
    found, right = probe(family, data)
    fitted = fit_head(family, data.train, data.class_names)
    vectors, _ = vectors_of_split(family, data.test, range(len(data.test)), None, fitted.head.layer)
    expected = fitted.head.logits(torch.from_numpy(vectors)).argmax(1).numpy() == np.array(data.test.labels)
    assert (right == expected).all() and found["accuracy"][0] == expected.mean() > 0.6, "dark and bright are easy"
    assert found["validation_accuracy"] == fitted.accuracy and found["C"] == fitted.strength
    value, low, high = found["accuracy"]
    assert 0 <= low <= value <= high <= 1


def test_features_of_the_cache_are_used_and_give_the_same(family, data, monkeypatch):
    expected, right = probe(family, data)
    cache = fill_cache(family, (data.train, data.validation), limit_gb=1)
    seen = []
    encode = family.encode_images
    monkeypatch.setattr(family, "encode_images", lambda images: seen.extend(images) or encode(images))
    found, again = probe(family, data, cache)
    assert len(seen) == len(data.test), "those of the test split alone are not in the cache"
    assert (right == again).all() and found["accuracy"] == expected["accuracy"] and found["layer"] == expected["layer"]


def test_an_encoder_without_features_of_its_own_is_left_out_with_a_note(family, data, monkeypatch, capsys):
    def fail(inputs):
        raise IndexError("nothing reached the connector")

    family.model.train()
    monkeypatch.setattr(family, "vision_features", fail)
    assert probe(family, data) is None and family.model.training, "the mode stays as it was"
    assert "no probe: this model's vision encoder has no features of its own (IndexError)" in capsys.readouterr().err
    monkeypatch.setattr(family, "vision_features", lambda inputs: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        probe(family, data)
    assert family.model.training


def test_an_encoder_without_blocks_is_left_out_with_a_note(family, data, monkeypatch, capsys):
    family.model.train()
    monkeypatch.setattr("vlm.families.pooling.GradientCheckpointingLayer", torch.nn.LSTM)
    assert probe(family, data) is None and family.model.training, "the mode stays as it was"
    assert "no probe: the vision encoder has no transformer blocks." in capsys.readouterr().err


def test_a_vlm_more_than_two_points_below_is_warned_about():
    def right(count: int, of: int) -> np.ndarray:
        return np.arange(of) < count

    assert compare(right(900, 1000), right(950, 1000)) is None and compare(right(900, 1000), right(880, 1000)) is None
    assert "the probe is 2.1 points ahead: a linear classifier" in compare(right(900, 1000), right(879, 1000))
    few = "the probe is 10.0 points ahead, which may be chance: 40 test images are too few to tell."
    assert compare(right(36, 40), right(32, 40)) == few


def test_what_may_be_chance_is_told_image_by_image():
    """The same two accuracies, 0.912 and 0.857 of 251: mistakes on the same images tell more than those on others."""
    theirs, alike, apart = np.arange(251) < 229, np.arange(251) < 215, np.arange(251) >= 36
    assert theirs.sum() == 229 and alike.sum() == apart.sum() == 215
    assert "may be chance" not in compare(theirs, alike) and "may be chance" in compare(theirs, apart)
    assert may_be_chance(alike, theirs) and may_be_chance(alike, alike), "not ahead at all"
    assert [may_be_chance(np.full(n, True), np.full(n, False)) for n in (1, 5, 6, 20)] == [True, True, False, False]

"""The cache of vision features: the same numbers as from pixels, and no harm from runs that share it or are killed."""

import os
import time

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import hub_layout_smolvlm
import pytest
import test_family_generic
import torch
from tiny import random_picture, tiny_prompts

from vlm import features
from vlm.classifier import VLMClassifier
from vlm.config import resolve
from vlm.data import Split
from vlm.families import load_family
from vlm.features import cache_root, fill_cache, fingerprint
from vlm.sources import Rows
from vlm.tuning import prepare_tuning

LABELS = [0, 1, 2, 3]
MODELS = {
    "idefics3": hub_layout_smolvlm.save_published,
    "qwen2_vl": hub_layout_qwen2_vl.save_published,
    "phi3_v": hub_layout_phi3_vision.save_published,
    "llava": lambda folder: test_family_generic.TestLlavaClip().build(folder),
}


def split(count=4):
    """Pictures of unequal sizes; the last one is the first once more."""
    pictures = [random_picture(i, 30 + 20 * i, 40) for i in range(count - 1)]
    return Split(Rows([*pictures, pictures[0]], LABELS, [str(i) for i in range(count)]), range(count), LABELS)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return cache_root()


def classifier_of(build, folder):
    build(folder)
    family = load_family(folder, torch.float32, torch.device("cpu"), {})
    prepare_tuning(family, resolve({"tune": "connector"}))
    return VLMClassifier(family, tiny_prompts())


@pytest.mark.parametrize("name", MODELS)
def test_cached_features_give_the_same_loss_gradients_and_scores_as_pixels(name, tmp_path, root):
    classifier = classifier_of(MODELS[name], tmp_path / "model")
    samples = [split()[i] for i in range(4)]

    def measure():
        output = classifier.train()(classifier.collate(True)(samples))
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in classifier.named_parameters() if p.grad is not None}
        classifier.zero_grad()
        classifier.eval()
        return output.loss.detach(), gradients, classifier.score(classifier.read(classifier.collate(False)(samples)))

    loss, gradients, scores = measure()
    classifier.feature_cache = fill_cache(classifier.family, [split()], limit_gb=1)
    batch = classifier.collate(True)(samples)
    assert not any("pixel" in key for key in batch["pixels"])
    assert len(list(root.glob("*/*.safetensors"))) == 3, "the picture that is there twice is computed once"
    classifier.family.vision_features = None  # it must not be needed any more
    cached_loss, cached_gradients, cached_scores = measure()
    torch.testing.assert_close(cached_loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(cached_scores, scores, rtol=1e-6, atol=1e-4)
    assert cached_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (cached_gradients[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, key


def test_a_second_run_computes_nothing(tmp_path, monkeypatch):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    cache = fill_cache(classifier.family, [split()], limit_gb=1)
    times = {file: file.stat().st_mtime_ns for file in cache.folder.iterdir()}
    computed = []
    monkeypatch.setattr(features.FeatureCache, "add", lambda self, family, pictures, to_come: computed.append(1) or True)
    again = fill_cache(classifier.family, [split()], limit_gb=1)
    assert again.folder == cache.folder and not computed
    assert {file: file.stat().st_mtime_ns for file in cache.folder.iterdir()} == times


def test_other_weights_or_picture_processing_have_features_of_their_own(tmp_path):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    seen = {fingerprint(classifier.family)}
    with torch.no_grad():
        next(classifier.family.vision.parameters()).add_(1e-3)
    seen.add(fingerprint(classifier.family))
    classifier.family.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    seen.add(fingerprint(classifier.family))
    seen.add(fingerprint(load_family(tmp_path / "model", torch.bfloat16, torch.device("cpu"), {})))
    assert len(seen) == 4


def test_a_trained_tower_and_one_that_packs_its_features_are_not_cached(tmp_path):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    classifier.family.vision.requires_grad_(True)
    assert fill_cache(classifier.family, [split()], limit_gb=1) is None
    packing = classifier_of(lambda folder: test_family_generic.TestLlavaOnevision().build(folder), tmp_path / "packing")
    assert fill_cache(packing.family, [split()], limit_gb=1) is None


def test_features_that_are_too_large_are_not_kept(tmp_path, capsys):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    assert fill_cache(classifier.family, [split()], limit_gb=1e-6) is None
    assert "more than --cache-size 1e-06: not kept" in capsys.readouterr().err


def test_only_features_that_nobody_used_for_a_day_make_room(tmp_path, root):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    for name, age in (("old", 2 * 86400), ("new", 60)):
        (root / name).mkdir(parents=True)
        (root / name / "x.safetensors").write_bytes(bytes(600_000))
        os.utime(root / name, (time.time() - age, time.time() - age))
    assert fill_cache(classifier.family, [split()], limit_gb=1.2e-3) is not None
    assert sorted(path.name for path in root.iterdir() if path.name in ("old", "new")) == ["new"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    classifier = classifier_of(MODELS["idefics3"], tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "file"))
    assert fill_cache(classifier.family, [split()], limit_gb=1) is None
    assert "computed anew each time" in capsys.readouterr().err

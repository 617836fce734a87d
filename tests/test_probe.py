"""The probe: each image's features are its own, whatever its neighbors, in every family; and the figures are
scikit-learn's."""

import numpy as np
import pytest
import test_family_generic
import torch
from feature_checks import MODELS
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits
from tiny import random_image, save_tiny_model, tiny_prompts

from vlm.config import resolve
from vlm.data import Data, Rows, Sample, Split
from vlm.evaluation import linear_probe as module
from vlm.evaluation.linear_probe import compare, pooled_features, probe
from vlm.evaluation.reliability import may_be_chance
from vlm.families import fill_cache, load_family
from vlm.training.tuning import prepare_tuning

GENERIC = {
    "llava_onevision": test_family_generic.TestLlavaOnevision,
    "gemma3": test_family_generic.TestGemma3,
    "paligemma": test_family_generic.TestPaliGemma,
}
BUILDERS = MODELS | {
    name: (lambda folder, checks=checks: checks().build(folder), {}) for name, checks in GENERIC.items()
}
SIZES = ((40, 28), (20, 60), (40, 28), (90, 30))


def family_of(name, folder):
    build, options = BUILDERS[name]
    build(folder)
    family = load_family(folder, torch.float32, torch.device("cpu"), options)
    family.render(tiny_prompts())
    return family


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_pooled_features_are_the_mean_over_each_image_alone(name, tmp_path):
    family = family_of(name, tmp_path)
    images = [random_image(i, *size) for i, size in enumerate(SIZES)]
    samples = [Sample(image, 0, "an image") for image in images]
    expected = []
    for image in images:
        with torch.no_grad():
            hidden = family.vision_features(family.encode_images([image]).inputs)
        places = hidden.reshape(-1, hidden.shape[-1])
        expected.append(torch.stack([place.double() for place in places]).sum(0) / len(places))
    expected = torch.stack(expected).numpy()
    assert np.abs(expected - expected[0]).max(1)[1:].min() > 1e-3, "the images should differ, or the test says little"
    np.testing.assert_allclose(pooled_features(family, samples), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled_features(family, samples[::2]), expected[::2], rtol=1e-4, atol=1e-5)


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


def test_the_figures_are_those_of_a_plain_logistic_regression(family, data):
    found, right = probe(family, data)
    features = [
        pooled_features(family, [split[i] for i in range(len(split))])
        for split in (data.train, data.validation, data.test)
    ]
    scaler = StandardScaler().fit(features[0])
    train, validation, test = map(scaler.transform, features)
    accuracies = {}
    for strength in module.STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(train, data.train.labels)
        accuracies[strength] = (model.score(validation, data.validation.labels), model.score(test, data.test.labels))
    best = max(accuracies, key=lambda strength: (accuracies[strength][0], -strength))
    assert found["C"] == best and found["features"] == train.shape[1] == 16
    assert (found["validation_accuracy"], found["accuracy"][0]) == pytest.approx(accuracies[best])
    assert right.mean() == found["accuracy"][0] and right.shape == (len(data.test),)
    value, low, high = found["accuracy"]
    assert 0 <= low <= value <= high <= 1 and value > 0.6, "dark and bright are easy to tell apart"


def test_the_fits_are_counted_and_run_on_one_thread(family, data, monkeypatch, capsys):
    """Threads that wait for each other made the fits take minutes."""
    threads = []
    fit = LogisticRegression.fit

    def watched(self, *arguments):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    monkeypatch.setattr("vlm.common.progress.SECONDS_BETWEEN_LINES", 0)
    with threadpool_limits(2):
        probe(family, data)
    assert threads and set(threads) == {1}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fitting the probe: ")]
    assert len(lines) == len(module.STRENGTHS) and "5/5 fits (100%)" in lines[-1]


def test_features_of_the_cache_are_used_and_give_the_same(family, data, monkeypatch):
    expected, right = probe(family, data)
    cache = fill_cache(family, (data.train, data.validation), limit_gb=1)
    seen = []
    encode = family.encode_images
    monkeypatch.setattr(family, "encode_images", lambda images: seen.extend(images) or encode(images))
    found, again = probe(family, data, cache)
    assert len(seen) == len(data.test), "those of the test split alone are not in the cache"
    assert found | {"seconds": 0} == expected | {"seconds": 0} and (right == again).all()


def test_a_encoder_without_features_of_its_own_is_left_out_with_a_note(family, data, monkeypatch, capsys):
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

"""Whether the image matters: exchanged images come from other classes, and the figures are those of a plain run over
them."""

import numpy as np
import pytest
import torch
from tiny import random_image, save_tiny_model, tiny_classifier

from vlm.data import Rows, Sample, Split, balanced_positions
from vlm.evaluation import image_check
from vlm.evaluation.evaluate import score_split
from vlm.evaluation.image_check import check_images, other_class_partners

COUNT = 30


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tiny_classifier(save_tiny_model(tmp_path_factory.mktemp("model")))


def split_with(labels):
    sizes = [(20, 14), (14, 20)]
    images = [random_image(i, *sizes[i % 2]) for i in range(len(labels))]
    return Split(Rows(images, labels, [f"image {i}" for i in range(len(labels))]), range(len(labels)), labels)


@pytest.mark.parametrize(
    "labels", [[0, 1] * 8, [0, 0, 0, 1, 1, 2], [5, 5, 5, 3, 3, 3], list(range(9)), [2, 2, 2, 2, 0, 0, 1, 3]]
)
def test_partners_are_of_another_class_and_each_is_used_once(labels):
    labels = np.array(labels)
    orders = set()
    for seed in range(5):
        partners = other_class_partners(labels, np.random.default_rng(seed))
        assert sorted(partners) == list(range(len(labels))) and (labels[partners] != labels).all()
        orders.add(tuple(partners))
    assert len(orders) > 1


def test_a_class_with_more_than_half_finds_as_many_partners_as_there_are():
    labels = np.array([0] * 6 + [1] * 2)
    partners = other_class_partners(labels, np.random.default_rng(0))
    assert (labels[partners] != labels).sum() == 4 and sorted(partners) == list(range(8))


def test_the_figures_are_those_of_a_run_over_other_images(classifier, monkeypatch):
    """Slowly: every image that is wanted is put under the label and scored."""
    monkeypatch.setattr(image_check, "IMAGES", 14)
    first = split_with([0] * COUNT)
    guesses = score_split(classifier, first).argmax(1).tolist()  # labels that the model gets right, but for every third
    split = split_with([(guess + (i % 3 == 0)) % 7 for i, guess in enumerate(guesses)])
    found = check_images(classifier, split, score_split(classifier, split), seed=1)
    chosen = balanced_positions(split.labels, 14, [1, 3])
    labels = np.array(split.labels)[chosen]
    partners = other_class_partners(labels, np.random.default_rng([1, 4]))
    samples = [split[i] for i in chosen]

    def right(images):
        scores = score_split(
            classifier, [Sample(p, s.label, s.name) for p, s in zip(images, samples, strict=True)], batch_size=3
        )
        return scores.argmax(1).numpy() == labels

    exchanged = labels[partners] != labels
    assert found["pictures"] == 14 and exchanged.any()
    assert found["accuracy"] == pytest.approx(right([s.image for s in samples]).mean())
    assert found["shuffled"] == pytest.approx(right([samples[p].image for p in partners])[exchanged].mean())
    gray = [s.image.point(lambda value: 128) for s in samples]
    assert found["gray"] == pytest.approx(right(gray).mean())
    assert found["chance"] == pytest.approx(max(np.bincount(labels)) / 14)


def scores_of(predictions, classes=7):
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_a_model_that_always_says_the_same_is_warned_about(classifier, monkeypatch):
    monkeypatch.setattr(image_check, "gray_predictions", lambda c, sizes, b: np.zeros(len(sizes), dtype=int))
    split = split_with([i % 7 for i in range(COUNT)])
    found = check_images(classifier, split, scores_of([0] * COUNT))
    assert found["accuracy"] == pytest.approx(5 / 30) and found["gray"] == found["accuracy"]
    assert found["warning"].startswith("nothing shows that the image matters: of 30 test images 17% are right")
    assert "exchanged and with gray images (17%, 17%)" in found["warning"]


def test_a_model_that_looks_is_not(classifier, monkeypatch):
    monkeypatch.setattr(image_check, "gray_predictions", lambda c, sizes, b: np.zeros(len(sizes), dtype=int))
    labels = [i % 7 for i in range(COUNT)]
    found = check_images(classifier, split_with(labels), scores_of(labels))
    assert (found["accuracy"], found["shuffled"], found["warning"]) == (1.0, 0.0, None)
    half = [label if i % 2 else (label + 1) % 7 for i, label in enumerate(labels)]
    assert check_images(classifier, split_with(labels), scores_of(half))["warning"] is None


def test_so_few_images_that_no_result_could_be_told_from_chance_are_called_too_few(classifier, monkeypatch):
    monkeypatch.setattr(image_check, "gray_predictions", lambda c, sizes, b: np.full(len(sizes), 6))
    for count, said in ((2, "2 test images are too few to show"), (6, None)):
        warning = check_images(classifier, split_with([*range(count)]), scores_of([*range(count)]))["warning"]
        assert warning is None if said is None else warning.startswith(said)


def test_one_class_alone_cannot_be_exchanged(classifier):
    found = check_images(classifier, split_with([3] * 4), scores_of([3] * 4))
    assert found["shuffled"] is None and found["chance"] == 1

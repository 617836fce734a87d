"""Training images reach the language model through a connector that was not aligned on them."""

import copy

import pytest
import torch
from feature_checks import MODELS, load
from feature_checks import split as mixed_split
from halves import CLASSES, resumed, settings, split

from vlm.classifier.batching import encode
from vlm.common.errors import RunError, Stopped, UsageError
from vlm.data.sources import Rows
from vlm.data.splits import Split
from vlm.families.encoded import CONNECTED_FEATURES, ENCODER_FEATURES
from vlm.families.features import fill_cache
from vlm.training import loop as training
from vlm.training.alignment import align
from vlm.training.cross_fit import (
    FOLDS,
    align_folds,
    can_cross_fit,
    connector_of,
    folds_of,
    out_of_fold_cache,
    weights_for_folds,
)
from vlm.training.first_stage import first_stage
from vlm.training.loop import Trainer, alignment, fit
from vlm.training.loop import first_stage as first_stage_module
from vlm.training.output import FOLD_FEATURES, STATE
from vlm.training.setup import set_up


def with_keys(labels, keys):
    return Split(Rows([None] * len(labels), labels, keys), range(len(labels)), labels, keys)


@pytest.fixture
def small(halves, tmp_path, monkeypatch):
    """The family, its training images, and the cache of their features."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alignment, "STEPS", 30)
    family, train = load(halves).family, split(5)
    return family, train, fill_cache(family, [train], limit_gb=1)


def drawn(family, seed=0):
    """The weights of a connector for each fold, all different."""
    torch.manual_seed(seed)
    return [
        {name: weight + 0.1 * torch.randn_like(weight) for name, weight in family.connector.state_dict().items()}
        for _ in range(FOLDS)
    ]


def test_each_fold_has_its_share_of_every_class_and_equal_images_lie_in_one():
    labels = [0] * 10 + [1] * 15 + [1]
    keys = [f"{i}" for i in range(25)] + ["24"]
    folds = folds_of(with_keys(labels, keys), seed=1)
    assert len(folds) == 25
    for label, each in ((0, 2), (1, 3)):
        of_class = [
            folds[key] for key in dict.fromkeys(key for key, one in zip(keys, labels, strict=True) if one == label)
        ]
        assert sorted(of_class) == sorted(list(range(FOLDS)) * each)
    assert folds == folds_of(with_keys(labels, keys), seed=1) != folds_of(with_keys(labels, keys), seed=2)


@pytest.mark.parametrize(("each", "possible"), [(4, False), (5, True), (6_399, True), (6_400, False)])
def test_it_needs_a_image_of_each_class_in_each_fold_and_an_alignment_that_sees_images_again(each, possible):
    assert can_cross_fit(with_keys([0] * each + [1] * each, [f"{i}" for i in range(2 * each)])) == possible


def test_equal_images_are_no_images_for_several_folds(halves, capsys):
    train = with_keys([0] * 10 + [1] * 10, ["same"] * 6 + [f"{i}" for i in range(14)])
    assert can_cross_fit(train)
    train.keys[6:10] = ["same"] * 4
    assert not can_cross_fit(train)
    assert weights_for_folds(load(halves).family.connector, train) == []
    assert "cross-fitting takes 5 different images of each class" in capsys.readouterr().err


def test_each_connector_is_the_one_aligned_on_the_images_of_the_other_folds(small):
    family, train, cache = small
    before = copy.deepcopy(family.connector.state_dict())
    connectors = weights_for_folds(family.connector, train)
    align_folds(family, CLASSES, train, cache, connectors, seed=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in family.connector.state_dict().items())
    folds = folds_of(train, 3)
    for k, connector in enumerate(connectors):
        family.connector.load_state_dict(before)
        align(family, CLASSES, train.take([i for i in range(len(train)) if folds[train.keys[i]] != k]), cache, seed=3)
        assert all(
            torch.equal(a, b) for a, b in zip(family.connector.state_dict().values(), connector.values(), strict=True)
        )


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_behind_the_connector_of_the_images_fold(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    build, options = MODELS[name]
    build(tmp_path / "model")
    family, train = load(tmp_path / "model", options).family, mixed_split()
    cache, connectors = fill_cache(family, [train], limit_gb=1), drawn(family)
    own = copy.deepcopy(family.connector.state_dict())
    found = out_of_fold_cache(family, train, cache, connectors, tmp_path / "own", seed=1)
    assert found.folder.parent == tmp_path / "own"
    assert all(torch.equal(own[key], tensor) for key, tensor in family.connector.state_dict().items())
    for i, key in enumerate(train.keys):
        features = found.encode([key]).inputs
        assert ENCODER_FEATURES not in features
        with connector_of(family, connectors[folds_of(train, 1)[key]]), torch.no_grad():
            expected = family.image_features(encode([train[i]], family, cache).inputs)
        torch.testing.assert_close(features[CONNECTED_FEATURES], expected, rtol=1e-5, atol=1e-6)
        others = [c for k, c in enumerate(connectors) if k != folds_of(train, 1)[key]]
        with connector_of(family, others[0]), torch.no_grad():
            assert not torch.allclose(
                features[CONNECTED_FEATURES], family.image_features(encode([train[i]], family, cache).inputs)
            )


def test_other_connectors_have_other_features_and_the_same_ones_are_not_computed_again(small, tmp_path, monkeypatch):
    family, train, cache = small
    first, other = (
        out_of_fold_cache(family, train, cache, drawn(family, seed), tmp_path / "own", seed=1) for seed in (0, 1)
    )
    assert other.folder != first.folder
    monkeypatch.setattr(type(first), "add", lambda *_: pytest.fail("computed again"))
    assert out_of_fold_cache(family, train, cache, drawn(family, 0), tmp_path / "own", seed=1).folder == first.folder


@pytest.mark.parametrize("enough_for", [0, 10])
def test_features_that_find_no_room_are_not_begun(small, tmp_path, capsys, enough_for):
    family, train, cache = small
    own = copy.deepcopy(family.connector.state_dict())
    whole = out_of_fold_cache(family, train, cache, drawn(family), tmp_path / "whole", seed=1)
    sizes = [file.stat().st_size for file in whole.folder.iterdir()]
    assert len(sizes) == len(train) == 15
    cache.limit_gb = enough_for * max(sizes) / 1e9
    assert out_of_fold_cache(family, train, cache, drawn(family), tmp_path / "own", seed=1) is None
    error = capsys.readouterr().err
    assert "for 15 images" in error and "not kept" in error and "--freeze-connector" not in error
    assert not list((tmp_path / "own").glob("*/*"))
    assert all(torch.equal(own[name], tensor) for name, tensor in family.connector.state_dict().items())


@pytest.mark.parametrize(
    ("more", "folds"),
    [
        ({"freeze_connector": True}, FOLDS),
        ({"freeze_connector": True, "shots": 4}, 0),
        ({}, 0),
    ],
)
def test_lora_alone_is_trained_on_these_features_and_tested_on_those_of_the_whole_connector(
    halves, color_folder, tmp_path, monkeypatch, more, folds
):
    monkeypatch.setattr(alignment, "STEPS", 30)
    run = set_up(settings(halves, color_folder, tmp_path / "out", **more))
    trainer = Trainer(run)
    trainer.training_cache = first_stage(run, trainer.progress)
    assert len(run.fold_connectors) == folds
    pixels = next(trainer._batches(trainer._plan(0)))["pixels"]
    assert (CONNECTED_FEATURES in pixels) == bool(folds) and (ENCODER_FEATURES in pixels) != bool(folds)
    assert ENCODER_FEATURES in run.classifier.collate(with_response=False)([run.data.validation[0]])["pixels"]
    trains_connector = any(p.requires_grad for p in run.classifier.family.connector.parameters())
    assert trains_connector == ("freeze_connector" not in more)


def test_features_of_folds_are_there_while_they_are_needed(halves, color_folder, tmp_path, monkeypatch):
    """Also for a run that goes on after its training."""
    monkeypatch.setattr(alignment, "STEPS", 30)
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        fit(settings(halves, color_folder, output, freeze_connector=True), lambda: True)
    kept = list((output / FOLD_FEATURES).glob("*/*"))
    monkeypatch.setattr(training, "finish", lambda run, *_: {"folds": len(run.fold_connectors)})
    assert kept and fit(resumed(output)) == {"folds": FOLDS}
    assert not (output / FOLD_FEATURES).exists() and (output / STATE).exists()
    monkeypatch.setattr(
        first_stage_module, "out_of_fold_cache", lambda *_: pytest.fail("nothing is left to be trained")
    )
    assert fit(resumed(output)) == {"folds": FOLDS}


def test_a_run_whose_features_of_folds_find_no_room_ends_with_what_to_do(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    monkeypatch.setattr(first_stage_module, "out_of_fold_cache", lambda *_: None)
    with pytest.raises(RunError, match="make room, give a larger --cache-size, or train the connector too"):
        fit(settings(halves, color_folder, tmp_path / "out", freeze_connector=True))


def test_a_resumed_run_that_cannot_keep_features_leaves_the_state_as_it_is(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        fit(settings(halves, color_folder, output, freeze_connector=True), lambda: True)
    with pytest.raises(UsageError, match="had 5 connectors of folds .*--cache-size.*this one has 0"):
        fit(resumed(output, no_feature_cache=True))
    assert fit(resumed(output, no_feature_cache=False))["alignment"]["folds"] == FOLDS

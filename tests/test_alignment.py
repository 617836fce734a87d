"""--align-connector: the connector learns the names of the classes before the training."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from commands import run, train
from feature_checks import load
from halves import CLASSES, connector_of, resumed, settings, split
from safetensors.torch import load_file

from vlm.common.errors import Stopped
from vlm.families import cache_root, fill_cache
from vlm.families.features.cache import nbytes
from vlm.training import alignment, results, running
from vlm.training.alignment import align, nearest_name_accuracy
from vlm.training.running import fit


@pytest.mark.slow
def test_images_come_to_lie_next_to_the_names_of_their_classes(halves, monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    names, train, validation = CLASSES, split(8), split(6, start=100)
    found = []
    for _ in range(2):
        family = load(halves, tune="connector").family
        cache = fill_cache(family, [train, validation], limit_gb=1)
        before = {name: tensor.clone() for name, tensor in family.model.state_dict().items()}
        at_first = nearest_name_accuracy(family, names, validation, cache)
        align(family, names, train, cache, seed=3)
        after = family.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all("connector" in name for name in changed)
        assert all(p.grad is None for p in family.model.parameters())
        found.append((at_first, nearest_name_accuracy(family, names, validation, cache), after))
    assert found[0][0] < 0.7 and found[0][1] == 1.0
    assert all(torch.equal(found[0][2][name], found[1][2][name]) for name in found[0][2]), (
        "the same seed gives the same weights"
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"freeze_connector": True}])
def test_a_run_aligns_once_says_so_and_resumes_to_the_same_weights(
    halves, color_folder, tmp_path, monkeypatch, capsys, more
):
    monkeypatch.setattr(alignment, "STEPS", 30)
    found = fit(settings(halves, color_folder, tmp_path / "whole", **more))
    assert "aligning the connector" in capsys.readouterr().err
    assert 0 <= found["alignment"]["validation_accuracy"] <= 1
    with pytest.raises(Stopped):
        fit(settings(halves, color_folder, tmp_path / "parts", **more), lambda: True)
    capsys.readouterr()
    again = fit(resumed(tmp_path / "parts"))
    assert "aligning the connector" not in capsys.readouterr().err
    assert again["alignment"]["validation_accuracy"] == found["alignment"]["validation_accuracy"]
    whole, parts = (load_file(tmp_path / name / "final_model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    connector = connector_of(halves), connector_of(tmp_path / "whole" / "final_model")
    assert not any(torch.equal(a, b) for a, b in zip(*connector, strict=True) if a.ndim > 1)


@pytest.mark.slow
def test_a_frozen_connector_stays_as_it_was_aligned(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        fit(settings(halves, color_folder, tmp_path / name, freeze_connector=True, learning_rate=rate))
    slow, fast = (connector_of(tmp_path / name / "final_model") for name in ("slow", "fast"))
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


@pytest.mark.slow
def test_one_that_is_not_frozen_goes_on_learning(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        fit(settings(halves, color_folder, tmp_path / name, connector_learning_rate=rate))
    slow, fast = (connector_of(tmp_path / name / "final_model") for name in ("slow", "fast"))
    assert not any(torch.equal(a, b) for a, b in zip(slow, fast, strict=True) if a.ndim > 1)


@pytest.mark.slow
def test_two_processes_go_on_from_the_same_connector(halves, color_folder, tmp_path):
    """Else their gradients would be of different models: the loss is that of one process with twice the batch."""
    flags = [
        "--model",
        halves,
        "--dataset",
        color_folder,
        "--epochs",
        1,
        "--gradient-accumulation-steps",
        4,
        "--device",
        "cpu",
        "--align-connector",
    ]
    done = run("run_vlm_training.sh", *flags, "--output-dir", tmp_path / "two", VLM_PROCESSES=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("aligning the connector with the names") == 1, "only one of them speaks"
    assert train(*flags, "--batch-size", 4, "--output-dir", tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["settings"]["batch_size"] == 2, "found by each, and agreed upon"
    assert one["alignment"]["validation_accuracy"] == two["alignment"]["validation_accuracy"]
    losses = [[entry["loss"] for entry in each["history"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_without_the_flag_nothing_is_aligned(halves, color_folder, tmp_path, capsys):
    found = fit(settings(halves, color_folder, tmp_path / "out", align_connector=False))
    assert "alignment" not in found and "aligning" not in capsys.readouterr().err


def test_the_connector_learns_the_same_if_few_features_are_kept_or_none(halves, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(alignment, "STEPS", 3)
    train, weights, limit = split(8), [], 1.0
    for share in (1, 0.5, 0):
        family = load(halves, tune="connector").family
        cache = fill_cache(family, [train], limit_gb=limit * share)
        assert share == (0 if cache is None else sum(map(cache.use, train.keys)) / len(train))
        if share == 1:
            limit = sum(nbytes(cache.entry(key)) for key in train.keys) / 1e9
        align(family, CLASSES, train, cache)
        weights.append(family.connector.state_dict())
        shutil.rmtree(cache_root())
    for others in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"freeze_connector": True}, {"tune": "full", "align_connector": False}])
def test_nothing_of_the_trained_model_is_left_while_the_best_one_is_tested(
    halves, color_folder, tmp_path, monkeypatch, more
):
    monkeypatch.setattr(alignment, "STEPS", 30)
    kept, loading = [], results.load_model_and_metadata

    def load_best(*args, **options):
        gc.collect()
        assert kept and all(weight() is None for weight in kept)
        return loading(*args, **options)

    def finish(run, *rest):
        kept.extend(weakref.ref(weight) for weight in run.learned.values())
        return results.finish(run, *rest)

    monkeypatch.setattr(results, "load_model_and_metadata", load_best)
    monkeypatch.setattr(running, "finish", finish)
    fit(settings(halves, color_folder, tmp_path / "out", **more))

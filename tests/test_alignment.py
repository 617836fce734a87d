"""A connector that was never trained is known by its weights, and learns the names of the classes before the
training."""

import gc
import json
import weakref

import pytest
import torch
from commands import run, train
from feature_checks import load
from halves import CLASSES, connector_of, resumed, settings, split, stand_out
from safetensors.torch import load_file
from torch import nn

from vlm.common.errors import Stopped
from vlm.config.settings import Settings
from vlm.families.features import fill_cache
from vlm.training import loop as training
from vlm.training.alignment import align, is_random, nearest_name_accuracy, needs_alignment
from vlm.training.loop import alignment, fit, results, setup

SETTINGS = Settings(epochs=1)


@pytest.mark.parametrize("shape", [(64, 64), (600, 400), (64, 3000), (80, 3, 8, 8)])
@pytest.mark.parametrize("draw", [nn.init.normal_, nn.init.uniform_, nn.init.xavier_uniform_, nn.init.orthogonal_])
def test_weights_as_they_were_drawn_are_told_from_trained_ones(shape, draw):
    torch.manual_seed(0)
    part = nn.Module()
    part.weight = nn.Parameter(draw(torch.empty(shape), *((-1, 1) if draw is nn.init.uniform_ else ())))
    part.bias = nn.Parameter(torch.randn(shape[0]))
    assert is_random(part)
    with torch.no_grad():  # a direction with 30% more than the largest of a random matrix
        matrix = part.weight.flatten(1)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        edge = matrix.square().mean().sqrt() * (matrix.shape[0] ** 0.5 + matrix.shape[1] ** 0.5)
        matrix += (1.3 * edge - values[0]).clamp_min(0) * torch.outer(left[:, 0], right[0])
    assert not is_random(part)


def test_small_matrices_say_nothing_and_count_as_trained():
    assert not is_random(nn.Linear(16, 63)) and not is_random(nn.LayerNorm(100)) and not is_random(nn.Identity())


def test_one_trained_matrix_is_enough():
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(80, 80), nn.GELU(), nn.Linear(80, 80))
    assert is_random(part)
    stand_out(part[2].weight)
    assert not is_random(part)


def test_images_come_to_lie_next_to_the_names_of_their_classes(halves, monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path))
    names, train, validation = CLASSES, split(8), split(6, start=100)
    found = []
    for _ in range(2):
        family = load(halves, tune="connector").family
        assert needs_alignment(family, SETTINGS)
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


def test_a_model_of_random_words_has_nothing_to_learn_from(halves):
    family = load(halves).family
    with torch.no_grad():
        family.model.get_input_embeddings().weight.normal_()
    assert not needs_alignment(family, SETTINGS)


@pytest.mark.parametrize("more", [{}, {"freeze_connector": True}])
def test_a_run_aligns_once_says_so_and_resumes_to_the_same_weights(
    halves, color_folder, tmp_path, monkeypatch, capsys, more
):
    monkeypatch.setattr(alignment, "STEPS", 30)
    found = fit(settings(halves, color_folder, tmp_path / "whole", **more))
    assert "the connector was never trained" in capsys.readouterr().err
    assert found["alignment"]["folds"] == (5 if more else 0)
    assert 0 <= found["alignment"]["validation_accuracy"] <= 1
    with pytest.raises(Stopped):
        fit(settings(halves, color_folder, tmp_path / "parts", **more), lambda: True)
    capsys.readouterr()
    again = fit(resumed(tmp_path / "parts"))
    assert "learns the names" not in capsys.readouterr().err
    assert again["alignment"]["validation_accuracy"] == found["alignment"]["validation_accuracy"]
    whole, parts = (load_file(tmp_path / name / "final_model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    connector = connector_of(halves), connector_of(tmp_path / "whole" / "final_model")
    assert not any(torch.equal(a, b) for a, b in zip(*connector, strict=True) if a.ndim > 1)


def test_a_frozen_connector_stays_as_it_was_aligned(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        fit(settings(halves, color_folder, tmp_path / name, freeze_connector=True, learning_rate=rate))
    slow, fast = (connector_of(tmp_path / name / "final_model") for name in ("slow", "fast"))
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))


def test_one_that_is_not_frozen_goes_on_learning(halves, color_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "STEPS", 30)
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        fit(settings(halves, color_folder, tmp_path / name, connector_learning_rate=rate))
    slow, fast = (connector_of(tmp_path / name / "final_model") for name in ("slow", "fast"))
    assert not any(torch.equal(a, b) for a, b in zip(slow, fast, strict=True) if a.ndim > 1)


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
    ]
    done = run("run_vlm_training.sh", *flags, "--output-dir", tmp_path / "two", VLM_PROCESSES=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("it learns the names") == 1, "only one of them speaks"
    assert train(*flags, "--batch-size", 4, "--output-dir", tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["settings"]["batch_size"] == 2, "found by each, and agreed upon"
    assert one["alignment"]["validation_accuracy"] == two["alignment"]["validation_accuracy"]
    losses = [[entry["loss"] for entry in each["history"]] for each in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"no_alignment": True}, None),
        ({"tune": "full"}, None),
        ({"epochs": 0}, None),
        ({"freeze_connector": True, "no_feature_cache": True}, "--freeze-connector leaves it so"),
        ({"no_feature_cache": True}, "if vision features were kept"),
    ],
)
def test_a_run_that_cannot_or_should_not_align_does_not(halves, color_folder, tmp_path, capsys, more, said):
    found = fit(settings(halves, color_folder, tmp_path / "out", **more))
    error = capsys.readouterr().err
    assert "alignment" not in found and "learns the names" not in error
    assert said in error if said else "never trained" not in error


def test_all_processes_align_or_none_does(halves, color_folder, tmp_path, monkeypatch, capsys):
    """One whose machine cannot keep features would leave the others waiting."""
    monkeypatch.setattr(setup, "least", lambda accelerator, number: 0)
    run = setup.set_up(settings(halves, color_folder, tmp_path / "out", batch_size=4))
    assert run.classifier.feature_cache is not None and not run.aligns
    assert "if vision features were kept" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"freeze_connector": True}, {"tune": "full"}])
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
    monkeypatch.setattr(training, "finish", finish)
    fit(settings(halves, color_folder, tmp_path / "out", **more))

"""The step and the schedule: what the gradient of a step is, however it is cut."""

import re
import time

import pytest
import torch
from tiny import NAMES, random_image, save_tiny_model

from vlm.config import resolve
from vlm.evaluation.evaluate import score_split
from vlm.training.loop import Trainer
from vlm.training.schedule import learning_rate_at, step_seed
from vlm.training.setup import set_up


def image_folder(folder, names, each):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            random_image(100 * label + i).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return save_tiny_model(folder / "model"), image_folder(folder / "images", NAMES, each=4)


def gradients_of_first_step(sources, output, **more):
    """Gradients of the first optimizer step, in float64, without clipping."""
    model, images = sources
    flags = {
        "model": str(model),
        "dataset": str(images),
        "tune": "full",
        "max_grad_norm": 0.0,
        "output_dir": str(output),
    }
    run = set_up(resolve(flags | more))
    run.classifier.double()
    trainer = Trainer(run, lambda: False)
    caught = {}

    def catch():
        caught.update({name: p.grad.clone() for name, p in run.classifier.named_parameters() if p.grad is not None})

    run.optimizer.step = catch
    plan = trainer.plan(0)
    loss = trainer.run_step(plan[0], trainer.batches(plan[:1])).sum()
    lengths = {trainer.response_lengths[i] for i in plan[0].indices}
    assert len(lengths) > 1, "responses of unequal length, or a mean over batches would pass"
    return loss, caught


def test_accumulated_gradient_equals_that_of_one_large_batch(sources, tmp_path):
    loss, whole = gradients_of_first_step(sources, tmp_path / "a", batch_size=7, gradient_accumulation_steps=1)
    for batch_size, accumulation in ((1, 7), (4, 2)):
        flags = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        if batch_size * accumulation != 7:
            loss, whole = gradients_of_first_step(sources, tmp_path / "b", batch_size=8, gradient_accumulation_steps=1)
        other_loss, parts = gradients_of_first_step(sources, tmp_path / f"c{batch_size}", **flags)
        torch.testing.assert_close(other_loss, loss, rtol=1e-9, atol=0)
        assert parts.keys() == whole.keys()
        largest = max(gradient.norm() for gradient in whole.values())
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), 1e-6 * largest), name


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate_at(step, 100, 0.1, 2.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(1.0) and 0 < rates[-1] < 1e-2
    assert learning_rate_at(0, 1, 0.0, 2.0) == 2.0


def test_every_step_and_process_has_a_seed_of_its_own():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(2)}
    assert len(seeds) == 300
    assert step_seed(1, 2, 3) == step_seed(1, 2, 3)


def test_the_bar_counts_the_time_of_the_training_alone(sources, tmp_path, monkeypatch, capsys):
    """As `train_seconds` does: not the test before the training, and not the evaluations."""
    model, images = sources
    away = []

    def slow(*arguments, **options):
        away.append(10_000)
        return score_split(*arguments, **options)

    monkeypatch.setattr("vlm.training.validation.score_split", slow)
    monkeypatch.setattr("vlm.common.progress.monotonic", lambda: time.monotonic() + sum(away))
    monkeypatch.setattr("vlm.common.progress.SECONDS_WORTH_A_LAST_LINE", 0.0)
    flags = {"model": str(model), "dataset": str(images), "epochs": 2, "zero_shot": True, "output_dir": str(tmp_path)}
    Trainer(set_up(resolve(flags)), lambda: False).train()
    assert len(away) == 3
    (last,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("training: ") and "took" in line
    ]
    assert re.search(r"took 00:\d\d", last), last

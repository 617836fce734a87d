"""Augmented views: what they look like, which one an epoch sees, their features, and a resumed run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import train
from PIL import Image
from safetensors.torch import load_file

from vlm.common import Stopped
from vlm.config import read_settings, resolve
from vlm.data import Rows, Split, as_seen
from vlm.data.augmentation import STRENGTHS, Augmentation
from vlm.training.loop import Trainer
from vlm.training.running import fit
from vlm.training.setup import set_up

TURNED_BY_QUARTERS = [Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]


def gradient(width=48, height=48):
    """An image whose pixels are all different: red to the right, green downwards."""
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], -1)
    return Image.fromarray(values.astype(np.uint8))


def a_split(count=6, size=48):
    images = [gradient(size, size).rotate(7 * i) for i in range(count)]
    return Split(Rows(images, [0] * count, [str(i) for i in range(count)]), range(count), [0] * count)


def settings(**given):
    return resolve({"model": "m", "dataset": "d", **given})


def pixels(image):
    return np.asarray(image).astype(int)


def drawn(how, image, count=60):
    return [how.draw(image, position, 1) for position in range(count)]


@pytest.mark.parametrize("strength", ["light", "strong"])
@pytest.mark.parametrize("size", [(48, 48), (61, 20), (1, 9), (1, 1)])
def test_a_view_has_the_size_of_its_image(strength, size):
    how = Augmentation(strength, flips=True, turns=True, views=4, seed=1)
    for view in drawn(how, gradient(*size), 20):
        assert (view.size, view.mode) == (size, "RGB")


def test_view_zero_is_the_image_itself():
    how, image = Augmentation("strong", True, True, 4, 1), gradient()
    assert how.draw(image, 3, 0) is image
    assert how.key("abc", 3, 0) == "abc"


def test_without_flags_of_its_own_no_view_is_mirrored_or_turned():
    # red grows to the right and green downwards: both stay so under crops, colors and turns of up to 10 degrees
    for view in drawn(Augmentation("strong", False, False, 4, 1), gradient()):
        values = pixels(view)
        assert values[:, -8:, 0].mean() > values[:, :8, 0].mean()
        assert values[-8:, :, 1].mean() > values[:8, :, 1].mean()


def test_flips_mirror_about_half_of_the_views():
    image = gradient()
    views = drawn(Augmentation("none", True, False, 4, 1), image, 200)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert all(view in (image, mirrored) for view in views)
    assert 70 < sum(view == mirrored for view in views) < 130


def test_turns_are_by_quarters_and_lose_nothing():
    image = gradient()
    views = drawn(Augmentation("none", False, True, 4, 1), image, 200)
    possible = [image, *map(image.transpose, TURNED_BY_QUARTERS)]
    assert sorted({possible.index(view) for view in views}) == [0, 1, 2, 3]


def test_an_image_that_is_not_square_is_turned_upside_down_only():
    image = gradient(40, 20)
    views = drawn(Augmentation("none", False, True, 4, 1), image)
    upside_down = image.transpose(Image.Transpose.ROTATE_180)
    assert upside_down in views
    assert all(view in (image, upside_down) for view in views)


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_a_crop_is_no_smaller_than_it_may_be(strength):
    # Without colors, the range of red in a view is the share of the width that it shows.
    how = STRENGTHS[strength]
    least = np.sqrt(how.smallest_crop / how.widest)
    crops_only = Augmentation("crops", False, False, 4, 1)
    STRENGTHS["crops"] = how._replace(colors=0.0, turn=0.0, blur=0.0)
    try:
        shown = [np.ptp(pixels(view)[:, :, 0]) / 250 for view in drawn(crops_only, gradient(250, 250), 100)]
    finally:
        del STRENGTHS["crops"]
    assert least - 0.03 < min(shown) < least + 0.15
    assert max(shown) > 0.95


def test_a_turned_view_has_no_empty_corners():
    white = Image.new("RGB", (60, 30), "white")
    STRENGTHS["turned"] = STRENGTHS["strong"]._replace(smallest_crop=1.0, colors=0.0, blur=0.0)
    try:
        views = drawn(Augmentation("turned", False, False, 4, 1), white)
    finally:
        del STRENGTHS["turned"]
    assert all(pixels(view).min() > 250 for view in views)


def test_a_view_depends_on_seed_position_and_number_only():
    image, how = gradient(), Augmentation("strong", True, True, 4, 1)
    once = how.draw(image, 5, 2)
    assert pixels(how.draw(image, 5, 2)).tolist() == pixels(once).tolist()
    for other in (how.draw(image, 5, 3), how.draw(image, 6, 2), replace(how, seed=2).draw(image, 5, 2)):
        assert pixels(other).tolist() != pixels(once).tolist()


def test_each_image_shows_all_its_views_in_turn():
    how = Augmentation("light", False, False, 4, 1)
    for position in range(5):
        assert sorted(how.view_of(epoch, position) for epoch in range(4)) == [0, 1, 2, 3]
    assert sorted(how.view_of(0, position) for position in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_nothing_is_augmented_unless_it_is_asked_for():
    split = a_split()
    assert as_seen(split, settings(), 3) is split


@pytest.mark.parametrize(
    ("given", "views"),
    [
        ({}, 1),
        ({"augment": "light"}, 4),
        ({"augment_flips": True, "epochs": 30}, 4),
        ({"augment": "light", "augment_views": 7}, 7),
        ({"augment": "light", "tune": "full", "epochs": 9}, 9),
    ],
)
def test_how_many_views(given, views):
    assert settings(**given).views == views


def test_an_epoch_sees_the_views_and_knows_their_keys():
    split = a_split()
    known = [split[i].key for i in range(len(split))]
    split.keys = list(known)
    seen = as_seen(split, settings(augment="light", epochs=8), 1)
    how = Augmentation("light", False, False, 4, 42)
    for i in range(len(split)):
        view = how.view_of(1, i)
        assert pixels(seen[i].image).tolist() == pixels(how.draw(split[i].image, i, view)).tolist()
        assert seen[i].key == how.key(known[i], i, view)
        assert (seen[i].label, seen[i].name) == (split[i].label, split[i].name)
    assert len({seen[i].key for i in range(len(split))}) == len(split)
    assert split.keys == known


def test_the_same_view_has_the_same_key_however_many_there_are():
    few, many = (Augmentation("light", False, False, views, 42) for views in (2, 9))
    assert few.key("abc", 3, 1) == many.key("abc", 3, 1) != many.key("abc", 3, 2)


def test_views_alone_are_refused(capsys):
    assert train("--model", "m", "--dataset", "d", "--augment-views", 3) == 2
    assert "add --augment light, --augment-flips or --augment-turns" in capsys.readouterr().err


def fitted(model, folder, output, should_stop=lambda: False, **more):
    given = {"model": str(model), "dataset": str(folder), "output_dir": str(output), "batch_size": 4, "epochs": 3}
    given |= {"augment": "strong", "augment_turns": True, "augment_views": 2, "device": "cpu", "seed": 3}
    fit(resolve(given | more), should_stop)
    return load_file(output / "final_model" / "model.safetensors")


def test_views_reach_the_model_and_a_resumed_run_sees_the_same_ones(tiny_model, color_folder, tmp_path):
    unbroken = fitted(tiny_model, color_folder, tmp_path / "unbroken")
    plain = fitted(tiny_model, color_folder, tmp_path / "plain", augment="none", augment_turns=False, augment_views=1)
    assert any(not torch.equal(unbroken[name], plain[name]) for name in plain)

    answers = iter([False] * 5 + [True])  # in the second of three epochs
    with pytest.raises(Stopped):
        fitted(tiny_model, color_folder, tmp_path / "stopped", lambda: next(answers))
    saved = read_settings(json.loads((tmp_path / "stopped" / "training_metadata.json").read_text())["settings"])
    fit(resolve({"resume": True, "output_dir": str(tmp_path / "stopped")}, saved))
    resumed = load_file(tmp_path / "stopped" / "final_model" / "model.safetensors")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_features_of_views_are_those_that_the_model_would_compute(tiny_model, color_folder, tmp_path):
    cached = fitted(tiny_model, color_folder, tmp_path / "cached")
    computed = fitted(tiny_model, color_folder, tmp_path / "computed", no_feature_cache=True)
    for name in cached:
        torch.testing.assert_close(cached[name], computed[name], rtol=1e-4, atol=1e-6)


def test_no_image_is_opened_once_the_features_of_all_views_are_there(tiny_model, color_folder, tmp_path, monkeypatch):
    given = {"model": str(tiny_model), "dataset": str(color_folder), "output_dir": str(tmp_path), "epochs": 3}
    run = set_up(resolve(given | {"augment": "light", "augment_views": 3, "batch_size": 4, "device": "cpu"}))
    trainer = Trainer(run)

    def refuse(*_):
        raise AssertionError("an image was opened")

    monkeypatch.setattr("vlm.data.splits.open_image", refuse)
    for epoch in range(3):
        assert sum(map(len, trainer.batches(trainer.plan(epoch), epoch))) == len(run.data.train)

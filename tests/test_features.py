"""The cache of vision features: the same numbers as from pixels, in every family, without opening an image."""

import pickle
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_family_generic
import torch
from feature_checks import LABELS, MODELS, classifier_of, load, split
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import save_classifier
from torch.utils.data import DataLoader

from vlm.data import Split
from vlm.evaluation.evaluate import score_split
from vlm.families import CONNECTED_FEATURES, ENCODER_FEATURES, cache_root, encode, fill_cache, open_cache
from vlm.families.encoded import UNCACHED
from vlm.families.features import cache as cache_file
from vlm.families.features import room, shards
from vlm.families.features.cache import nbytes
from vlm.families.features.fingerprint import fingerprint


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    return cache_root()


def measure(classifier, samples, cache=None):
    """Loss, gradients and scores."""
    output = classifier.train()(classifier.collate(True, cache)(samples))
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}
    classifier.zero_grad()
    classifier.eval()
    reading = classifier.read(classifier.collate(False, cache)(samples))
    return output.loss.detach(), gradients, classifier.score(reading)


def assert_equal(measured, expected, tolerance=1e-6):
    """Relative to the size of each loss, gradient and vector of scores."""
    loss, gradients, scores = measured
    assert gradients.keys() == expected[1].keys()
    largest = max(float(gradient.norm()) for gradient in expected[1].values())
    pairs = [("loss", loss, expected[0]), ("scores", scores, expected[2])] + [
        (n, g, expected[1][n]) for n, g in gradients.items()
    ]
    for name, tensor, other in pairs:
        # A gradient that is zero but for rounding (a bias in front of a softmax) is compared with a share of the
        # largest one.
        assert (tensor - other).norm() <= tolerance * max(float(other.norm()), 1e-6 * largest), name


def opens_no_image(monkeypatch):
    def refuse(*_):
        raise AssertionError("an image is opened")

    monkeypatch.setattr("vlm.data.splits.open_image", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"tune": "connector"}, {"tune": "lora", "freeze_connector": True, "lora_dropout": 0.0}]
)
@pytest.mark.parametrize("name", MODELS)
def test_cached_features_give_the_same_loss_gradients_and_scores_as_pixels(name, settings, tmp_path, root, monkeypatch):
    """Before a connector that is trained, and behind one that is frozen."""
    classifier = classifier_of(name, tmp_path / "model", dtype=torch.float64, **settings)
    images = split()
    expected = measure(classifier, [images[i] for i in range(4)])
    frozen = "freeze_connector" in settings
    assert not frozen or all(".lora_" in key for key in expected[1]), "nothing but LoRA is trained"
    cache = fill_cache(classifier.family, [images], limit_gb=1)
    (shard,) = root.glob("*/*.safetensors")
    assert len(load_file(shard)["keys"]) == 3, "the image that is there twice is computed once"
    opens_no_image(monkeypatch)
    classifier.family.vision_features = None  # it must not be needed any more
    samples = [images[i] for i in range(4)]
    batch = classifier.collate(True, cache)(samples)
    assert not any("pixel" in key for key in batch.pixels)
    assert (CONNECTED_FEATURES if frozen else ENCODER_FEATURES) in batch.pixels
    assert_equal(measure(classifier, samples, cache), expected)


@pytest.mark.parametrize("name", MODELS)
def test_features_computed_in_a_batch_are_those_of_one_image_after_the_other(name, tmp_path):
    classifier = classifier_of(name, tmp_path / "model")
    family, images = classifier.family.model.eval() and classifier.family, split()
    encoded = [family.encode_images([images[i].image]) for i in range(3)]
    with torch.no_grad():
        for connected in (False, True):
            together = family.features_of_each(encoded, connected)
            for one, features_of_one in zip(encoded, together, strict=True):
                alone = family.features_of_each([one], connected)[0]
                assert alone.shape == features_of_one.shape
                assert (alone - features_of_one).norm() <= 1e-6 * alone.norm(), float(
                    (alone - features_of_one).norm() / alone.norm()
                )
    counts = [len(one.inputs["pixel_values"]) for one in encoded]
    several = name not in ("idefics3", "llava")
    assert (len(set(counts)) > 1) == several, f"unequal rows of pixels are tested: {counts}"


def test_batches_are_bounded_and_nothing_is_computed_twice(tmp_path, monkeypatch):
    classifier = classifier_of("qwen2_vl", tmp_path / "model")
    sizes = []
    whole = classifier.family.features_of_each
    classifier.family.features_of_each = lambda images, connected: sizes.append(len(images)) or whole(images, connected)
    monkeypatch.setattr("vlm.families.features.filling.IMAGES_AT_ONCE", 2)
    fill_cache(classifier.family, [split(), split()], limit_gb=1)
    assert sizes == [2, 1], "three different images in two splits of four"
    fill_cache(classifier.family, [split()], limit_gb=1)
    assert sizes == [2, 1], "a second run computes nothing"
    monkeypatch.setattr("vlm.families.features.filling.VALUES_AT_ONCE", 1)
    for file in cache_root().glob("*/*"):
        file.unlink()
    fill_cache(classifier.family, [split()], limit_gb=1)
    assert sizes == [2, 1, 1, 1, 1], "an image that is too large is computed alone"


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_open_no_image(workers, tmp_path, monkeypatch):
    classifier = classifier_of("idefics3", tmp_path / "model").eval()
    images = split()
    expected = score_split(classifier, images, batch_size=2)
    cache = fill_cache(classifier.family, [images], limit_gb=1, workers=workers)
    opens_no_image(monkeypatch)
    torch.testing.assert_close(
        score_split(classifier, images, batch_size=2, workers=workers, cache=cache), expected, rtol=1e-6, atol=1e-4
    )
    again, collate = pickle.loads(pickle.dumps((images, classifier.collate(True, cache))))
    batch = next(iter(DataLoader(again, 4, collate_fn=collate)))
    assert ENCODER_FEATURES in batch.pixels and batch.labels.tolist() == LABELS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("connected", [False, True])
def test_what_does_not_fit_is_computed_each_time(name, connected, tmp_path, monkeypatch, capsys):
    """A batch of features and pixels gives the loss, gradients and scores of pixels."""
    settings = {"tune": "lora", "freeze_connector": True, "lora_dropout": 0.0} if connected else {"tune": "connector"}
    classifier = classifier_of(name, tmp_path / "model", dtype=torch.float64, **settings)
    images = split()
    expected = measure(classifier, [images[i] for i in range(4)])
    whole = fill_cache(classifier.family, [images], limit_gb=1)
    size = sum(nbytes(whole.entry(key)) for key in set(images.keys))
    largest = max(nbytes(whole.entry(key)) for key in images.keys)
    shutil.rmtree(whole.folder)
    cache = fill_cache(classifier.family, [images], limit_gb=(size - 0.5 * largest) / 1e9)
    kept = [cache.use(key) for key in images.keys]
    assert 0 < sum(kept) < 4 and "computed each time" in capsys.readouterr().err
    samples = [images[i] for i in range(4)]
    batch = classifier.collate(True, cache)(samples)
    assert {cache.name, UNCACHED + "pixel_values"} <= batch.pixels.keys()
    read_twice = classifier.family.with_features(batch.pixels)
    assert CONNECTED_FEATURES in read_twice and not any("pixel" in each for each in read_twice)
    assert_equal(measure(classifier, samples, cache), expected)


def test_the_message_says_how_much_fits_and_what_would_hold_all(tmp_path, monkeypatch, capsys):
    classifier = classifier_of("idefics3", tmp_path / "model")
    each = nbytes(fill_cache(classifier.family, [split()], limit_gb=1).entry(split()[0].key))
    shutil.rmtree(cache_root())
    said = [f"vision features to compute: 3 images, {3 * each / 1e3:.1f} kB."]
    assert capsys.readouterr().err.splitlines()[-1:] == said
    limit = 2.5 * each / 1e9
    cache = fill_cache(classifier.family, [split()], limit_gb=limit)
    assert sum(cache.use(split()[i].key) for i in range(3)) == 2
    assert capsys.readouterr().err.splitlines() == [
        *said,
        f"2 of them fit into --cache-size {limit:g}; the others are computed each time. --cache-size 1 has room for "
        "all. What makes them smaller: --cache-dtype float16, a smaller --image-size, --freeze-connector.",
    ]


def test_filling_the_cache_keeps_no_image_in_memory(tmp_path, monkeypatch):
    classifier = classifier_of("idefics3", tmp_path / "model")
    made, alive = [], []
    get, encode = Split.__getitem__, type(classifier.family).encode_images

    def sample_at(self, i):
        sample = get(self, i)
        made.append(weakref.ref(sample))
        return sample

    def count(self, images):
        alive.append(sum(sample() is not None and "image" in vars(sample()) for sample in made))
        return encode(self, images)

    monkeypatch.setattr(Split, "__getitem__", sample_at)
    monkeypatch.setattr(type(classifier.family), "encode_images", count)
    fill_cache(classifier.family, [split()], limit_gb=1)
    assert len(alive) == 3 and max(alive) <= 2


@pytest.mark.parametrize(
    "error",
    [SafetensorError("I/O error: No space left on device (os error 28)"), OSError(28, "No space left on device")],
)
def test_a_full_disk_is_no_end_of_the_run(tmp_path, monkeypatch, capsys, error):
    classifier = classifier_of("idefics3", tmp_path / "model")

    def fail(*_):
        raise error

    save, written = shards.save_file, []

    def save_first(*arguments):
        if written:
            raise error
        written.append(save(*arguments))

    monkeypatch.setattr(shards, "save_file", save_first)
    monkeypatch.setattr(cache_file, "SHARD_IMAGES", 1)
    images = split()
    cache = fill_cache(classifier.family, [images], limit_gb=1)
    assert [cache.use(key) for key in images.keys] == [True, False, False, True]
    err = capsys.readouterr().err
    assert err.count("cannot be kept") == 1
    assert err.endswith("(no space left on device): others are computed each time.\n")
    monkeypatch.setattr(shards, "save_file", fail)
    shutil.rmtree(cache.folder)
    assert fill_cache(classifier.family, [images], limit_gb=1) is None


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    classifier = classifier_of("idefics3", tmp_path / "model")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(total=1e12, used=994e9, free=6e9))
    assert fill_cache(classifier.family, [split()], limit_gb=1) is None
    assert f"0 of them fit on the disk, which has 6.0 GB free ({cache_root()})" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux shows what is mapped")
def test_a_file_is_mapped_into_memory_and_not_copied(tmp_path):
    classifier = classifier_of("idefics3", tmp_path / "model")
    cache = fill_cache(classifier.family, [split()], limit_gb=1)
    entry = cache.entry(split()[0].key)
    (file,) = cache.folder.iterdir()
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if file.name in line)
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    assert all(first <= tensor.data_ptr() < last for tensor in entry.values())


# Number formats


def test_float16_halves_the_features_and_stays_within_its_tolerance(tmp_path):
    classifier = classifier_of("idefics3", tmp_path / "model")
    images = split()
    loss, _, scores = measure(classifier, [images[i] for i in range(4)])
    whole, halved = (
        fill_cache(classifier.family, [images], limit_gb=1, cache_dtype=dtype) for dtype in ("float32", "float16")
    )
    assert whole.folder != halved.folder
    samples = [images[i] for i in range(4)]
    exact, rounded = (encode(samples, classifier.family, each).inputs[ENCODER_FEATURES] for each in (whole, halved))
    assert exact.dtype == rounded.dtype == torch.float32
    assert 0 < ((rounded - exact).abs() / (exact.abs() + 1e-4)).max() <= 2**-11
    files = (load_file(next(cache.folder.iterdir())) for cache in (whole, halved))
    size, half = (file[shards.VALUES + ENCODER_FEATURES].nbytes for file in files)
    assert half == size / 2
    other_loss, _, other_scores = measure(classifier, [images[i] for i in range(4)], halved)
    assert abs(other_loss - loss) < 1e-3 * loss
    torch.testing.assert_close(other_scores, scores, rtol=1e-3, atol=0)


def test_a_feature_that_float16_cannot_hold_is_kept_in_float32(tmp_path):
    classifier = classifier_of("idefics3", tmp_path / "model")
    whole = classifier.family.vision_features
    classifier.family.vision_features = lambda inputs: whole(inputs) * 1e6
    images = split()
    cache = fill_cache(classifier.family, [images], limit_gb=1, cache_dtype="float16")
    expected = classifier.family.features_of_each([classifier.family.encode_images([images[1].image])], False)[0]
    assert expected.abs().max() > 65504
    torch.testing.assert_close(cache.entry(images[1].key)[ENCODER_FEATURES], expected)
    assert cache.entry(images[1].key)[ENCODER_FEATURES].dtype == torch.float32


def test_a_model_in_bfloat16_keeps_its_features_as_they_are(tmp_path):
    MODELS["idefics3"][0](tmp_path / "model")
    classifier = load(tmp_path / "model", dtype=torch.bfloat16)
    cache = fill_cache(classifier.family, [split()], limit_gb=1, cache_dtype="float16")
    assert cache.entry(split()[0].key)[ENCODER_FEATURES].dtype == torch.bfloat16


# What features belong to


def test_other_weights_or_image_processing_have_features_of_their_own(tmp_path):
    classifier = classifier_of("idefics3", tmp_path / "model")
    family = classifier.family
    seen = {fingerprint(family, connected, halved) for connected in (False, True) for halved in (False, True)}
    before = fingerprint(family, False, False)
    with torch.no_grad():
        next(family.connector.parameters()).add_(1e-3)
    assert fingerprint(family, False, False) == before, "the connector does not matter before it"
    seen.add(fingerprint(family, True, False))
    with torch.no_grad():
        next(family.vision.parameters()).add_(1e-3)
    seen.add(fingerprint(family, False, False))
    family.processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    seen.add(fingerprint(family, False, False))
    seen.add(fingerprint(load(tmp_path / "model", {}, torch.bfloat16).family, False, False))
    assert len(seen) == 8


def test_another_layer_of_the_encoder_has_features_of_its_own(tmp_path):
    classifier = classifier_of("llava", tmp_path / "model")
    before = fingerprint(classifier.family, False, False)
    classifier.family.model.config.vision_feature_layer = -1
    assert fingerprint(classifier.family, False, False) != before


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_was_saved_after_training_uses_the_features_of_its_training(name, tmp_path):
    classifier = classifier_of(name, tmp_path / "model", tune="lora", freeze_connector=True)
    caches = [open_cache(classifier.family, connected, "float32", 1) for connected in (False, True)]
    save_classifier(tmp_path / "saved", classifier, {}, torch.float32)
    again = load(tmp_path / "saved", None).family
    assert all(cache.fits(again) for cache in caches)
    save_classifier(tmp_path / "rounded", classifier, {}, torch.bfloat16)
    assert not any(cache.fits(load(tmp_path / "rounded", None).family) for cache in caches), (
        "rounded weights have others"
    )


@pytest.mark.parametrize("difference, cached", [(1e-7, True), (1e-2, False)])
def test_a_connector_that_adds_in_another_order_is_cached_and_one_that_takes_more_is_not(tmp_path, difference, cached):
    family = classifier_of("llava", tmp_path / "model").family
    connect = family.connect
    family.connect = lambda hidden, inputs: connect(hidden, inputs) * (1 + difference)
    vars(family).pop("can_cache", None)
    assert family.can_cache == cached


def test_a_trained_encoder_and_one_that_packs_its_features_are_not_cached(tmp_path):
    classifier = classifier_of("idefics3", tmp_path / "model")
    classifier.family.vision.requires_grad_(True)
    assert fill_cache(classifier.family, [split()], limit_gb=1) is None
    test_family_generic.TestLlavaOnevision().build(tmp_path / "packing")
    assert fill_cache(load(tmp_path / "packing").family, [split()], limit_gb=1) is None

"""The head: vectors of each image, how it is fitted, how its evidence counts, and that the model folder keeps it."""

import json
import shutil

import numpy as np
import pytest
import test_family_generic
import torch
from feature_checks import MODELS, classifier_of, split
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits
from tiny import batch_of, random_image, tiny_classifier, tiny_prompts

from vlm.classifier import Calibration, Head, classify, explain, features, read_head
from vlm.common import UsageError
from vlm.data import Rows, Sample, Split
from vlm.evaluation import head_fit
from vlm.evaluation.evaluate import Parts, score_parts
from vlm.evaluation.evidence import evidence_figures, paired_difference
from vlm.evaluation.fit_calibration import fit_evidence, fit_temperature
from vlm.evaluation.head_fit import FIRST_STRENGTH, STRENGTHS, fit_head, image_vectors, vectors_of_split
from vlm.evaluation.score_choice import choose_score
from vlm.families import STATISTICS, Listening, fill_cache, load_family
from vlm.families.pooling import special_tokens, vision_blocks
from vlm.inference import load_model_and_metadata, predict_batch, predict_single_image

GENERIC = {
    "llava_onevision": test_family_generic.TestLlavaOnevision,
    "gemma3": test_family_generic.TestGemma3,
    "paligemma": test_family_generic.TestPaliGemma,
}
BUILDERS = MODELS | {
    name: (lambda folder, checks=checks: checks().build(folder), {}) for name, checks in GENERIC.items()
}
SIZES = ((40, 28), (20, 60), (40, 28), (90, 30))
CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # vectors are rounded to float16


def family_of(name, folder):
    build, options = BUILDERS[name]
    build(folder)
    family = load_family(folder, torch.float32, torch.device("cpu"), options)
    family.model.eval()
    family.render(tiny_prompts())
    return family


def slow_vectors(family, image):
    """(L, S, W) of one image by itself: all of its patches, one after the other, in float64."""
    heard, hooks = {}, []
    for i, block in enumerate(vision_blocks(family)):

        def hear(_, __, output, i=i):
            heard.setdefault(i, []).append(output[0] if type(output) is tuple else output)

        hooks.append(block.register_forward_hook(hear))
    with torch.no_grad():
        family.vision_features(family.encode_images([image]).inputs)
    for hook in hooks:
        hook.remove()
    special, layers = special_tokens(family.vision), []
    for i in range(len(heard)):
        rows = [row for part in heard[i] for row in (part if part.dim() == 3 else part[None])]
        patches = np.concatenate([row[special:].double().numpy() for row in rows])
        statistics = [patches.sum(0) / len(patches), np.sqrt(((patches - patches.mean(0)) ** 2).sum(0) / len(patches))]
        if special:
            statistics.append(np.mean([row[0].double().numpy() for row in rows], axis=0))
        layers.append(np.stack(statistics))
    return np.stack(layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_vectors_are_those_of_each_image_alone(name, tmp_path):
    family = family_of(name, tmp_path)
    images = [random_image(i, *size) for i, size in enumerate(SIZES)]
    expected = np.stack([slow_vectors(family, image) for image in images])
    assert np.abs(expected - expected[0]).reshape(len(images), -1).max(1)[1:].min() > 1e-3, "the images should differ"
    samples = [Sample(image, 0, "an image") for image in images]
    np.testing.assert_allclose(image_vectors(family, samples), expected, **CLOSE)
    np.testing.assert_allclose(image_vectors(family, samples[::2], None, 0), expected[::2, 0], **CLOSE)


def random_head(classifier, vectors, seed=0):
    """A head that reads the last block."""
    rng = np.random.default_rng(seed)
    statistics = STATISTICS[: vectors.shape[2]]
    weight = torch.from_numpy(rng.normal(0, 1, (len(classifier.class_names), vectors.shape[2] * vectors.shape[3])))
    bias = torch.zeros(len(classifier.class_names), dtype=torch.float64)
    return Head(vectors.shape[1] - 1, statistics, weight, bias, classifier.class_names)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_gives_the_same_evidence_with_and_without_cached_features(name, tmp_path, monkeypatch):
    """Pixels, features, and a batch of both; the sums are those of a model without a head."""
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    classifier, images = classifier_of(name, tmp_path / "model").eval(), split()
    samples = [images[i] for i in range(4)]
    plain = classify(classifier, classifier.collate(False)(samples), 0.0)
    vectors = image_vectors(classifier.family, samples)
    classifier.head = random_head(classifier, vectors)
    expected = classifier.head.logits(torch.from_numpy(vectors[:, -1]))
    some = fill_cache(classifier.family, [images.take([1, 2])], limit_gb=1)
    for cache in (None, some, fill_cache(classifier.family, [images], limit_gb=1)):
        batch = classifier.collate(False, cache)(samples)
        found = classify(classifier, batch, 0.0)
        torch.testing.assert_close(found.evidence, expected, rtol=5e-3, atol=5e-2)
        torch.testing.assert_close(found.sums, plain.sums, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores, found.sums, msg="evidence that does not count changes nothing")
        assert not any("forward" in vars(block) for block in vision_blocks(classifier.family))


def test_no_hook_stays_behind_and_listening_changes_nothing(tiny_model):
    classifier = tiny_classifier(tiny_model).eval()
    inputs = classifier.family.encode_images([random_image(1)]).inputs
    with torch.no_grad():
        before = classifier.family.encoder_features(inputs)
        with Listening(classifier.family):
            assert torch.equal(classifier.family.encoder_features(inputs), before)
    assert not any(block._forward_hooks for block in vision_blocks(classifier.family))


# Fitting


def planted(count=60, classes=3, layers=4, width=6, layer=2, seed=0):
    """Vectors in which only the deviation in one block tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    vectors = rng.normal(0, 1, (count, layers, 2, width)).astype(np.float16)
    vectors[np.arange(count), layer, 1, labels] += 3
    return vectors, labels


def fit_planted(monkeypatch, classes=3, **options):
    vectors, labels = planted(classes=classes, **options)

    def known(family, split, positions, cache, layer=None):
        chosen = vectors[list(positions)]
        return (chosen if layer is None else chosen[:, layer]), list(positions)

    monkeypatch.setattr(head_fit, "vectors_of_split", known)
    train = Split(Rows([None] * len(labels), labels, [str(i) for i in range(len(labels))]), range(len(labels)), labels)
    names = [f"class {i}" for i in range(classes)]
    return fit_head(None, train, names), vectors, labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_block_that_tells_the_classes_is_found_and_its_figures_are_scikit_learns(classes, monkeypatch):
    fitted, vectors, labels = fit_planted(monkeypatch, classes)
    assert fitted.head.layer == 2 and fitted.layers == 4 and "deviation" in fitted.head.statistics
    inputs = features(torch.from_numpy(vectors[:, 2]), fitted.head.statistics).float().numpy()
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    losses = {}
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300, tol=1e-3))
        found = cross_val_predict(model, inputs, labels, cv=folds, method="predict_proba")
        losses[strength] = -np.log(found[np.arange(len(labels)), labels]).mean()
    assert fitted.strength == min(losses, key=losses.get) != FIRST_STRENGTH
    assert fitted.nll == pytest.approx(losses[fitted.strength], rel=1e-4)
    model.set_params(logisticregression__C=fitted.strength).fit(inputs, labels)
    ours = fitted.head.logits(torch.from_numpy(vectors[:, 2])).softmax(1).numpy()
    np.testing.assert_allclose(ours, model.predict_proba(inputs), atol=1e-6)


def test_a_class_without_images_never_wins_and_one_with_a_single_image_is_no_fault(monkeypatch):
    vectors, labels = planted(classes=2)
    labels[0] = 2  # the only image of its class
    monkeypatch.setattr(
        head_fit, "vectors_of_split", lambda *given: (vectors if len(given) < 5 else vectors[:, given[4]], range(60))
    )
    train = Split(Rows([None] * 60, labels, list(map(str, range(60)))), range(60), labels)
    fitted = fit_head(None, train, ["a", "b", "c", "d"])
    found = fitted.head.logits(torch.from_numpy(vectors[:, fitted.head.layer]))
    assert found.shape == (60, 4) and found.isfinite().all() and (found.argmax(1) < 3).all()
    assert (found.softmax(1)[:, 3] < 1e-12).all()


def test_more_images_than_are_searched_are_used_for_the_last_fit(monkeypatch):
    monkeypatch.setattr(head_fit, "SEARCHED", 30)
    fitted, vectors, labels = fit_planted(monkeypatch)
    inputs = features(torch.from_numpy(vectors[:, fitted.head.layer]), fitted.head.statistics).float().numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=fitted.strength, max_iter=300, tol=1e-3))
    expected = model.fit(inputs, labels).predict_proba(inputs)
    ours = fitted.head.logits(torch.from_numpy(vectors[:, fitted.head.layer])).softmax(1).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # the order of the rows is another


def test_the_fits_are_counted_and_run_on_one_thread(monkeypatch, capsys):
    """Threads that wait for each other made the fits take minutes."""
    threads = []
    fit = LogisticRegression.fit

    def watched(self, *arguments):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    monkeypatch.setattr("vlm.common.progress.SECONDS_BETWEEN_LINES", 0)
    with threadpool_limits(2):
        fit_planted(monkeypatch)
    assert threads and set(threads) == {1}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("choosing the head's features: ")]
    assert lines and "11/11 fits (100%)" in lines[-1]


# Evidence


def drawn(share_of_text=1.0, seed=0, count=400, classes=4):
    """Sums and evidence that each know something else of the true class."""
    rng = np.random.default_rng(seed)
    text, seen = rng.normal(0, 1.5, (2, count, classes))
    logits = share_of_text * text + seen
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=share) for share in shares])
    return torch.tensor(2 * text - 20), torch.tensor(0.5 * seen + 3), labels


def nll_of(calibration, sums, evidence, labels):
    found = calibration.log_probabilities(calibration.with_evidence(sums, evidence)).numpy()
    return -found[np.arange(len(labels)), labels].mean()


@pytest.mark.parametrize("method", ["temperature", "bias"])
@pytest.mark.parametrize("prior", [None, (1.0, -2.0, 0.0, 0.5)])
def test_the_mixture_is_as_good_as_that_of_a_fine_grid(method, prior):
    sums, evidence, labels = drawn()
    shift = 0 if prior is None else torch.tensor(prior)
    text = Calibration(2.0, prior=prior)
    both = fit_evidence(text, sums + shift, evidence, labels, method)["both"]
    found = nll_of(both, sums + shift, evidence, labels)
    grid = [
        nll_of(Calibration(t, evidence=v), sums, evidence, labels)
        for t in np.geomspace(0.5, 8, 60)
        for v in np.geomspace(0.5, 32, 60)
    ]
    assert both.kind == "both" and found <= min(grid) + (2e-3 if method == "temperature" else 0.02)
    assert found < nll_of(text, sums + shift, None, labels) - 0.1


def test_the_head_alone_has_its_own_temperature():
    sums, evidence, labels = drawn(share_of_text=0.0)
    head = fit_evidence(Calibration(2.0), sums, evidence, labels, "temperature")["head"]
    assert head.kind == "head" and head.temperature == pytest.approx(fit_temperature(evidence.numpy(), labels)[0])
    expected = (evidence / head.temperature).log_softmax(1)
    torch.testing.assert_close(head.log_probabilities(head.with_evidence(sums, evidence)), expected)


@pytest.mark.parametrize(("share_of_text", "kind"), [(1.0, "both"), (0.0, "head")])
def test_what_is_better_on_validation_counts(share_of_text, kind, tiny_model):
    classifier = tiny_classifier(tiny_model).eval()
    sums, evidence, labels = drawn(share_of_text)
    sums, evidence = (torch.cat([values, values[:, :3] - 40], 1) for values in (sums, evidence))  # 7 classes
    chosen = choose_score(classifier, sums, labels, "temperature", "sum", evidence, "auto")
    figures = {name: chosen.compared[name]["nll"] for name in ("sum", "head", "both")}
    assert chosen.calibration.kind == min(figures, key=figures.get).replace("sum", "text")
    assert kind == "both" or figures["both"] < figures["sum"] - 0.1
    assert list(chosen.candidates) == ["text", "head", "both"]
    for counts, candidate in chosen.candidates.items():
        asked = choose_score(classifier, sums, labels, "temperature", "sum", evidence, counts)
        assert asked.calibration == (candidate if counts != "text" else asked.calibration)
        assert asked.calibration.kind == counts


def test_a_head_that_knows_nothing_does_not_count(tiny_model):
    classifier = tiny_classifier(tiny_model).eval()
    sums, evidence, _ = drawn()
    sums = torch.cat([sums, sums[:, :3] - 40], 1)
    noise = torch.from_numpy(np.random.default_rng(5).normal(0, 1, sums.shape))
    labels = [int(row.argmax()) if i % 3 else i % 4 for i, row in enumerate(sums)]
    assert choose_score(classifier, sums, labels, "temperature", "sum", noise, "auto").calibration.kind == "text"


def test_few_images_leave_the_head_out_and_say_so(tiny_model):
    sums, evidence, labels = drawn(count=10)
    chosen = choose_score(tiny_classifier(tiny_model), sums, labels, "temperature", "sum", evidence, "auto")
    assert chosen.calibration.kind == "text" and "what the head is worth" in chosen.remarks[-1]


def test_a_search_with_evidence_is_wrong_by_no_more_than_it_says(tiny_model):
    classifier = tiny_classifier(tiny_model).eval()
    batch = batch_of(classifier, [0, 1, 2, 3, 4], False)
    reading, exact = classifier.read(batch), classifier.score(classifier.read(batch))
    evidence = torch.from_numpy(np.random.default_rng(0).normal(0, 6, exact.shape))
    classifier.calibration = Calibration(0.8, evidence=1.3)
    found = classifier.search(reading, 1e-2, evidence=evidence)
    ours, theirs = (
        classifier.calibration.log_probabilities(classifier.calibration.with_evidence(sums, evidence)).exp()
        for sums in (found.scores, exact)
    )
    assert ((ours - theirs).abs().max(1).values <= found.unexplored + 1e-6).all() and (found.unexplored <= 1e-2).all()
    assert torch.equal(ours.argmax(1), theirs.argmax(1)) and not torch.equal(ours.argmax(1), exact.argmax(1))


def test_the_three_side_by_side_and_the_paired_interval():
    sums, evidence, labels = drawn()
    candidates = {"text": Calibration(2.0), **fit_evidence(Calibration(2.0), sums, evidence, labels, "temperature")}
    found = evidence_figures(candidates, Parts(sums, evidence), labels)
    right = {}
    for name, calibration in candidates.items():
        values = calibration.log_probabilities(calibration.with_evidence(sums, evidence))
        right[name] = values.argmax(1).numpy() == labels
        assert found["figures"][name]["accuracy"][0] == right[name].mean()
        assert found["figures"][name]["nll"] == pytest.approx(nll_of(calibration, sums, evidence, labels))
    for name in ("text", "head"):
        value, low, high = found["differences"][name]
        assert value == pytest.approx(right["both"].mean() - right[name].mean()) and low < value < high
    rng = np.random.default_rng(0)  # the interval covers the true difference as often as it says
    covered = 0
    for _ in range(400):
        ours = rng.random(150) < 0.8
        theirs = np.where(rng.random(150) < 0.7, ours, rng.random(150) < 0.6)
        low, high = paired_difference(ours, theirs)[1:]
        covered += low <= 0.3 * (0.8 - 0.6) <= high
    assert 0.92 <= covered / 400 <= 0.98


# The model folder


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    """A short demo, whose head counts."""
    from commands import train

    output = tmp_path_factory.mktemp("head") / "out"
    assert train("--demo", "--max-samples", 60, "--epochs", 2, "--evidence", "both", "--output-dir", output) == 0
    return output


@pytest.mark.slow
def test_inference_counts_the_head_as_the_test_did(with_head):
    results = json.loads((with_head / "results.json").read_text())
    evidence = results["test"]["evidence"]
    assert evidence["counts"] == "both" and set(evidence["figures"]) == {"text", "head", "both"}
    assert evidence["figures"]["both"]["accuracy"] == results["test"]["calibration"]["after"]["accuracy"]
    model, processor, metadata = load_model_and_metadata(with_head / "best_model", device="cpu")
    assert model.calibration.kind == "both" and model.calibration.evidence == results["test"]["calibration"]["evidence"]
    images = sorted((with_head / "demo_images").iterdir())
    together = predict_batch(model, processor, images, metadata)
    for image in images:
        prediction, confidence, text = predict_single_image(model, processor, image, metadata)
        assert together[str(image)]["prediction"] == prediction and text.endswith(f"Answer: {prediction}")
        assert together[str(image)]["confidence"] == pytest.approx(confidence, abs=1e-4)
    samples = [Sample(random_image(i), 0, "noise") for i in range(3)]
    parts = score_parts(model, samples, tolerance=0.0)
    assert parts.evidence.shape == parts.sums.shape == (3, 10)


@pytest.mark.slow
def test_a_head_that_is_missing_or_for_others_is_said(with_head, tmp_path):
    folder = tmp_path / "best_model"
    shutil.copytree(with_head / "best_model", folder)
    file = folder / "evidence" / "head.safetensors"
    names = json.loads((folder / "training_metadata.json").read_text())["class_names"]
    assert read_head(file, names).classes == tuple(names)
    with pytest.raises(UsageError, match="does not fit the classes of this model"):
        read_head(file, names[::-1])
    whole = read_head(file, names)
    with pytest.raises(UsageError, match="does not fit the vision encoder"):
        whole.logits(torch.zeros(1, 2, 5))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="head.safetensors is damaged"):
        read_head(file, names)
    file.unlink()
    (folder / "checksums.json").unlink()
    file.symlink_to(with_head / "best_model" / "evidence" / "head.safetensors")
    with pytest.raises(UsageError, match="outside of the model's folder"):
        load_model_and_metadata(folder, device="cpu")
    file.unlink()
    with pytest.raises(UsageError, match="is missing"):
        load_model_and_metadata(folder, device="cpu")


@pytest.mark.slow
def test_texts_name_the_class_that_evidence_decides(tiny_model):
    classifier = tiny_classifier(tiny_model).eval()
    batch = batch_of(classifier, [0, 1, 2, 3], False)
    found = classify(classifier, batch)
    classifier.head = random_head(
        classifier, image_vectors(classifier.family, [Sample(random_image(0), 0, "an image")])
    )
    classifier.calibration = Calibration(1.0, evidence=50.0)
    again = classify(classifier, batch)
    best = classifier.calibration.log_probabilities(again.scores).argmax(1).tolist()
    assert best != found.scores.argmax(1).tolist(), "or the test says little"
    for text, c in zip(explain(classifier, again, best), best, strict=True):
        assert text.endswith(f"Answer: {classifier.prompts.shown_names[c]}")


def test_a_split_with_an_unreadable_image_is_fitted_without_it(tiny_model, monkeypatch):
    classifier = tiny_classifier(tiny_model).eval()
    images = split()
    images.leave_out(1, "1: damaged")
    vectors, kept = vectors_of_split(classifier.family, images, range(4), None)
    assert kept == [0, 2, 3] and vectors.shape[0] == 3
    assert not torch.from_numpy(vectors).isnan().any()

"""What is minimized: against plain sums over classes and tokens. That the tree's gradients are right is in
family_checks.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_checks import parted
from test_training import gradients_of_first_step, image_folder
from tiny import NAMES, batch_of, full_row_logits, random_image, save_tiny_model, tiny_classifier, tiny_prompts

from vlm.classifier import tree_rows
from vlm.classifier.batching import vlm_collate_fn
from vlm.classifier.classifier import VLMClassifier
from vlm.classifier.label_tree import build_label_tree
from vlm.classifier.objective import Objective, balanced_weights, usual_objective
from vlm.classifier.plain import PlainForward
from vlm.classifier.tree_rows import TreeRows
from vlm.common.errors import UsageError
from vlm.config import BOTH, POSTERIOR, RESPONSE, resolve
from vlm.conversation.prompts import build_prompts
from vlm.data import Sample
from vlm.families import load_family
from vlm.training.setup import set_up

LABELS = [0, 5, 6, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return save_tiny_model(folder / "model"), image_folder(folder / "images", NAMES, each=4)


def objective_of(classifier, name, **more):
    return Objective(name, classifier.tree, len(classifier.rendered.opening_ids), **more)


def class_losses(classifier, labels):
    """(B,) -log of the posterior of each label, by the exhaustive search."""
    with torch.no_grad():
        scores = classifier.score(classifier.read(batch_of(classifier, labels, with_response=False)))
    return -scores.log_softmax(-1)[range(len(labels)), labels]


def parted_scores(classifier, batch, prompt):
    """(C,) log-probability of each class's scored text up to where no other goes on alike, by one forward a class."""
    ids, scores = classifier.rendered.scored_ids, []
    for response, apart in zip(ids, parted(ids), strict=True):
        with torch.no_grad():
            logits = full_row_logits(classifier, prompt + response[:apart], batch.pixels).log_softmax(-1)
        scores.append(logits[-apart - 1 : -1].gather(1, torch.tensor(response[:apart]).unsqueeze(1)).sum())
    return torch.stack(scores)


def test_rows_of_a_tree_add_up_its_paths():
    """Scores of random log-probabilities, summed along each path by hand; blocks of any size give the same."""
    generator = np.random.default_rng(0)
    for turn in range(40):
        responses = {tuple(generator.integers(0, 3, generator.integers(1, 6)).tolist()) + (9,) for _ in range(6)}
        responses = [(7, 8, *response) for response in sorted(responses)]  # all begin alike
        tree, opening = build_label_tree(responses), 2
        whole = turn % 2 == 0
        rows = TreeRows(tree, opening, whole)
        run = [n for n in tree.inner if n >= opening and (whole or len(tree.classes_below(n)) > 1)]
        assert len(rows) == len(run)

        class Family:
            vocabulary = 10

            @staticmethod
            def logits(states):
                return states

        hidden = torch.from_numpy(generator.normal(size=(2, 4 + len(rows), 10)))
        branching = torch.tensor([4, 2])
        scores = rows.scores(Family, hidden, branching)
        state_of = {node: 4 + i for i, node in enumerate(run)}
        apart = parted(responses)
        assert tree.parted == apart
        for b in range(2):
            for c, leaf in enumerate(tree.leaves):
                total, node = 0.0, leaf
                while node >= opening:
                    parent = tree.parents[node]
                    if not whole and tree.depths[node] >= apart[c]:
                        node = parent
                        continue
                    state = hidden[b, state_of.get(parent, int(branching[b]) - 1)]
                    total += float(state.log_softmax(-1)[tree.tokens[node]])
                    node = parent
                assert math.isclose(float(scores[b, c]), total, rel_tol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [POSTERIOR, BOTH])
def test_blocks_of_logits_change_neither_loss_nor_gradients(folder, monkeypatch, name):
    found = []
    for elements in (2**25, 1):
        monkeypatch.setattr(tree_rows, "LOGITS_AT_ONCE", elements)
        classifier = tiny_classifier(folder, torch.float64).train()
        classifier.objective = objective_of(classifier, name)
        loss = classifier(batch_of(classifier, LABELS, with_response=name == BOTH)).posterior
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in classifier.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_the_posterior_is_what_scoring_says(folder):
    classifier = tiny_classifier(folder, torch.float64)
    batch = batch_of(classifier, LABELS)
    classifier.objective = objective_of(classifier, POSTERIOR)
    torch.testing.assert_close(classifier(batch).posterior, class_losses(classifier, LABELS).sum(), rtol=1e-9, atol=0)
    whole = len(classifier.objective.rows)
    losses = []
    for name in (RESPONSE, BOTH):
        classifier.objective = objective_of(classifier, name)
        losses.append(classifier(batch))
    assert 0 < len(classifier.objective.rows) < whole / 4, "both should run few nodes only"
    torch.testing.assert_close(losses[1].loss, losses[0].loss, rtol=1e-9, atol=0)
    assert losses[0].tokens == losses[1].tokens and losses[0].posterior is None


@pytest.mark.parametrize(("names", "forwards"), [(["cat", "dog", "x"], 1), (NAMES, 2)])
def test_the_plain_forward_runs_once_for_texts_that_differ_in_their_last_token(folder, monkeypatch, names, forwards):
    classifier = tiny_classifier(folder, torch.float64, names).eval()
    classifier.objective = objective_of(classifier, BOTH)
    batch = batch_of(classifier, [0, 2], with_response=False)
    begin = [row[:length].tolist() for row, length in zip(batch.input_ids, batch.prompt_lengths, strict=True)]
    alone = [
        vlm_collate_fn([Sample(random_image(i), c, "")], classifier.family, classifier.rendered, False)
        for i, c in enumerate([0, 2])
    ]
    expected = [parted_scores(classifier, one, prompt) for one, prompt in zip(alone, begin, strict=True)]
    calls = []

    def full_logits(ids, mask, response, inputs):
        calls.append(1)
        inputs = {name: tensor.unsqueeze(1) for name, tensor in inputs.items()}
        return classifier.model(input_ids=ids, attention_mask=mask.long(), **inputs, use_cache=False).logits

    monkeypatch.setattr(classifier.family, "full_logits", full_logits)
    plain = PlainForward(classifier.family, classifier.rendered, classifier.tree)
    found = plain.training_scores(batch, classifier.objective)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    stems = {
        tuple(ids[: apart - 1])
        for ids, apart in zip(classifier.rendered.scored_ids, classifier.tree.parted, strict=True)
    }
    assert len(calls) == len(stems) == forwards
    usual = usual_objective(classifier.tree, len(classifier.rendered.opening_ids), shares_prefix=False)
    assert usual == (BOTH if forwards == 1 else RESPONSE)


def test_no_class_may_share_a_token_with_another():
    """Then no node is run at all."""
    rows = TreeRows(build_label_tree([[1, 5], [2, 5], [3, 4, 5]]), 0, whole=False)
    assert len(rows) == 0
    states = torch.randn(2, 3, 8, dtype=torch.float64)

    class Family:
        vocabulary = 8
        logits = staticmethod(lambda states: states)

    scores = rows.scores(Family, states, torch.tensor([3, 1]))
    torch.testing.assert_close(scores, states[[0, 1], [2, 0]].log_softmax(-1)[:, [1, 2, 3]])
    assert rows.mask(2, 3, torch.tensor([3, 1])).shape == (2, 1, 3, 5)


@pytest.mark.parametrize("response_format", ["reasoning-first", "answer-first"])
def test_a_image_with_a_reasoning_of_its_own_is_learned_where_its_answer_is_scored(folder, response_format):
    prompts = replace(build_prompts(resolve({"response_format": response_format}), NAMES), reasoning_tokens=8)
    classifier = VLMClassifier(load_family(folder, torch.float64, torch.device("cpu")), prompts).eval()
    classifier.objective = objective_of(classifier, BOTH)
    samples = [
        Sample(random_image(i), label, "", text)
        for i, (label, text) in enumerate([(0, "Fur."), (5, "A long, long tail.")])
    ]
    batch = vlm_collate_fn(samples, classifier.family, classifier.rendered)
    found = classifier(batch)
    expected = 0.0
    for i, sample in enumerate(samples):
        prompt = batch.input_ids[i, : batch.prompt_lengths[i]].tolist()
        assert ("Fur." in classifier.family.decode(prompt)) == (i == 0 and response_format == "reasoning-first")
        alone = vlm_collate_fn([sample], classifier.family, classifier.rendered, with_response=False)
        expected -= parted_scores(classifier, alone, prompt).log_softmax(-1)[sample.label]
    torch.testing.assert_close(found.posterior, expected, rtol=1e-9, atol=0)


def test_weights_make_classes_equal_and_keep_their_mean():
    labels = [0] * 6 + [1] * 3 + [3]
    weights = np.array(balanced_weights(labels, 4))
    sums = [weights[c] * labels.count(c) for c in (0, 1, 3)]
    np.testing.assert_allclose(sums, sums[0])
    np.testing.assert_allclose(weights[labels].mean(), 1.0)


@pytest.mark.parametrize("name", [RESPONSE, BOTH])
def test_class_weights_multiply_the_loss_of_each_image(folder, name):
    classifier = tiny_classifier(folder, torch.float64)
    weights = [0.5, 1, 1, 3, 1, 2, 0.25]
    single = []
    for i, label in enumerate(LABELS):
        classifier.objective = objective_of(classifier, name)
        single.append(
            classifier(vlm_collate_fn([Sample(random_image(i), label, "")], classifier.family, classifier.rendered))
        )
    classifier.objective = objective_of(classifier, name, class_weights=weights).double()
    found = classifier(batch_of(classifier, LABELS))
    torch.testing.assert_close(
        found.loss, sum(weights[c] * one.loss for c, one in zip(LABELS, single, strict=True)), rtol=1e-9, atol=0
    )
    if name == BOTH:
        expected = sum(weights[c] * one.posterior for c, one in zip(LABELS, single, strict=True))
        torch.testing.assert_close(found.posterior, expected, rtol=1e-9, atol=0)


def test_label_smoothing_is_over_the_classes(folder):
    classifier = tiny_classifier(folder, torch.float64)
    classifier.objective = objective_of(classifier, POSTERIOR, label_smoothing=0.2)
    found = classifier(batch_of(classifier, LABELS, with_response=False)).posterior
    with torch.no_grad():
        logs = classifier.score(classifier.read(batch_of(classifier, LABELS, with_response=False))).log_softmax(-1)
    target = torch.full_like(logs, 0.2 / len(NAMES))
    target[range(len(LABELS)), LABELS] += 0.8
    torch.testing.assert_close(found, -(target * logs).sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "flags", [{"objective": POSTERIOR}, {"objective": BOTH, "class_balance": True, "label_smoothing": 0.1}]
)
def test_a_step_does_not_depend_on_how_it_is_cut(sources, tmp_path, flags):
    loss, whole = gradients_of_first_step(sources, tmp_path / "a", batch_size=8, gradient_accumulation_steps=1, **flags)
    other, parts = gradients_of_first_step(
        sources, tmp_path / "b", batch_size=4, gradient_accumulation_steps=2, **flags
    )
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    largest = max(gradient.norm() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), 1e-6 * largest), name


@pytest.mark.parametrize("expected", [BOTH, RESPONSE])
def test_without_a_wish_the_cost_decides(sources, folder, tmp_path, monkeypatch, expected):
    nodes = len(objective_of(tiny_classifier(folder, torch.float32), BOTH).rows)
    assert nodes, "or nothing is compared with the bound"
    monkeypatch.setattr("vlm.classifier.objective.FEW_NODES", nodes if expected == BOTH else nodes - 1)
    model, images = sources
    run = set_up(resolve({"model": str(model), "dataset": str(images), "output_dir": str(tmp_path)}))
    assert run.settings.objective == run.metadata["settings"]["objective"] == run.classifier.objective.name == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"label_smoothing": 0.1, "objective": "response"}, "--objective posterior or both"),
        ({"objective": "posterior", "label_smoothing": 1.0}, "--label-smoothing 1.0"),
        ({"objective": "posterior", "reasoning_column": "why"}, "--objective both"),
    ],
)
def test_what_cannot_be_learned_is_said(flags, words):
    with pytest.raises(UsageError, match=words):
        resolve(flags)


def test_rows_of_the_posterior_need_no_response(folder):
    """The tree is run behind the prompt alone, and prompts of a plain batch are found too."""
    classifier = tiny_classifier(folder, torch.float64)
    assert classifier.prompts == tiny_prompts()
    with_response, without = (batch_of(classifier, LABELS, flag) for flag in (True, False))
    assert with_response.prompt_lengths.tolist() == without.prompt_lengths.tolist() == without.lengths.tolist()
    classifier.objective = objective_of(classifier, POSTERIOR)
    torch.testing.assert_close(classifier(with_response).posterior, classifier(without).posterior, rtol=1e-9, atol=0)

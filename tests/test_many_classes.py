"""A thousand classes, as ImageNet-1K has: few nodes are visited where the model is sure, the bound holds, and memory
stays bounded."""

import numpy as np
import pytest
import torch
from tiny import batch_of, full_row_logits, save_tiny_model

from vlm.classifier import search as scoring
from vlm.classifier.classifier import VLMClassifier
from vlm.config import resolve
from vlm.conversation.prompts import build_prompts
from vlm.families import load_family

CLASSES, SURE = 1000, 700


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A model that was trained on one response until it is sure of it."""
    family = load_family(save_tiny_model(tmp_path_factory.mktemp("tiny")), torch.float32, torch.device("cpu"))
    names = [f"{kind} {number}" for kind in ("cat", "fish", "long class", "x") for number in range(CLASSES // 4)]
    settings = resolve({"system_instructions": "Look.", "response_format": "answer-first"})
    classifier = VLMClassifier(family, build_prompts(settings, names)).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(500):
        loss = classifier(batch_of(classifier, [SURE] * 4)).loss / 4
        if loss < 0.05:
            return classifier.eval()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the model is not sure: {loss.item():.2f}")


@pytest.fixture
def passes(monkeypatch):
    """Nodes visited, and those in the cache, of each pass."""
    seen = []
    run = scoring.TreeState.run

    def watched(self, nodes):
        result = run(self, nodes)
        seen.append(((nodes >= 0).sum(), self.nodes.size))
        return result

    monkeypatch.setattr(scoring.TreeState, "run", watched)
    return seen


@pytest.mark.slow
def test_the_search_visits_few_nodes_and_each_probability_is_within_its_bound(classifier, passes):
    reading = classifier.read(batch_of(classifier, [0, 1, 2, 3], with_response=False))
    found = classifier.search(reading)
    visited = sum(nodes for nodes, _ in passes)
    passes.clear()
    exact = classifier.score(reading).log_softmax(-1).exp()
    everything = sum(nodes for nodes, _ in passes)
    assert visited < 0.1 * everything
    probabilities = found.scores.log_softmax(-1).exp()
    assert (found.unexplored <= scoring.TOLERANCE).all()
    assert ((probabilities - exact).abs() <= found.unexplored.unsqueeze(1) + 1e-6).all()
    assert probabilities.argmax(-1).tolist() == exact.argmax(-1).tolist() == [SURE] * 4


@pytest.mark.slow
def test_a_visit_of_everything_keeps_its_cache_bounded(classifier, passes):
    reading = classifier.read(batch_of(classifier, [0, 1, 2, 3], with_response=False))
    classifier.score(reading)
    assert sum(nodes for nodes, _ in passes) > 4 * scoring.NODES_KEPT, "or the test says nothing"
    assert max(kept for _, kept in passes) <= scoring.NODES_KEPT + 2 * scoring.NODES_AT_ONCE


@pytest.mark.slow
def test_some_of_a_thousand_scores_are_those_of_one_forward_each(classifier):
    batch = batch_of(classifier, [0], with_response=False)
    scores = classifier.score(classifier.read(batch))[0]
    chosen = np.linspace(0, CLASSES - 1, 7).astype(int)
    prompt = batch.input_ids[0, : batch.lengths[0]].tolist()
    for number in chosen:
        response = classifier.rendered.scored_ids[number]
        with torch.no_grad():
            logits = full_row_logits(classifier, prompt + response, batch.pixels).log_softmax(-1)
        expected = logits[-len(response) - 1 : -1].gather(1, torch.tensor(response).unsqueeze(1)).sum()
        assert scores[number].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-3)

"""The shared forward pass against transformers' plain full forward, and the label tree against one forward a class."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import NAMES, batch_of, full_row_logits, random_image, samples, save_tiny_model, tiny_classifier, tiny_prompts

from vlm.classifier import search as scoring
from vlm.classifier.batching import IGNORED, vlm_collate_fn
from vlm.classifier.calibration import Calibration
from vlm.common.errors import UsageError
from vlm.conversation.prompts import Prompts
from vlm.data import Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def double(folder):
    return tiny_classifier(folder, torch.float64)


def plain_loss(classifier, batch):
    """Summed cross entropy of the response tokens, one full forward a sample."""
    total = 0
    for i, length in enumerate(batch.lengths.tolist()):
        row = batch.input_ids[i, :length].tolist()
        targets = batch.targets[i, :length]
        pixels = {name: tensor[i : i + 1] for name, tensor in batch.pixels.items()}
        logits = full_row_logits(classifier, row, pixels)[len(classifier.rendered.prefix_ids) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    return total


def gradients(classifier, loss):
    classifier.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None}


def test_loss_and_every_gradient_equal_the_plain_full_forward(double):
    double.train()
    batch = batch_of(double, [0, 5, 6, 3, 1])
    assert len(set(batch.lengths.tolist())) > 1, "the rows should be of unequal length"
    output = double(batch)
    expected = plain_loss(double, batch)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    ours, plain = gradients(double, output.loss), gradients(double, expected)
    assert ours.keys() == plain.keys() == dict(double.named_parameters()).keys()
    for name, gradient in plain.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-6, f"{name}: relative error {error:.2e}"


def test_a_prefix_without_gradient_would_be_noticed(double):
    """The tolerance above tells a right gradient from one that stops at the prefix."""
    double.train()
    batch = batch_of(double, [0, 5])
    right = gradients(double, double(batch).loss)
    whole = double.strategy.run_prefix

    def without_gradient():
        with torch.no_grad():
            return whole()

    double.strategy.run_prefix = without_gradient
    try:
        wrong = gradients(double, double(batch).loss)
    finally:
        del double.strategy.run_prefix
    name = next(n for n in right if n.endswith("layers.0.self_attn.v_proj.weight") and "text_model" in n)
    assert (right[name] - wrong[name]).norm() / right[name].norm() > 1e-2


def naive_scores(classifier, batch, count):
    """(B, C) by one full forward for every class of every sample."""
    scores = torch.zeros(count, len(classifier.class_names), dtype=torch.float64)
    for i in range(count):
        prompt = batch.input_ids[i, : batch.lengths[i]].tolist()
        pixels = {name: tensor[i : i + 1] for name, tensor in batch.pixels.items()}
        for c, response in enumerate(classifier.rendered.response_ids):
            with torch.no_grad():
                log_probabilities = full_row_logits(classifier, prompt + response, pixels).double().log_softmax(-1)
            start = len(classifier.rendered.prefix_ids) + len(prompt) - 1
            scores[i, c] = sum(log_probabilities[start + k, token] for k, token in enumerate(response))
    return scores


@pytest.mark.parametrize("names", [NAMES, ["a", "b"], ["0", "1", "10", "11", "100"]])
def test_label_tree_equals_one_forward_a_class(folder, names):
    classifier = tiny_classifier(folder, names=names).eval()
    batch = batch_of(classifier, [0, 1, 1], with_response=False)
    scores = classifier.score(classifier.read(batch)).double()
    expected = naive_scores(classifier, batch, 3)
    assert expected.std(1).min() > 1e-2, "the classes should differ, or the test says little"
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def test_scores_in_small_blocks_of_logits_are_the_same(folder, monkeypatch):
    classifier = tiny_classifier(folder).eval()
    reading = classifier.read(batch_of(classifier, [0, 1], with_response=False))
    whole = classifier.score(reading)
    monkeypatch.setattr("vlm.classifier.search.LOGITS_AT_ONCE", 1)
    torch.testing.assert_close(classifier.score(reading), whole, rtol=1e-6, atol=1e-5)


def test_one_by_one_equals_a_batch_and_scoring_twice_changes_nothing(folder):
    classifier = tiny_classifier(folder).eval()
    images = samples([0, 1, 2])
    together = classifier.read(vlm_collate_fn(images, classifier.family, classifier.rendered, with_response=False))
    scores = classifier.score(together)
    torch.testing.assert_close(classifier.score(together), scores, rtol=0, atol=0)
    for i, sample in enumerate(images):
        alone = classifier.read(vlm_collate_fn([sample], classifier.family, classifier.rendered, with_response=False))
        torch.testing.assert_close(classifier.score(alone)[0], scores[i], rtol=1e-6, atol=1e-5)


def test_a_batch_can_be_read_like_the_dictionary_that_it_was(folder):
    batch = batch_of(tiny_classifier(folder), [0, 1])
    assert batch["input_ids"] is batch.input_ids and batch["prompts"] is batch.prompt_lengths


def test_rows_of_unequal_image_tokens_equal_one_by_one(folder):
    """With several tiles an image (image splitting) the prompts have unequal lengths."""
    classifier = tiny_classifier(folder).eval()
    image_processor = classifier.family.processor.image_processor
    image_processor.do_image_splitting, image_processor.size = True, {"longest_edge": 48}
    images = [Sample(random_image(i, width, 20), 0, "an image") for i, width in enumerate((60, 20, 33))]
    batch = vlm_collate_fn(images, classifier.family, classifier.rendered, with_response=False)
    assert len(set(batch.lengths.tolist())) > 1
    reading = classifier.read(batch)
    scores, texts = classifier.score(reading), classifier.write(reading, 12)
    for i, sample in enumerate(images):
        alone = classifier.read(vlm_collate_fn([sample], classifier.family, classifier.rendered, with_response=False))
        torch.testing.assert_close(classifier.score(alone)[0], scores[i], rtol=1e-6, atol=1e-5)
        assert classifier.write(alone, 12)[0] == texts[i]


def test_written_text_equals_the_greedy_text_of_transformers(folder):
    classifier = tiny_classifier(folder).eval()
    batch = batch_of(classifier, [0, 1], with_response=False)
    texts = classifier.write(classifier.read(batch), max_new_tokens=16)
    for i in range(2):
        ids = torch.tensor([classifier.rendered.prefix_ids + batch.input_ids[i, : batch.lengths[i]].tolist()])
        pixels = {name: tensor[i : i + 1].unsqueeze(1) for name, tensor in batch.pixels.items()}
        expected = classifier.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, max_new_tokens=16, do_sample=False
        )
        assert texts[i] == classifier.family.decode(expected[0, ids.shape[1] :].tolist())


def test_image_features_equal_those_of_transformers(folder):
    classifier = tiny_classifier(folder).eval()
    batch = batch_of(classifier, [0, 1])
    with torch.no_grad():
        ours = classifier.family.image_features(batch.pixels)
        theirs = classifier.model.model.get_image_features(
            **{k: v.unsqueeze(1) for k, v in batch.pixels.items()}
        ).pooler_output
    torch.testing.assert_close(ours, torch.cat(list(theirs)), rtol=0, atol=0)


def test_tokens_equal_those_of_the_chat_template_as_a_whole(folder):
    classifier = tiny_classifier(folder)
    family, prompts = classifier.family, classifier.prompts
    sample = samples([3])[0]
    batch = vlm_collate_fn([sample], family, classifier.rendered)
    messages = [*prompts.messages(), {"role": "assistant", "content": [{"type": "text", "text": prompts.responses[3]}]}]
    text = family.processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    whole = family.processor(text=[text], images=[[sample.image]])["input_ids"][0]
    assert classifier.rendered.prefix_ids + batch.input_ids[0].tolist() == list(whole)


def test_only_the_response_is_in_the_loss(folder):
    classifier = tiny_classifier(folder)
    batch = batch_of(classifier, [2, 4])
    for i, label in enumerate((2, 4)):
        targets = batch.targets[i]
        assert targets[targets != IGNORED].tolist() == classifier.rendered.response_ids[label]
        assert classifier.rendered.response_ids[label][-1] == classifier.family.tokenizer.convert_tokens_to_ids(
            "<end_of_utterance>"
        )


def test_another_image_changes_the_scores(folder):
    classifier = tiny_classifier(folder).eval()
    scores = classifier.score(classifier.read(batch_of(classifier, [0, 0], with_response=False)))
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_the_kept_prefix_is_forgotten_when_training(folder):
    classifier = tiny_classifier(folder).eval()
    batch = batch_of(classifier, [0], with_response=False)
    before = classifier.score(classifier.read(batch))
    classifier.train()
    with torch.no_grad():
        classifier.model.model.text_model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    classifier.eval()
    changed = classifier.score(classifier.read(batch))
    assert (changed - before).abs().max() > 1e-4
    torch.testing.assert_close(changed.double(), naive_scores(classifier, batch, 1), rtol=0, atol=1e-4)


def test_a_sample_that_is_too_long_is_refused_by_name(folder):
    classifier = tiny_classifier(folder)
    short = replace(classifier.rendered, max_length=20)
    with pytest.raises(UsageError, match="image 0 has .* tokens.* at most 20: shorten --system-instructions"):
        vlm_collate_fn(samples([0]), classifier.family, short)
    listed = replace(short, prompts=tiny_prompts(tuple(f"class number {i}" for i in range(50))))
    with pytest.raises(UsageError, match="most of that is the list of the 50 classes"):
        vlm_collate_fn(samples([0]), classifier.family, listed)


def test_a_image_placeholder_in_a_text_is_refused(folder):
    classifier = tiny_classifier(folder)
    prompts = Prompts("look at <image>", "what?", ("a", "b"), ("Answer: a", "Answer: b"))
    with pytest.raises(UsageError, match="<image>"):
        classifier.family.render(prompts)


def test_equal_responses_are_refused(folder):
    family = tiny_classifier(folder).family
    with pytest.raises(UsageError, match="do not tell the classes apart"):
        type(tiny_classifier(folder))(family, Prompts("s", "q", ("a", "b"), ("Answer: a", "Answer: a")))


def test_batches_of_one_step_share_the_prefix_with_the_gradients_of_one_batch_each(double):
    """The prefix is run with the first batch alone; the last one brings the gradients of all back through it."""
    double.train()
    batches = [batch_of(double, labels) for labels in ([0, 5], [3], [6, 1, 2])]
    double.zero_grad()
    for batch in batches:
        double(batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in double.named_parameters()}
    double.zero_grad()
    runs, run_prefix = [], double.strategy.run_prefix
    double.strategy.run_prefix = lambda: runs.append(1) or run_prefix()
    try:
        for i, batch in enumerate(batches):
            double(batch, first=i == 0, last=i == 2).loss.backward()
    finally:
        del double.strategy.run_prefix
    assert runs == [1]
    for name, parameter in double.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < 1e-6, f"{name}: relative error {error:.2e}"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3}, {"bias": tuple(np.linspace(-1, 1, len(NAMES)))}])
def test_a_search_is_as_exact_as_it_says_and_leaves_nodes_out(folder, monkeypatch, options):
    classifier = tiny_classifier(folder, torch.float64).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2)
    for _ in range(40):  # until it writes the template, so that the classes alone are open
        classifier(batch_of(classifier, [0, 1, 2, 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.eval()
    reading = classifier.read(batch_of(classifier, [0, 1, 2, 3], with_response=False))
    exact = classifier.score(reading)
    visited = []
    monkeypatch.setattr(scoring, "PASS_COST", 0)  # or it would visit so small a tree at once
    run = scoring.TreeState.run
    monkeypatch.setattr(
        scoring.TreeState, "run", lambda self, nodes: visited.append((nodes >= 0).sum()) or run(self, nodes)
    )
    classifier.calibration = Calibration(**options)
    found = classifier.search(reading, 1e-3, labels=[0, 1, 2, 3])
    inner = len(classifier.tree.inner) - len(classifier.rendered.opening_ids)
    assert 0 < sum(visited) < 4 * inner, "it should leave nodes out, or the test says little"
    ours, theirs = (classifier.calibration.log_probabilities(scores).exp() for scores in (found.scores, exact))
    assert (found.unexplored <= 1e-3).all()
    assert ((ours - theirs).abs().max(-1).values <= found.unexplored + 1e-9).all()
    assert ours.argmax(-1).tolist() == theirs.argmax(-1).tolist()
    rows = torch.arange(4)
    torch.testing.assert_close(found.scores[rows, rows], exact[rows, rows], rtol=0, atol=1e-9)


def passes_of(classifier, reading, monkeypatch, **search):
    """Nodes of each image in each pass of a search, and what it found."""
    passes = []
    run = scoring.TreeState.run
    with monkeypatch.context() as patch:
        patch.setattr(
            scoring.TreeState,
            "run",
            lambda self, nodes: passes.append((nodes >= 0).sum(1).tolist()) or run(self, nodes),
        )
        return passes, classifier.search(reading, **search)


def test_what_is_left_of_a_tree_is_visited_at_once_where_that_costs_no_more_than_another_pass(folder, monkeypatch):
    classifier = tiny_classifier(folder, torch.float64).eval()
    reading = classifier.read(batch_of(classifier, [0, 1, 2], with_response=False))
    inner = len(classifier.tree.inner) - len(classifier.rendered.opening_ids)
    monkeypatch.setattr(scoring, "PASS_COST", 3 * inner)
    whole, found = passes_of(classifier, reading, monkeypatch, tolerance=0.5)
    assert whole == [[inner] * 3]
    torch.testing.assert_close(found.scores, classifier.score(reading), rtol=0, atol=0)
    assert (found.unexplored == 0).all()
    monkeypatch.setattr(scoring, "PASS_COST", 0)
    best_first, exact = passes_of(classifier, reading, monkeypatch, tolerance=1e-12)
    assert len(best_first) > 1 and max(best_first[0]) < inner, "best first, or the test says little"
    torch.testing.assert_close(exact.scores, found.scores, rtol=0, atol=1e-9)
    monkeypatch.setattr(scoring, "NODES_AT_ONCE", inner)
    monkeypatch.setattr(scoring, "PASS_COST", 10**6)
    small, _ = passes_of(classifier, reading, monkeypatch, tolerance=1e-12)
    assert max(map(max, small)) < inner, "a pass stays as small as it has to be"


def test_a_visit_of_the_whole_tree_is_one_pass_where_there_is_room(folder, monkeypatch):
    classifier = tiny_classifier(folder).eval()
    monkeypatch.setattr(scoring, "PASS_COST", 0)
    reading = classifier.read(batch_of(classifier, [0, 1], with_response=False))
    passes, _ = passes_of(classifier, reading, monkeypatch, tolerance=0.0)
    assert len(passes) == 1


def test_searches_in_small_passes_that_drop_what_is_finished_are_the_same(folder, monkeypatch):
    classifier = tiny_classifier(folder).eval()
    reading = classifier.read(batch_of(classifier, [0, 1, 2], with_response=False))
    whole = classifier.score(reading)
    longest = []
    run = scoring.TreeState.run
    monkeypatch.setattr(
        scoring.TreeState, "run", lambda self, nodes: longest.append(self.nodes.shape[1]) or run(self, nodes)
    )
    monkeypatch.setattr(scoring, "NODES_AT_ONCE", 6)
    monkeypatch.setattr(scoring, "NODES_KEPT", 12)
    torch.testing.assert_close(classifier.score(reading), whole, rtol=1e-6, atol=1e-5)
    assert len(longest) > 5 and max(longest) < len(classifier.tree.inner) / 2, "the cache stays small"

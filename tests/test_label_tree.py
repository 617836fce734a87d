"""The tree and its search against scoring by hand, without any model."""

import itertools
import math

import numpy as np
import pytest
import torch

from vlm.classifier.calibration import Calibration
from vlm.classifier.label_tree import ROOT, Search, build_label_tree

END = 99


def test_shared_beginnings_are_one_path_and_prefixes_are_leaves_of_their_own():
    tree = build_label_tree([[1, 2, END], [4, END], [1, 2, 3, END]])
    assert tree.tokens.tolist() == [1, 2, 3, END, END, 4, END]
    assert tree.parents.tolist() == [ROOT, 0, 1, 2, 1, ROOT, 5]
    assert tree.depths.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert tree.lengths.tolist() == [3, 2, 4]
    assert tree.leaves.tolist() == [4, 6, 3]
    assert tree.first == [0, 5] and tree.inner == [0, 1, 2, 5]
    assert tree.segment(0) == [0, 1] and tree.segment(2) == [2] and tree.segment(5) == [5]
    assert [sorted(tree.classes_below(node).tolist()) for node in (0, 2, 4, 5)] == [[0, 2], [2], [0], [1]]


def test_a_node_sees_itself_and_its_ancestors_alone():
    tree = build_label_tree([[1, 2, END], [4, END], [1, 2, 3, END]])
    nodes = np.array([0, 1, 2, 5, -1])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert tree.sees(nodes, nodes)[:4].astype(int).tolist() == expected


@pytest.mark.parametrize("responses", [[[1], []], [[1, 2], [1, 2]], [[1], [1, 2]], [[1, 2], [1]]])
def test_responses_that_are_empty_equal_or_begin_another_are_refused(responses):
    with pytest.raises(ValueError, match="empty, or equals or begins"):
        build_label_tree(responses)


def random_language(seed, classes=40, length=6, tokens=5, sharpness=3.0):
    """Responses over a few tokens, and the log-probability of each token after each history, as a model would give
    it."""
    generator = np.random.default_rng(seed)
    responses = {
        tuple(generator.integers(0, tokens, generator.integers(1, length)).tolist()) + (END,) for _ in range(classes)
    }
    table = {}

    def after(history):
        if history not in table:
            logits = np.random.default_rng([seed, *history]).normal(0, sharpness, tokens + 1)
            table[history] = logits - np.logaddexp.reduce(logits)
        return table[history]

    def log_probability(history, token):
        return float(after(history)[tokens if token == END else token])

    return [list(response) for response in sorted(responses)], log_probability


def run(tree, log_probability, search, room=10_000, opening=0):
    """Let a search go on until it is over; returns the nodes that it visited. `opening`: nodes that are read with the
    prompt."""
    path = {ROOT: ()}
    for node, token in enumerate(tree.tokens.tolist()):
        path[node] = path[tree.parents[node]] + (token,)
    seen = []

    def tell(node):
        below = tree.first if node == ROOT else tree.children[node]
        search.record(below, [log_probability(path[node], int(tree.tokens[child])) for child in below])

    for node in range(ROOT, opening):
        tell(node)
    search.begin(list(range(opening)))
    while segments := search.next(room):
        for segment in segments:
            for node in segment:
                tell(node)
            seen += segment
            search.visited(segment)
    return seen


def by_hand(responses, log_probability):
    return np.array([sum(log_probability(tuple(r[:k]), token) for k, token in enumerate(r)) for r in responses])


def softmax(values):
    return np.exp(values - np.logaddexp.reduce(values))


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_visit_gives_the_log_probability_of_each_path(seed):
    responses, log_probability = random_language(seed)
    tree = build_label_tree(responses)
    search = Search(tree, tolerance=0.0)
    assert sorted(run(tree, log_probability, search, room=7)) == tree.inner, "each inner node once"
    np.testing.assert_allclose(search.class_log_probabilities(), by_hand(responses, log_probability), atol=1e-12)
    assert search.unexplored == 0


@pytest.mark.parametrize(
    ("seed", "temperature", "biased"), list(itertools.product(range(5), (0.5, 1.0, 3.0), (False, True)))
)
def test_a_search_that_stops_early_is_wrong_by_no_more_than_it_says(seed, temperature, biased):
    responses, log_probability = random_language(seed)
    tree = build_label_tree(responses)
    bias = np.random.default_rng(seed).normal(0, 1, len(responses)) if biased else np.zeros(len(responses))
    search = Search(tree, 1e-2, temperature, bias, proven=2)
    seen = run(tree, log_probability, search)
    exact = by_hand(responses, log_probability) / temperature + bias
    found = search.class_log_probabilities() / temperature + bias
    assert search.unexplored <= 1e-2
    assert np.abs(softmax(found) - softmax(exact)).max() <= search.unexplored + 1e-12
    assert np.argsort(found)[-2:].tolist() == np.argsort(exact)[-2:].tolist(), "the first two are proven"
    assert len(seen) == len(set(seen))


OPENING = (2, 0, 3)  # what all responses of the next tests begin with


def opened_language(seed):
    """A language whose responses have an opening, and the sums of another language as the prior."""
    responses, log_probability = random_language(seed)
    responses = [[*OPENING, *response] for response in responses]
    prior = by_hand(responses, random_language(seed + 50)[1])
    return responses, log_probability, prior


def slow_probabilities(kind, responses, log_probability, prior, temperature, bias):
    """Class by class and token by token."""
    weights = []
    for c, response in enumerate(responses):
        tokens = [log_probability(tuple(response[:k]), token) for k, token in enumerate(response)][len(OPENING) :]
        score = math.fsum(tokens)
        if kind == "prior":
            score = score - prior[c]
        weights.append(math.exp(score / temperature + bias[c]))
    return np.array([weight / math.fsum(weights) for weight in weights])


def calibration_of(kind, prior, temperature, bias):
    return Calibration(temperature, tuple(bias), prior=tuple(prior) if kind == "prior" else None)


KINDS = list(itertools.product(("sum", "prior"), (0.3, 0.8, 1.0, 2.5), (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "temperature", "biased"), KINDS)
def test_every_kind_of_score_has_a_search_that_is_wrong_by_no_more_than_it_says(kind, temperature, biased):
    left_out = 0
    for seed in range(6):
        responses, log_probability, prior = opened_language(seed)
        bias = np.random.default_rng(seed).normal(0, 1, len(responses)) if biased else np.zeros(len(responses))
        calibration = calibration_of(kind, prior, temperature, bias)
        tree = build_label_tree(responses)
        search = Search(tree, 1e-2, *calibration.weighting(), proven=2)
        seen = run(tree, log_probability, search, opening=len(OPENING))
        left_out += len(tree.inner) - len(OPENING) - len(seen)
        sums = torch.tensor(search.class_log_probabilities()[None])
        assert search.opening == pytest.approx(by_hand([OPENING], log_probability)[0], abs=1e-12)
        found = calibration.log_probabilities(sums).exp()[0].numpy()
        exact = slow_probabilities(kind, responses, log_probability, prior, temperature, bias)
        assert search.unexplored <= 1e-2
        assert np.abs(found - exact).max() <= search.unexplored + 1e-12
        assert np.argsort(found)[-2:].tolist() == np.argsort(exact)[-2:].tolist(), "the first two are proven"
        whole = Search(tree, 0.0, *calibration.weighting())
        run(tree, log_probability, whole, opening=len(OPENING))
        exact_sums = torch.tensor(whole.class_log_probabilities()[None])
        probabilities = calibration.log_probabilities(exact_sums).exp()[0].numpy()
        np.testing.assert_allclose(probabilities, exact, rtol=1e-9, atol=1e-15)
    assert left_out > 0 or temperature > 1, "or the test says little"


@pytest.mark.parametrize(("kind", "temperature", "biased"), KINDS)
def test_no_branch_has_more_weight_than_its_bound(kind, temperature, biased):
    for seed in range(6):
        responses, log_probability, prior = opened_language(seed)
        bias = np.random.default_rng(seed).normal(0, 2, len(responses)) if biased else np.zeros(len(responses))
        divisor, offsets = calibration_of(kind, prior, temperature, bias).weighting()
        tree = build_label_tree(responses)
        search = Search(tree, 0.0, divisor, offsets)
        run(tree, log_probability, search, opening=len(OPENING))
        weights = search.weights()
        for node in tree.inner[len(OPENING) :]:
            assert np.logaddexp.reduce(weights[tree.classes_below(node)]) <= search.bound(node) + 1e-9


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_bound_of_a_branch_can_be_reached(temperature):
    """Two classes that share the probability of their branch in the most favorable way."""
    bias = np.array([0.0, 1.5, -9.0])
    tree = build_label_tree([[1, 2, END], [1, 3, END], [4, END]])
    shares = np.linspace(1e-6, 1 - 1e-6, 20_001)
    largest = -np.inf
    for share in shares:
        pair = np.log(0.4 * np.array([share, 1 - share])) / temperature + bias[:2]
        largest = max(largest, np.logaddexp.reduce(pair))
    search = Search(tree, 0.0, temperature, bias)
    search.record([0], [np.log(0.4)])
    assert tree.tokens[0] == 1 and search.bound(0) == pytest.approx(largest, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_classes_with_more_than_the_tolerance_are_visited_and_the_first_one_is_proven(seed):
    responses, log_probability = random_language(seed)
    search = Search(build_label_tree(responses), 1e-2)
    run(search.tree, log_probability, search)
    exact = by_hand(responses, log_probability)
    visited = ~np.isnan(search.reached[search.tree.leaves])
    assert visited[softmax(exact) > 1e-2].all() and not visited.all()
    assert search.class_log_probabilities().argmax() == exact.argmax()


@pytest.mark.parametrize("visited_first", [0, 1, 2])
def test_the_rest_is_each_node_that_was_not_visited_once_parents_first(visited_first):
    responses, log_probability = random_language(0, classes=60)
    tree = build_label_tree(responses)
    search = Search(tree, 1e-9)
    search.record(tree.first, [log_probability((), int(tree.tokens[node])) for node in tree.first])
    search.begin([])
    path = {ROOT: ()}
    for node, token in enumerate(tree.tokens.tolist()):
        path[node] = path[tree.parents[node]] + (token,)
    seen = []
    for _ in range(visited_first):
        for segment in search.next(5):
            for node in segment:
                search.record(
                    tree.children[node],
                    [log_probability(path[node], int(tree.tokens[child])) for child in tree.children[node]],
                )
            seen += segment
            search.visited(segment)
    rest = [node for segment in search.rest() for node in segment]
    assert sorted(seen + rest) == tree.inner and len(rest) == search.left
    known = set(seen)
    for node in rest:
        assert tree.parents[node] == ROOT or tree.parents[node] in known
        known.add(node)


def test_most_nodes_are_left_out_where_one_branch_has_almost_all():
    responses, log_probability = random_language(0, classes=300, sharpness=8.0)
    tree = build_label_tree(responses)
    seen = run(tree, log_probability, Search(tree, 1e-4))
    assert len(seen) < len(tree.inner) / 2


def test_a_label_is_visited_however_improbable():
    responses, log_probability = random_language(1, classes=100, sharpness=8.0)
    tree = build_label_tree(responses)
    exact = by_hand(responses, log_probability)
    label = int(exact.argmin())
    without, search = Search(tree, 1e-2), Search(tree, 1e-2, label=label)
    run(tree, log_probability, without)
    run(tree, log_probability, search)
    assert np.isnan(without.reached[tree.leaves[label]]), "or the test says nothing"
    assert search.class_log_probabilities()[label] == pytest.approx(exact[label], abs=1e-9)


def test_probabilities_of_a_complete_language_add_up_to_one():
    """Every sequence of one or two tokens of {1, 2} with an end."""
    responses = [[a, END] for a in (1, 2)] + [[a, b, END] for a in (1, 2) for b in (1, 2)]
    first = np.log([0.3, 0.7])
    second = np.log([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])  # 1, 2 or the end

    def log_probability(history, token):
        if not history:
            return float(first[token - 1])
        return 0.0 if len(history) == 2 else float(second[history[0] - 1, 2 if token == END else token - 1])

    search = Search(build_label_tree(responses), 0.0)
    run(search.tree, log_probability, search)
    assert math.fsum(np.exp(search.class_log_probabilities()).tolist()) == pytest.approx(1, abs=1e-12)


def test_one_token_responses_need_no_visit():
    search = Search(build_label_tree([[2], [1]]), 0.0)
    search.record(search.tree.first, [-1.0, -2.0])
    search.begin([])
    assert search.next(10) == [] and search.class_log_probabilities().tolist() == [-2, -1]

"""The tree and its searches against scoring by hand, without any model."""

import itertools
import math

import numpy as np
import pytest
import torch

from vlm.classifier.best_first import Searches
from vlm.classifier.calibration import Calibration
from vlm.classifier.label_tree import ROOT, build_label_tree

END = 99


def test_shared_beginnings_are_one_path_and_prefixes_are_leaves_of_their_own():
    tree = build_label_tree([[1, 2, END], [4, END], [1, 2, 3, END]])
    assert tree.tokens.tolist() == [1, 2, 3, END, END, 4, END]
    assert tree.parents.tolist() == [ROOT, 0, 1, 2, 1, ROOT, 5]
    assert tree.depths.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert tree.lengths.tolist() == [3, 2, 4]
    assert tree.leaves.tolist() == [4, 6, 3]
    assert tree.inner == [0, 1, 2, 5]
    parent, children = tree.below(np.array([5, ROOT, 1, 3]))
    assert parent.tolist() == [0, 1, 1, 2, 2] and children.tolist() == [6, 0, 5, 2, 4]
    assert tree.heads.tolist() == [0, 2, 5] and tree.segment_lengths.tolist() == [2, 1, 1]
    assert tree.inner_below.tolist() == [3, 1, 1] and tree.parted == [3, 1, 3]
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


def paths_of(tree):
    """The tokens up to and with each node, and () for ROOT."""
    path = {ROOT: ()}
    for node, token in enumerate(tree.tokens.tolist()):
        path[node] = path[tree.parents[node]] + (token,)
    return path


def begin(searches, languages, opening=0):
    """The prompt and the nodes that all responses begin with were read."""
    images, nodes = np.indices((len(languages), opening + 1)).reshape(2, -1)
    tell(searches, languages, images, nodes - 1)
    searches.begin(opening)


def tell(searches, languages, images, nodes):
    """Nodes are run through a language of each image."""
    path = paths_of(searches.tree)
    parent, children = searches.tree.below(nodes)
    pairs = zip(parent.tolist(), searches.tree.tokens[children].tolist(), strict=True)
    searches.record(images, nodes, np.array([languages[images[k]](path[int(nodes[k])], token) for k, token in pairs]))


def run(tree, log_probability, search, room=10_000, opening=0):
    """Let a search of one image go on until it is over; returns the nodes that it visited. `opening`: nodes that are
    read with the prompt."""
    begin(search, [log_probability], opening)
    seen = []
    while (chosen := search.wanted(room)).any():
        images, nodes = search.nodes(chosen)
        tell(search, [log_probability], images, nodes)
        seen += nodes.tolist()
    return seen


def by_hand(responses, log_probability):
    return np.array([sum(log_probability(tuple(r[:k]), token) for k, token in enumerate(r)) for r in responses])


def softmax(values):
    return np.exp(values - np.logaddexp.reduce(values))


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_visit_gives_the_log_probability_of_each_path(seed):
    responses, log_probability = random_language(seed)
    tree = build_label_tree(responses)
    search = Searches(tree, 1, tolerance=0.0)
    assert sorted(run(tree, log_probability, search, room=7)) == tree.inner, "each inner node once"
    np.testing.assert_allclose(search.class_log_probabilities()[0], by_hand(responses, log_probability), atol=1e-12)
    assert search.unexplored == 0


@pytest.mark.parametrize(
    ("seed", "temperature", "biased"), list(itertools.product(range(5), (0.5, 1.0, 3.0), (False, True)))
)
def test_a_search_that_stops_early_is_wrong_by_no_more_than_it_says(seed, temperature, biased):
    responses, log_probability = random_language(seed)
    tree = build_label_tree(responses)
    bias = np.random.default_rng(seed).normal(0, 1, len(responses)) if biased else np.zeros(len(responses))
    search = Searches(tree, 1, 1e-2, temperature, bias, proven=2)
    seen = run(tree, log_probability, search)
    exact = by_hand(responses, log_probability) / temperature + bias
    found = search.class_log_probabilities()[0] / temperature + bias
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
        search = Searches(tree, 1, 1e-2, *calibration.weighting(), proven=2)
        seen = run(tree, log_probability, search, opening=len(OPENING))
        left_out += len(tree.inner) - len(OPENING) - len(seen)
        sums = torch.tensor(search.class_log_probabilities()[0][None])
        assert search.opening[0] == pytest.approx(by_hand([OPENING], log_probability)[0], abs=1e-12)
        found = calibration.log_probabilities(sums).exp()[0].numpy()
        exact = slow_probabilities(kind, responses, log_probability, prior, temperature, bias)
        assert search.unexplored <= 1e-2
        assert np.abs(found - exact).max() <= search.unexplored + 1e-12
        assert np.argsort(found)[-2:].tolist() == np.argsort(exact)[-2:].tolist(), "the first two are proven"
        whole = Searches(tree, 1, 0.0, *calibration.weighting())
        run(tree, log_probability, whole, opening=len(OPENING))
        exact_sums = torch.tensor(whole.class_log_probabilities()[0][None])
        probabilities = calibration.log_probabilities(exact_sums).exp()[0].numpy()
        np.testing.assert_allclose(probabilities, exact, rtol=1e-9, atol=1e-15)
    assert left_out > 0 or temperature > 1, "or the test says little"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_evidence_of_each_image_is_part_of_its_own_search(temperature):
    """A batch whose images have other evidence finds for each what a search of this image alone finds, and is wrong by
    no more than it says."""
    left_out = 0
    for seed in range(4):
        responses, log_probability, _ = opened_language(seed)
        tree = build_label_tree(responses)
        evidence = torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (3, len(responses))))
        calibration = Calibration(temperature, evidence=0.7)
        for i in range(3):
            search = Searches(tree, 1, 1e-2, *calibration.weighting(evidence[i : i + 1]))
            seen = run(tree, log_probability, search, opening=len(OPENING))
            left_out += len(tree.inner) - len(OPENING) - len(seen)
            sums = torch.tensor(search.class_log_probabilities()[0][None])
            joined = calibration.with_evidence(sums, evidence[i : i + 1])
            found = calibration.log_probabilities(joined).exp()[0].numpy()
            bias = 0.7 * evidence[i].numpy() / temperature
            exact = slow_probabilities("sum", responses, log_probability, None, temperature, bias)
            assert np.abs(found - exact).max() <= search.unexplored + 1e-12 and search.unexplored <= 1e-2
            assert found.argmax() == exact.argmax()
    assert left_out > 0, "or the test says little"


@pytest.mark.parametrize(("kind", "temperature", "biased"), KINDS)
def test_no_branch_has_more_weight_than_its_bound(kind, temperature, biased):
    for seed in range(6):
        responses, log_probability, prior = opened_language(seed)
        bias = np.random.default_rng(seed).normal(0, 2, len(responses)) if biased else np.zeros(len(responses))
        divisor, offsets = calibration_of(kind, prior, temperature, bias).weighting()
        tree = build_label_tree(responses)
        search = Searches(tree, 1, 0.0, divisor, offsets)
        run(tree, log_probability, search, opening=len(OPENING))
        weights = search.weights()[0]
        for node, bound in zip(tree.heads.tolist(), search.bounds()[0], strict=True):
            if node >= len(OPENING):
                assert np.logaddexp.reduce(weights[tree.classes_below(node)]) <= bound + 1e-9


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
    search = Searches(tree, 1, 0.0, temperature, bias)
    search.record(np.array([0]), np.array([ROOT]), np.log([0.4, 0.6]))
    assert tree.tokens[tree.heads[0]] == 1 and search.bounds()[0, 0] == pytest.approx(largest, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_classes_with_more_than_the_tolerance_are_visited_and_the_first_one_is_proven(seed):
    responses, log_probability = random_language(seed)
    search = Searches(build_label_tree(responses), 1, 1e-2)
    run(search.tree, log_probability, search)
    exact = by_hand(responses, log_probability)
    visited = ~np.isnan(search.reached[0, search.tree.leaves])
    assert visited[softmax(exact) > 1e-2].all() and not visited.all()
    assert search.class_log_probabilities()[0].argmax() == exact.argmax()


@pytest.mark.parametrize("visited_first", [0, 1, 2])
def test_the_rest_is_each_node_that_was_not_visited_once_parents_first(visited_first):
    responses, log_probability = random_language(0, classes=60)
    tree = build_label_tree(responses)
    search = Searches(tree, 1, 1e-9)
    begin(search, [log_probability])
    seen = []
    for _ in range(visited_first):
        images, nodes = search.nodes(search.wanted(5))
        tell(search, [log_probability], images, nodes)
        seen += nodes.tolist()
    left = search.left[0]
    images, rest = search.nodes(search.open, whole=True)
    assert sorted(seen + rest.tolist()) == tree.inner and len(rest) == left
    known = {ROOT, *seen}
    for node in rest:
        assert tree.parents[node] in known
        known.add(node)
    tell(search, [log_probability], images, rest)
    assert not search.open.any() and search.unexplored[0] == 0
    np.testing.assert_allclose(search.class_log_probabilities()[0], by_hand(responses, log_probability), atol=1e-12)


class Plain:
    """The same search for one image, node by node: what `Searches` has to do for each image of a batch."""

    def __init__(self, tree, tolerance, label, proven, log_probability, path):
        self.tree, self.tolerance, self.label, self.proven = tree, tolerance, label, proven
        self.model, self.path, self.reached, self.open = log_probability, path, {ROOT: 0.0}, {}
        self.visit([ROOT])

    def below(self, node):
        return [child for child in range(len(self.tree.tokens)) if self.tree.parents[child] == node]

    def visit(self, nodes):
        for node in nodes:
            self.open.pop(node, None)
            for child in self.below(node):
                self.reached[child] = self.reached[node] + self.model(self.path[node], int(self.tree.tokens[child]))
                if self.below(child) and child not in nodes:
                    self.open[child] = math.exp(self.reached[child])

    def wanted(self, room):
        ranked = sorted(self.open, key=lambda node: (-self.open[node], node))
        found = sorted(math.exp(self.reached.get(leaf, -math.inf)) for leaf in self.tree.leaves.tolist())
        count, total = 0, sum(found) + sum(self.open.values())
        while count < len(ranked) and (
            not self.tolerance or sum(map(self.open.get, ranked[count:])) > self.tolerance * total
        ):
            count += 1
        last = found[-self.proven]
        count = count or min(self.proven, sum(value > last for value in self.open.values()))
        own = [n for n in ranked if self.label is not None and n <= self.tree.leaves[self.label] < self.tree.ends[n]]
        chosen = []
        for node in [*own, *(n for n in ranked[:count] if n not in own)]:
            segment = [node]
            while len(below := self.below(segment[-1])) == 1 and self.below(below[0]):
                segment += below
            room -= len(segment)
            if room < 0 and chosen:
                break
            chosen += segment
        return sorted(chosen)


def tied(history, token):
    """Every next token is equally probable, whatever it follows."""
    return -math.log(7)


@pytest.mark.parametrize(
    ("classes", "tolerance", "room", "proven"), [(1, 1e-2, 4, 1), (2, 0.0, 1, 1), (40, 1e-3, 9, 3), (90, 0.05, 50, 90)]
)
def test_the_searches_of_a_batch_visit_the_nodes_of_plain_ones_in_the_same_passes(classes, tolerance, room, proven):
    responses, first = random_language(classes, classes, length=5)
    others = [random_language(seed, sharpness=sharpness)[1] for seed, sharpness in ((1, 8.0), (2, 0.5))]
    languages = [first, *others, tied]
    tree = build_label_tree(responses)
    labels = [0, len(responses) - 1, len(responses) // 2, 0]
    searches = Searches(tree, len(languages), tolerance, labels=labels, proven=proven)
    begin(searches, languages)
    path, least = paths_of(tree), min(proven, len(responses))
    plain = [Plain(tree, tolerance, c, least, language, path) for c, language in zip(labels, languages, strict=True)]
    for _ in range(len(tree.tokens) + 1):
        images, nodes = searches.nodes(searches.wanted(room))
        expected = [search.wanted(room) for search in plain]
        assert [nodes[images == i].tolist() for i in range(len(languages))] == expected
        tell(searches, languages, images, nodes)
        for search, some in zip(plain, expected, strict=True):
            search.visit(some)
        own = tree.leaves[None].repeat(len(languages), 0)
        needed = [[any(n <= o < tree.ends[n] for o in search.open) for n in tree.leaves] for search in plain]
        assert searches.needed(np.arange(len(languages)), own).tolist() == needed
    assert not any(expected)
    for found, search, language in zip(searches.class_log_probabilities(), plain, languages, strict=True):
        exact, visited = by_hand(responses, language), [leaf in search.reached for leaf in tree.leaves.tolist()]
        np.testing.assert_allclose(found[visited], exact[visited], atol=1e-12)
    rest = [sum(search.open.values()) for search in plain]
    known = [sum(math.exp(search.reached.get(leaf, -math.inf)) for leaf in tree.leaves.tolist()) for search in plain]
    np.testing.assert_allclose(searches.unexplored, np.array(rest) / np.add(rest, known), atol=1e-12)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_thousand_classes_of_many_images_are_as_exact_as_they_say(tolerance):
    """Names that share beginnings, that begin others, and that are numbers."""
    names = [(1, *digits) for digits in itertools.product(range(5), repeat=4)] + [(2,), (2, 2), (2, 2, 2)]
    names += [(3, *digits) for digits in itertools.product(range(5), repeat=3)] + [(4, k) for k in range(100, 347)]
    responses = [[*name, END] for name in names]
    assert len(responses) == 1000
    generator = np.random.default_rng(0)
    tree = build_label_tree(responses)
    values = generator.normal(0, 3, (6, len(tree.tokens) + 1))  # of the nodes of each image
    for image, node in itertools.product(range(6), range(ROOT, len(tree.tokens))):
        _, below = tree.below(np.array([node]))
        if len(below):
            values[image, below] -= np.logaddexp.reduce(values[image, below])
    searches = Searches(tree, 6, tolerance)
    images, nodes = np.arange(6), np.full(6, ROOT)
    while len(nodes):
        parent, children = tree.below(nodes)
        searches.record(images, nodes, values[images[parent], children])
        images, nodes = searches.nodes(searches.wanted(60))
    exact = np.zeros((6, 1000))
    for c, node in enumerate(tree.leaves):
        while node != ROOT:
            exact[:, c] += values[:, node]
            node = tree.parents[node]
    found = np.exp(searches.class_log_probabilities())
    assert (searches.unexplored <= tolerance).all()
    assert (np.abs(found / found.sum(1, keepdims=True) - np.exp(exact)).max(1) <= searches.unexplored + 1e-12).all()
    assert found.argmax(1).tolist() == exact.argmax(1).tolist()


def test_most_nodes_are_left_out_where_one_branch_has_almost_all():
    responses, log_probability = random_language(0, classes=300, sharpness=8.0)
    tree = build_label_tree(responses)
    seen = run(tree, log_probability, Searches(tree, 1, 1e-4))
    assert len(seen) < len(tree.inner) / 2


def test_a_label_is_visited_however_improbable():
    responses, log_probability = random_language(1, classes=100, sharpness=8.0)
    tree = build_label_tree(responses)
    exact = by_hand(responses, log_probability)
    label = int(exact.argmin())
    without, search = Searches(tree, 1, 1e-2), Searches(tree, 1, 1e-2, labels=[label])
    run(tree, log_probability, without)
    run(tree, log_probability, search)
    assert np.isnan(without.reached[0, tree.leaves[label]]), "or the test says nothing"
    assert search.class_log_probabilities()[0][label] == pytest.approx(exact[label], abs=1e-9)


def test_probabilities_of_a_complete_language_add_up_to_one():
    """Every sequence of one or two tokens of {1, 2} with an end."""
    responses = [[a, END] for a in (1, 2)] + [[a, b, END] for a in (1, 2) for b in (1, 2)]
    first = np.log([0.3, 0.7])
    second = np.log([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])  # 1, 2 or the end

    def log_probability(history, token):
        if not history:
            return float(first[token - 1])
        return 0.0 if len(history) == 2 else float(second[history[0] - 1, 2 if token == END else token - 1])

    search = Searches(build_label_tree(responses), 1, 0.0)
    run(search.tree, log_probability, search)
    assert math.fsum(np.exp(search.class_log_probabilities()[0]).tolist()) == pytest.approx(1, abs=1e-12)


def test_one_token_responses_need_no_visit():
    search = Searches(build_label_tree([[2], [1]]), 1, 0.0)
    search.record(np.array([0]), np.array([ROOT]), np.array([-1.0, -2.0]))
    search.begin(0)
    assert not search.wanted(10).any() and search.class_log_probabilities()[0].tolist() == [-2, -1]

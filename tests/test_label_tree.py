"""The tree against scoring by hand, without any model."""

import math

import pytest
import torch

from vlm.label_tree import build_label_tree, class_log_probabilities

END = 99


def test_shared_beginnings_are_one_path_and_prefixes_are_leaves_of_their_own():
    tree = build_label_tree([[1, 2, END], [1, 2, 3, END], [4, END]])
    assert tree.tokens.tolist() == [1, 2, END, 3, END, 4, END]
    assert tree.lengths.tolist() == [3, 4, 2]
    assert tree.inner_tokens.tolist() == [1, 2, 3, 4]
    assert tree.inner_depths.tolist() == [0, 1, 2, 0]
    sees = [[int(x) for x in row] for row in tree.inner_mask]
    assert sees == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert tree.predictor.tolist() == [0, 1, 2, 2, 3, 0, 4]


def test_class_log_probability_is_the_sum_over_its_path():
    tree = build_label_tree([[1, 2, END], [1, 2, 3, END], [4, END]])
    nodes = torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7]])
    expected = torch.tensor([[-0.6, -1.2, -1.3]])
    torch.testing.assert_close(class_log_probabilities(tree, nodes), expected)


def test_probabilities_of_all_sequences_of_a_small_language_add_up_to_one():
    """Every sequence of one or two tokens of {1, 2} with an end: a complete set, so the tree's posterior has the mass 1."""
    responses = [[a, END] for a in (1, 2)] + [[a, b, END] for a in (1, 2) for b in (1, 2)]
    tree = build_label_tree(responses)
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(2, generator=generator).log_softmax(0)  # 1 or 2
    second = torch.rand(2, 3, generator=generator).log_softmax(1)  # 1, 2 or the end
    by_hand = {(a, END): first[a - 1] + second[a - 1, 2] for a in (1, 2)}
    by_hand |= {(a, b, END): first[a - 1] + second[a - 1, b - 1] for a in (1, 2) for b in (1, 2)}
    values = []
    for node, token in enumerate(tree.tokens.tolist()):
        row = tree.predictor[node].item()
        if row == 0:
            values.append(first[token - 1])
        elif tree.inner_depths[row - 1] == 0:
            values.append(second[tree.inner_tokens[row - 1] - 1, 2 if token == END else token - 1])
        else:
            values.append(torch.tensor(0.0))  # after two tokens only the end can come
    scores = class_log_probabilities(tree, torch.stack(values).unsqueeze(0))[0]
    for score, response in zip(scores, responses, strict=True):
        assert score == pytest.approx(by_hand[tuple(response)].item(), abs=1e-6)
    assert math.fsum(scores.exp().tolist()) == pytest.approx(1, abs=1e-6)


def test_one_token_responses_need_no_inner_node():
    tree = build_label_tree([[1], [2]])
    assert len(tree.inner_tokens) == 0
    assert class_log_probabilities(tree, torch.tensor([[-1.0, -2.0]])).tolist() == [[-1, -2]]


@pytest.mark.parametrize("responses", [[[1], []], [[1, 2], [1, 2]], [[1], [1, 2]], [[1, 2], [1]]])
def test_responses_that_are_empty_equal_or_begin_another_are_refused(responses):
    with pytest.raises(ValueError, match="empty, or equals or begins"):
        build_label_tree(responses)

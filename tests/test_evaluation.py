"""Metrics of a split, from the class scores."""

import pytest
import torch
from tiny import random_image, save_tiny_model, tiny_classifier

from train_vlm import evaluate_vlm_model, vlm_collate_fn
from vlm.classifier.batching import IGNORED
from vlm.common.modes import evaluation_mode
from vlm.conversation.prompts import parse_answer
from vlm.data import Rows, Split
from vlm.evaluation.evaluate import check_texts, explanations, score_split

LABELS = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tiny_classifier(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def split():
    images = [random_image(i) for i in range(len(LABELS))]
    return Split(Rows(images, LABELS, [f"image {i}" for i in range(len(LABELS))]), range(len(LABELS)), LABELS)


def test_metrics_follow_from_the_scores(classifier, split):
    scores = score_split(classifier, split, batch_size=4)
    result = evaluate_vlm_model(classifier, split, batch_size=3, metrics=[top_two])
    truth = torch.tensor(LABELS)
    assert result["accuracy"] == pytest.approx((scores.argmax(1) == truth).double().mean().item())
    posterior = scores.log_softmax(1)
    assert result["nll"] == pytest.approx(-posterior[torch.arange(len(LABELS)), truth].mean().item(), rel=1e-5)
    best_two = scores.topk(2).indices
    assert result["own_metrics"]["top_two"] == pytest.approx(
        (best_two == truth.unsqueeze(1)).any(1).double().mean().item()
    )
    assert sum(map(sum, result["confusion_matrix"])) == len(LABELS)


def top_two(labels, predictions, probabilities, class_names):
    assert predictions.tolist() == probabilities.argmax(1).tolist() and len(class_names) == probabilities.shape[1]
    return float((probabilities.argsort(1)[:, -2:] == labels[:, None]).any(1).mean())


def test_loss_is_the_training_loss(classifier, split):
    """The mean cross entropy of a response token: what the training minimizes, from the scores alone."""
    batch = vlm_collate_fn([split[i] for i in range(len(split))], classifier.family, classifier.rendered)
    classifier.eval()
    with torch.no_grad():
        output = classifier(batch)
    assert int(output.tokens) == int((batch.targets != IGNORED).sum())
    result = evaluate_vlm_model(classifier, split)
    assert result["loss"] == pytest.approx(float(output.loss / output.tokens), rel=1e-5)


def test_a_share_of_the_samples_can_be_scored_alone(classifier, split):
    whole = score_split(classifier, split)
    share = score_split(classifier, split, indices=range(1, len(split), 2))
    torch.testing.assert_close(share, whole[1::2], rtol=1e-6, atol=1e-4)
    assert score_split(classifier, split, indices=[]).shape == (0, 7)


def test_loader_processes_give_the_same_scores(classifier, split):
    torch.testing.assert_close(
        score_split(classifier, split, workers=2), score_split(classifier, split), rtol=0, atol=0
    )


def test_evaluation_leaves_the_mode_as_it_was(classifier, split):
    for mode in (True, False):
        classifier.train(mode)
        score_split(classifier, split, indices=[0])
        explanations(classifier, split, [0], [0])
        assert classifier.training is mode
        with pytest.raises(ZeroDivisionError), evaluation_mode(classifier):
            assert not classifier.training
            raise ZeroDivisionError
        assert classifier.training is mode


def test_texts_without_an_answer_are_invalid_and_never_a_class(classifier, split):
    """A model with random weights writes nonsense."""
    counts = check_texts(classifier, split, count=5)
    assert counts == {"texts": 5, "invalid": 5, "agree_with_prediction": 0, "reasoning_names_answer": 0}


@pytest.mark.parametrize(
    ("text", "agrees", "invalid", "named"),
    [
        ("Reasoning: a catfish, no doubt.\nAnswer: {}", 3, 0, 0),
        ("Reasoning: this is {} I think.\nAnswer: {}", 3, 0, 3),
        ("Reasoning: cat\nAnswer: a dog", 0, 3, 0),
    ],
)
def test_free_texts_are_counted_by_answer_and_reasoning(classifier, split, monkeypatch, text, agrees, invalid, named):
    prediction = classifier.class_names[int(score_split(classifier, split, indices=[0])[0].argmax())]
    assert prediction not in ("cat", "catfish"), "or the texts above would say something else"
    monkeypatch.setattr(
        "vlm.evaluation.evaluate.write_freely",
        lambda classifier, reading: [text.format(prediction, prediction)] * len(reading.states),
    )
    same = split.take([0, 0, 0])
    expected = {
        "texts": 3,
        "invalid": invalid,
        "agree_with_prediction": agrees,
        "reasoning_names_answer": named,
    }
    assert check_texts(classifier, same) == expected


def test_texts_of_chosen_images_come_in_the_order_asked_for(classifier, split):
    alone = [explanations(classifier, split, [i], [c])[0] for i, c in ((7, 1), (2, 0), (4, 3))]
    assert [parse_answer(text, classifier.class_names) for text in alone] == [
        classifier.class_names[c] for c in (1, 0, 3)
    ]
    assert explanations(classifier, split, [7, 2, 4], [1, 0, 3], batch_size=2) == alone
    assert explanations(classifier, split, [], []) == []

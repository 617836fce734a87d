"""The look at one sample before the first step."""

import pytest
from tiny import samples, save_tiny_model, tiny_classifier

from vlm.errors import UsageError
from vlm.setup import preflight


@pytest.fixture
def classifier(tmp_path):
    return tiny_classifier(save_tiny_model(tmp_path / "model"))


def test_the_response_and_nothing_else_is_marked_as_being_in_the_loss(classifier, capsys):
    preflight(classifier, samples([3])[0])
    printed = capsys.readouterr().err.replace("\n  | ", "\n")
    before, marked = printed.rsplit("[[", 1)
    assert marked.strip().removesuffix("]]") == f"{classifier.prompts.responses[3]}<end_of_utterance>"
    assert classifier.prompts.system in before and classifier.prompts.question in before
    assert "<image> x 4<fake_token_around_image>" in before
    assert "with 4 picture tokens" in before


def test_a_sample_without_a_picture_token_stops(classifier, monkeypatch):
    encode = classifier.family.encode_pictures
    monkeypatch.setattr(classifier.family, "encode_pictures", lambda pictures: encode(pictures).__class__({}, [[5, 6] for _ in pictures]))
    with pytest.raises(UsageError, match="no picture token"):
        preflight(classifier, samples([3])[0])


def test_a_sample_without_a_response_token_stops(classifier):
    classifier.rendered.response_ids[3] = []
    with pytest.raises(UsageError, match="no response token"):
        preflight(classifier, samples([3])[0])


def test_token_counts_that_do_not_match_the_features_stop_the_forward(classifier):
    batch = classifier.collate(with_response=True)(samples([0]))
    batch["picture_places"] = batch["picture_places"][:3]
    with pytest.raises(RuntimeError, match="3 picture tokens in the text, 4 picture features"):
        classifier(batch)

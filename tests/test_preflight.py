"""The look at one sample before the first step."""

from dataclasses import replace

import pytest
import torch
from tiny import samples, save_tiny_model, tiny_classifier

from vlm.common.errors import RunError, UsageError
from vlm.config import resolve
from vlm.families import cache_root
from vlm.training.preflight import preflight, settings_rows


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
    assert "4 of them image tokens" in before


def test_a_sample_without_a_image_token_stops(classifier, monkeypatch):
    encode = classifier.family.encode_images
    monkeypatch.setattr(
        classifier.family, "encode_images", lambda images: encode(images).__class__({}, [[5, 6] for _ in images])
    )
    with pytest.raises(UsageError, match="no image token"):
        preflight(classifier, samples([3])[0])


def test_a_sample_without_a_response_token_stops(classifier):
    classifier.rendered.response_ids[3] = []
    with pytest.raises(UsageError, match="no response token"):
        preflight(classifier, samples([3])[0])


def test_token_counts_that_do_not_match_the_features_stop_the_forward(classifier):
    batch = classifier.collate(with_response=True)(samples([0]))
    batch = replace(batch, image_places=batch.image_places[:3])
    with pytest.raises(RunError, match="3 image tokens, and the vision encoder gives 4 features"):
        classifier(batch)


def test_the_settings_say_what_is_faster_how_many_work_and_where_features_are_kept(classifier):
    def rows(processes, **more):
        settings = resolve({"model": "x"} | more).complete(more["batch_size"], "both")
        return dict(settings_rows(settings, classifier, "cpu", torch.float32, processes))

    one, two = rows(1, batch_size=1), rows(2, batch_size=8, tune="full")
    assert (
        one["batch size"] == "1 (with --batch-size 8 a step is faster; it needs more memory)" and "processes" not in one
    )
    assert one["vision features"] == f"kept in {cache_root()}, all runs together at most 20 GB (--cache-size)"
    assert two["batch size"] == "8" and two["processes"].startswith("2, ") and "vision features" not in two


def test_the_settings_have_all_that_differs_from_the_defaults(classifier):
    def rows(**more):
        settings = resolve({"model": "x"} | more).complete(more.get("batch_size", 8), "both")
        return dict(settings_rows(settings, classifier, "cpu", torch.float32, 1))

    usual = rows()
    given = {"max_samples": 64, "class_balance": True, "prompt_template": "a" * 300, "track": ["wandb"]}
    changed = rows(augment="light", augment_turns=True, **given)
    new = {"augmentation", "max samples", "class balance", "prompt template", "report to"}
    assert changed.keys() - usual.keys() == new, "as their flags are called"
    assert changed["augmentation"] == (
        "4 views of each training image: itself, and others changed as by --augment light, turned by quarters"
    )
    assert (changed["max samples"], changed["class balance"]) == ("64", "yes") and len(changed["prompt template"]) <= 80
    assert rows(augment_turns=True)["augmentation"].endswith("itself, and others turned by quarters")
    assert rows(tune="full", batch_size=16).keys() == usual.keys() - {"vision features"}, "what follows is no change"


def test_the_settings_say_that_the_class_list_is_left_out(classifier):
    def rows(**more):
        settings = resolve({"model": "x"} | more).complete(8, "both")
        return dict(settings_rows(settings, classifier, "cpu", torch.float32, 1))

    assert "class list" not in rows()
    classifier.prompts = replace(classifier.prompts, class_names=tuple(f"a long name {i}" for i in range(600)))
    assert rows()["class list"] == (
        "not in the prompt: it has 10,088 characters, above 8,192 (--system-instructions with {classes} puts it there)"
    )
    assert "class list" not in rows(system_instructions="One of {classes}")

"""What is trained in each mode, and that merged weights say the same as unmerged ones."""

import pytest
import torch
from tiny import batch_of, save_classifier, save_tiny_model, tiny_classifier
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm.classifier.classifier import VLMClassifier
from vlm.config import resolve
from vlm.families import load_family
from vlm.inference.predictor import load_model_and_metadata
from vlm.training.tuning import merged_state_dict, parameter_groups, prepare_tuning, trained_parameters


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), tie=request.param)


def prepared(folder, tune, **more):
    classifier = tiny_classifier(folder)
    prepare_tuning(classifier.family, resolve({"tune": tune} | more))
    return classifier


def train_a_little(classifier):
    """Three large steps, so that every trained weight moves."""
    optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.0, 0.02, 0.02))
    classifier.train()
    for _ in range(3):
        classifier(batch_of(classifier, [0, 1, 2, 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return classifier.eval()


def scores(classifier):
    return classifier.score(classifier.read(batch_of(classifier, [0, 0, 0], with_response=False)))


def test_each_mode_trains_its_parts_and_nothing_else(folder):
    names = {tune: set(trained_parameters(prepared(folder, tune).model)) for tune in ("full", "connector", "lora")}
    assert names["full"] == {name for name, _ in tiny_classifier(folder).model.named_parameters()}
    assert names["connector"] == {name for name in names["full"] if "connector" in name}
    assert names["connector"] < names["lora"]
    lora = names["lora"] - names["connector"]
    assert all(".lora_A." in name or ".lora_B." in name for name in lora)
    assert len(lora) == 2 * 2 * 7, "two matrices on each of the seven linear layers of the two text layers"
    assert all("text_model" in name for name in lora)
    assert set(trained_parameters(prepared(folder, "lora", freeze_connector=True).model)) == lora


@pytest.mark.parametrize("tune", ["full", "connector", "lora"])
def test_frozen_weights_stay_and_trained_ones_move(folder, tune):
    classifier = prepared(folder, tune)
    before = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
    train_a_little(classifier)
    moved = {name for name, p in classifier.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_saved_and_reloaded_model_gives_the_same_scores(folder, tmp_path, tune):
    """Reloaded by our inference and by plain transformers; LoRA merged against unmerged."""
    classifier = train_a_little(prepared(folder, tune))
    expected = scores(classifier)
    assert (expected - scores(tiny_classifier(folder).eval())).abs().max() > 0.1, (
        "training should have changed something"
    )
    metadata = {"class_names": list(classifier.class_names), "prompts": classifier.prompts.to_json()}
    before = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}
    save_classifier(tmp_path / "model", classifier, metadata, torch.float32)
    after = classifier.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "saving must not touch the model"

    model, processor, loaded = load_model_and_metadata(tmp_path / "model", device="cpu")
    assert loaded["class_names"] == metadata["class_names"]
    torch.testing.assert_close(scores(model), expected, rtol=1e-6, atol=1e-4)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in plain.state_dict())
    merged = merged_state_dict(classifier.model, torch.float32)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, merged[name]), name
    assert AutoProcessor.from_pretrained(tmp_path / "model").image_processor.do_image_splitting is False
    assert sorted(p.name for p in (tmp_path / "model").iterdir() if p.suffix in (".bin", ".pt", ".pkl")) == []


def test_posterior_of_merged_weights_equals_the_unmerged_one(folder, tmp_path):
    classifier = train_a_little(prepared(folder, "lora"))
    save_classifier(
        tmp_path / "model", classifier, {"class_names": [], "prompts": classifier.prompts.to_json()}, torch.float32
    )
    merged = VLMClassifier(
        load_family(tmp_path / "model", torch.float32, torch.device("cpu")), classifier.prompts
    ).eval()
    torch.testing.assert_close(scores(merged).softmax(-1), scores(classifier).softmax(-1), rtol=0, atol=1e-5)


def test_a_frozen_vision_tower_keeps_no_graph(folder):
    classifier = prepared(folder, "lora")
    seen = []
    whole = classifier.family.vision_features
    classifier.family.vision_features = lambda inputs: seen.append(whole(inputs)) or seen[-1]
    classifier(batch_of(classifier, [0]))
    assert not seen[0].requires_grad
    classifier = prepared(folder, "full")
    whole_full = classifier.family.vision_features
    classifier.family.vision_features = lambda inputs: seen.append(whole_full(inputs)) or seen[-1]
    classifier(batch_of(classifier, [0]))
    assert seen[1].requires_grad


def test_trained_weights_are_float32_where_the_rest_is_bfloat16(folder):
    family = load_family(folder, torch.bfloat16, torch.device("cpu"))
    prepare_tuning(family, resolve({"tune": "lora"}))
    assert {p.dtype for p in family.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in family.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_only_matrices_are_decayed(folder):
    classifier = prepared(folder, "full")
    groups = parameter_groups(classifier, 0.1, 1e-3, 1e-3)
    for group in groups:
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert sum(len(group["params"]) for group in groups) == len(trained_parameters(classifier))


def test_the_connector_may_have_a_learning_rate_of_its_own(folder):
    classifier = prepared(folder, "lora")
    connector = {id(p) for p in classifier.family.connector.parameters()}
    rates = {
        id(p) in connector: group["peak_lr"]
        for group in parameter_groups(classifier, 0.1, 1e-4, 1e-3)
        for p in group["params"]
    }
    assert rates == {False: 1e-4, True: 1e-3}

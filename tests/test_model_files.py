"""Folders of models that are damaged, hostile or no models: refused in a line or two that name the file and the cure,
before anything is loaded, in training and in inference."""

import json
import os
import re
import shutil

import pytest
import torch
from commands import TRACEBACK, classify, train
from safetensors.torch import load_file, save_file
from test_data import images
from tiny import tiny_prompts

from vlm.classifier import VLMClassifier
from vlm.common import UsageError
from vlm.families import load_family

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
FILES = {
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors",
}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def link_outside(path):
    outside = path.parent.with_name(f"outside {path.name}")
    path.rename(outside)
    path.symlink_to(outside)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nested too deep": lambda path: path.write_text("[" * 100_000),
    "no JSON and no template": lambda path: path.write_text("{% for x in %}{{"),
    "a Git LFS pointer": lambda path: path.write_text(POINTER),
    "a folder": replace_by_folder,
    "a pipe": pipe,
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link out of the folder": link_outside,
}


def render(folder):
    """All that a program does with a folder before it sees an image."""
    return VLMClassifier(load_family(folder, torch.float32, CPU, {}), tiny_prompts())


def refused(folder, *said):
    with pytest.raises(UsageError) as error:
        render(folder)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and len(message) < 500, message
    for text in said:
        assert text in message
    return message


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(folder, **changes):
    """Set keys of config.json; `a__b` is the key b of the object a."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (config[part] if part else config)[key] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sorted(FILES))
def test_every_damaged_file_is_named_with_a_cure(model, name, damage):
    assert {path.name for path in model.iterdir()} == FILES
    DAMAGES[damage](model / name)
    message = refused(model, str(model / name))
    assert re.search(r"again|git lfs pull|Copy the file", message), message


@pytest.mark.parametrize("name", sorted(FILES - {"generation_config.json", "tokenizer_config.json"}))
def test_every_missing_file_is_named(model, name):
    (model / name).unlink()
    named = {"model.safetensors": "*.safetensors", "processor_config.json": "preprocessor_config.json"}
    refused(model, named.get(name, name), str(model))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config__num_hidden_layers": 10**9}, "says num_hidden_layers: 1000000000, expected"),
        ({"text_config__num_hidden_layers": -1}, "says num_hidden_layers: -1, expected"),
        ({"text_config__num_hidden_layers": 3}, "9 are missing, such as model.text_model.layers.2."),
        ({"text_config__hidden_size": 10**9}, "describes a model of 1,217,000,005,520 weights, but its files have"),
        ({"text_config__vocab_size": 10**7}, "weights, but its files have"),
        ({"text_config__hidden_size": 20}, "instead of (430, 20), and"),
        ({"text_config__hidden_size": "x"}, "does not describe a model of the type idefics3"),
        ({"text_config__num_attention_heads": -1}, "does not describe a model that can be built"),
        ({"scale_factor": 0}, "config.json"),
        ({"text_config": []}, "does not describe a model of the type idefics3"),
        ({"model_type": ["idefics3"]}, "names no model_type"),
        ({"dtype": "nothing"}, "does not describe a model of the type idefics3"),
    ],
)
def test_a_configuration_that_is_not_that_of_the_weights_is_refused(model, changes, said):
    change(model, **changes)
    refused(model, said, "config.json" if "missing" not in said else str(model))


def test_layers_that_the_configuration_leaves_out_are_said(model, capsys):
    change(model, text_config__num_hidden_layers=1)
    render(model)
    assert "has fewer layers than the weights: 9 weights are not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].nothing.at_all }}", "does not work ("),
        ("{{ messages.__class__.__mro__ }}", "does not work (access to attribute '__class__'"),
        ("Hello", "drops the instructions, the question, the image or the answer"),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}"
            "{% endfor %}{% endfor %}",
            "drops the instructions, the question, the image or the answer",
        ),
    ],
)
def test_a_chat_template_that_does_not_work_is_named(model, template, said):
    (model / "chat_template.jinja").write_text(template)
    refused(model, "chat_template.jinja", said)


def test_checksums_that_are_a_pipe_are_not_waited_for(model):
    os.mkfifo(model / "checksums.json")
    refused(model, f"{model / 'checksums.json'} cannot be read")


def test_a_tokenizer_of_another_model_is_named(model):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    classifier = render(model)
    word = classifier.family.tokenizer.convert_ids_to_tokens(classifier.rendered.question_ids[3])
    content["model"]["vocab"][word] = 5000
    path.write_text(json.dumps(content))
    refused(model, f"the tokenizer in {model} is that of another model: it writes token 5000, and the model knows")
    classifier.family.end_of_turn = "<end>"
    with pytest.raises(UsageError, match=f"the tokenizer in {model} has no token <end>"):
        classifier.family.render(tiny_prompts())


@pytest.mark.parametrize(
    ("begins", "said"),
    [(b"PK\x03\x04" * 9, "a pickle in a zip"), (b"\x80\x02}q\x00." * 9, "a pickle"), (b"<html>" * 9, "a web page")],
)
def test_another_format_under_the_name_of_safetensors_is_recognized(model, begins, said):
    (model / "model.safetensors").write_bytes(begins)
    refused(model, f"model.safetensors is {said}")


def shard(model):
    """Split the weights of a model in two files with an index; returns the index and its path."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, index = sorted(weights), model / "model.safetensors.index.json"
    places = {name: f"model-{1 + (i > 9)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == file}, model / file, {"format": "pt"})
    content = {"metadata": {"total_size": 1}, "weight_map": places}
    index.write_text(json.dumps(content))
    return content, index


def test_weights_in_several_files_are_loaded(model):
    shard(model)
    render(model)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("pytorch_model.bin", "pytorch_model.bin, which is no safetensors file"),
        ("../outside.safetensors", "../outside.safetensors, outside of the model's folder"),
        ("/tmp/outside.safetensors", "/tmp/outside.safetensors, outside of the model's folder"),
        ("parts/model.safetensors", "outside of the model's folder"),
        ("..\\\\outside.safetensors", "outside of the model's folder"),
        (["model-1.safetensors"], "outside of the model's folder"),
        ("model-9.safetensors", "1 of 3 files of weights are missing, such as model-9.safetensors"),
    ],
)
def test_an_index_names_safetensors_files_of_its_folder_only(model, entry, said):
    content, index = shard(model)
    torch.save({}, model / "pytorch_model.bin")
    (model.parent / "outside.safetensors").write_bytes((model / "model-1.safetensors").read_bytes())
    content["weight_map"]["lm_head.weight"] = entry
    index.write_text(json.dumps(content))
    refused(model, said)
    assert "no whole" not in refused(model, said)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_a_damaged_index_is_named(model, content):
    _, index = shard(model)
    index.write_text(json.dumps(content))
    refused(model, f"{index} is damaged")


@pytest.mark.parametrize("entry", ["pytorch_model.bin", "../outside.safetensors", "none.safetensors"])
def test_a_configuration_that_names_other_weights_is_refused(model, entry):
    change(model, transformers_weights=entry)
    refused(model, "config.json names weights", entry)


def test_links_of_the_hubs_cache_are_followed_and_others_are_not(tiny_model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in tiny_model.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    render(snapshot)
    (snapshot / "model.safetensors").unlink()
    shutil.copy(tiny_model / "model.safetensors", tmp_path / "models--a--b" / "other")
    (snapshot / "model.safetensors").symlink_to("../../other")
    refused(snapshot, "model.safetensors is a link to", "outside of the model's folder")


def test_what_is_no_whole_model_says_what_it_is(model):
    (model / "adapter_config.json").write_text("{}")
    refused(model, "adapter_config.json there, so it is an adapter")
    (model / "adapter_config.json").unlink()
    change(model, audio="x")
    processor = json.loads((model / "processor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps(processor | {"audio_tokenizer": {}}))
    refused(model, "an audio tokenizer")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(model, "only pytorch_model.bin (a pickle, which can run code)")
    (model / "pytorch_model.bin").rename(model / "model.gguf")
    refused(model, "only model.gguf (made for llama.cpp)")


def test_training_on_a_damaged_or_misnamed_model_ends_in_a_line(model, tmp_path, capsys):
    data = images(tmp_path / "data", {"cat": 4, "dog": 4})
    (model / "best_model").mkdir()
    (model / "best_model" / "config.json").write_text("{}")

    def message(name):
        code = train("--model", name, "--dataset", data, "--output-dir", tmp_path / "out", "--device", "cpu")
        said = capsys.readouterr().err
        assert code == 2 and TRACEBACK not in said and "--debug" not in said
        return said.rpartition("error: ")[2]

    truncate(model / "tokenizer.json")
    assert f"{model / 'tokenizer.json'} cannot be read" in message(model)
    (model / "config.json").unlink()
    assert message(model) == f"{model} is the folder of a run: its model is {model / 'best_model'}.\n"
    assert message(tmp_path / "modle") == f"model {tmp_path / 'modle'}: no such folder. Did you mean {model}?\n"
    assert "hub" not in message("./nothing")


@pytest.mark.slow
def test_inference_with_a_damaged_model_ends_in_a_line(demo_run, tmp_path, capsys):
    folder = shutil.copytree(demo_run / "best_model", tmp_path / "model")
    (folder / "checksums.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text("{% if")
    assert classify("--model-dir", folder, "--device", "cpu", demo_run / "demo_images") == 2
    said = capsys.readouterr().err
    assert f"the chat template in {folder / 'chat_template.jinja'} does not work" in said and TRACEBACK not in said

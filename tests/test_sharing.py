"""A model goes to the hub and comes back, through the hub's real client: what is pushed, what is refused before, and
what is left if the hub fails."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from commands import classify, train
from fake_hub import TOKEN, Failure
from test_hub import hub  # noqa: F401 (a fixture)
from tiny import random_image, save_classifier, save_tiny_model, tiny_classifier

from vlm.common import Stopped, UsageError
from vlm.config import resolve
from vlm.inference import load_model_and_metadata, predict_single_image
from vlm.sharing import check_push, push_model
from vlm.training import fit


@pytest.fixture
def online(hub, monkeypatch):  # noqa: F811
    """A hub where a token is logged in, without the storage that only the real hub has."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return hub


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder as a training leaves it, with paths of this machine and something that is not ours."""
    folder = tmp_path_factory.mktemp("run") / "best_model"
    classifier = tiny_classifier(save_tiny_model(folder.parent / "base"))
    settings = {"output_dir": "/home/somebody/run", "dataset": "~/secret/pets", "lora_rank": 4}
    metadata = {
        "class_names": list(classifier.class_names),
        "prompts": classifier.prompts.to_json(),
        "model": "/home/somebody/models/base",
        "settings": settings,
    }

    def adapter(new):
        (new / "adapter").mkdir()
        config = {"base_model_name_or_path": "/home/somebody/models/base"}
        (new / "adapter/adapter_config.json").write_text(json.dumps(config))
        (new / "adapter/adapter_model.safetensors").write_bytes(b"weights")

    save_classifier(folder, classifier, metadata, torch.float32, adapter)
    (folder / "photo.png").write_bytes(b"data")
    (folder / "notes.json").write_text("{}")
    return folder, metadata


def push(model, repo="me/pets", public=False):
    folder, metadata = model
    return push_model(folder, metadata, repo, public)


def files_on(hub, repo="me/pets"):  # noqa: F811
    folder = hub.root / "models" / repo
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_comes_back_and_predicts_the_same(model, online):
    assert push(model) == f"{online.url}/me/pets"
    there = files_on(online)
    own = {path.relative_to(model[0]).as_posix() for path in model[0].rglob("*") if path.is_file()}
    assert set(there) == own - {"photo.png", "notes.json"}, "nothing that this program has not written"
    assert "me/pets" in online.private
    assert not any("somebody" in path.read_text("utf-8", "replace") for path in there.values()), "no path of a machine"
    assert json.loads(there["training_metadata.json"].read_text())["settings"]["dataset"] == "pets"

    image = random_image(3)
    here, back = (load_model_and_metadata(name, device="cpu") for name in (model[0], "me/pets"))
    assert predict_single_image(here[0], here[1], image, here[2]) == predict_single_image(*back[:2], image, back[2])
    assert not any("adapter" in name for name in online.files_sent()), "only what is needed comes back"


def test_a_new_push_replaces_what_an_earlier_one_has_written(model, online):
    push(model)
    folder = online.root / "models/me/pets"
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps(sums | {"model-00002-of-00002.safetensors": "crc32:00000000"}))
    for name in ("model-00002-of-00002.safetensors", "eval.json"):
        (folder / name).write_text("old")
    push(model)
    assert "model-00002-of-00002.safetensors" not in files_on(online)
    assert "eval.json" in files_on(online), "not ours"


def test_a_folder_from_somebody_else_cannot_name_a_file_of_this_machine(model, online, tmp_path):
    folder = tmp_path / "best_model"
    shutil.copytree(model[0], folder)
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    sums = json.loads((folder / "checksums.json").read_text())
    for name, place in (("adapter/secret.txt", "adapter"), ("photo.png", "")):
        (folder / "checksums.json").write_text(json.dumps(sums | {name: "crc32:00000000"}))
        if place:
            (folder / name).symlink_to(secret)
            with pytest.raises(UsageError, match="secret.txt is a link to .*, outside of the model's folder"):
                push((folder, model[1]))
            (folder / name).unlink()
        else:
            push((folder, model[1]))
    assert not {"adapter/secret.txt", "photo.png"} & set(files_on(online))


def test_public_is_public(model, online):
    push(model, public=True)
    assert "me/pets" not in online.private
    with pytest.raises(UsageError, match="this repository is public. Add --public"):
        push(model)


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("pets", "There is no owner in it. Expected owner/name"),
        ("me/pets/x", "Repo id must be in the form .* Expected owner/name"),
        ("me/two words", "digits, -, _ and ., and this one has ' '. Expected owner/name"),
        ("me/pets!", "and this one has '!'"),
        ("me/p\u00e4ts", r"and this one has '\\xe4'"),
        ("me/../x", "The part '..' is no name"),
        ("me/", "The part '' is no name"),
        ("me/-x", "-x begins or ends with - or ."),
        ("", "^--push-to-hub '': It is empty. Expected owner/name"),
        ("them/pets", "your token is that of me, we. Give one of these names"),
        ("me/taken", "there is a repository of this name with other files, such as model.py"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_training(online, repo, message):
    online.add("models", "me/taken", {"model.py": "", "README.md": "mine"})
    with pytest.raises(UsageError, match=message):
        check_push(repo, public=False)
    assert not any("POST" in line for line in online.requests), "nothing was changed"


def test_an_empty_name_is_no_command_without_a_push(model, tmp_path, capsys):
    assert classify("--model-dir", model[0], "--push-to-hub", "") == 2
    assert train("--demo", "--push-to-hub", "", "--output-dir", tmp_path / "run") == 2
    assert capsys.readouterr().err.count("--push-to-hub '': ") == 2 and not (tmp_path / "run").exists()


def test_an_organization_and_an_empty_repository_are_fine(model, online):
    online.add("models", "we/pets", {".gitattributes": "", "README.md": "hello"})
    online.private.add("we/pets")
    push(model, "we/pets")
    assert "config.json" in files_on(online, "we/pets")


def test_without_a_login_or_with_a_token_that_may_only_read(online, monkeypatch):
    online.accounts["hf_read"] = {"name": "me", "auth": {"accessToken": {"role": "read"}}}
    for token, message in (("hf_read", "may only read"), ("hf_bad", "the hub refuses your token")):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match=message):
            check_push("me/pets", public=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(UsageError, match="you are not logged in. Run `hf auth login`"):
        check_push("me/pets", public=False)


def test_the_command_pushes_a_folder(model, online, capsys):
    assert classify("--model-dir", model[0], "--push-to-hub", "me/pets") == 0
    assert f"The model is at {online.url}/me/pets" in capsys.readouterr().err
    for more in (["image.png"], ["--output", "predictions.csv"]):
        assert classify("--model-dir", model[0], "--push-to-hub", "me/pets", *more) == 2
        assert f"classifies nothing: leave out {more[0]}." in capsys.readouterr().err


def test_a_model_of_others_is_refused_before_it_is_downloaded(online):
    online.add("models", "me/plain", {"config.json": "{}", "model.safetensors": b"x"})
    with pytest.raises(UsageError, match="me/plain: no training_metadata.json there"):
        load_model_and_metadata("me/plain")
    assert online.files_sent() == []


@pytest.mark.slow
def test_a_resumed_run_pushes_only_if_the_command_says_so(online, tmp_path, capsys):
    flags = {"demo": True, "max_samples": 40, "epochs": 1, "output_dir": str(tmp_path), "push_to_hub": "me/digits"}
    with pytest.raises(Stopped):
        fit(resolve(flags), lambda: True)
    assert train("--resume", "--output-dir", tmp_path) == 0
    assert "the interrupted run had --push-to-hub me/digits. Give it again" in capsys.readouterr().err
    assert files_on(online, "me/digits") == {}


@pytest.mark.slow
def test_a_training_pushes_what_it_has_tested_and_survives_a_hub_that_fails(online, tmp_path, capsys):
    flags = ("--demo", "--max-samples", 40, "--epochs", 1, "--push-to-hub")
    assert train(*flags, "me/digits", "--output-dir", tmp_path / "one") == 0
    there = files_on(online, "me/digits")
    assert "accuracy (95% interval" in there["README.md"].read_text()
    assert "folder = 'me/digits'" in there["README.md"].read_text()
    assert not any(path.suffix == ".png" for path in there.values())
    capsys.readouterr()

    online.failures.append(Failure("/commit/", status=503))
    assert train(*flags, "me/again", "--output-dir", tmp_path / "two") == 0
    said = capsys.readouterr().err
    assert "warning: the model was not pushed. --push-to-hub me/again: the upload failed" in said
    assert f"--model-dir {tmp_path}/two/best_model --push-to-hub me/again" in said
    assert (tmp_path / "two/results.json").is_file()

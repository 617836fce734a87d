"""Models and datasets of a hub on this machine, through the hub's real client: found, cached, refused, out of reach."""

import socket
import time
from threading import Event

import datasets
import huggingface_hub.constants
import pytest
from fake_hub import COMMIT, Failure, FakeHub, serving

from vlm.common.errors import RunError, UsageError
from vlm.data import hub as vlm_hub
from vlm.data.hub import find_dataset, looks_like_path, model_folder
from vlm.data.hub_errors import within
from vlm.inference.model_folder import find_model_folder

MODEL = {"config.json": "{}", "model.safetensors": b"weights", "tokenizer.json": "{}", "chat_template.jinja": ""}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that answers, with an empty cache."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    with serving(FakeHub(tmp_path / "hub")) as hub:
        move(monkeypatch, hub.url)
        yield hub


def move(monkeypatch, url: str) -> None:
    """Make the client ask at `url`."""
    for module, name, value in [
        (huggingface_hub.constants, "ENDPOINT", url),
        (huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"),
        (datasets.config, "HF_ENDPOINT", url),
    ]:
        monkeypatch.setattr(module, name, value)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def switch_off(monkeypatch) -> None:
    """From now on nobody answers."""
    move(monkeypatch, f"http://127.0.0.1:{free_port()}")


def folder_with(tmp_path, files):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path):
    folder = folder_with(tmp_path, MODEL)
    assert model_folder(str(folder)) == (folder, None)


def test_a_model_is_downloaded_without_code_and_pickles(hub):
    unwanted = {"modeling.py": "", "pytorch_model.bin": "", "training.pt": "", "onnx/config.json": "{}"}
    hub.add("models", "me/small", MODEL | unwanted)
    folder, commit = model_folder("me/small")
    assert commit == COMMIT
    assert {path.name for path in folder.iterdir()} == set(MODEL)
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_commit_and_a_branch_can_be_named(hub):
    hub.add("models", "me/small", MODEL)
    assert model_folder("me/small", COMMIT) == model_folder("me/small", "main")


def test_a_cached_model_is_used_if_the_hub_is_out_of_reach(hub, monkeypatch, capsys):
    hub.add("models", "me/small", MODEL)
    online = model_folder("me/small")
    switch_off(monkeypatch)
    assert model_folder("me/small") == online
    assert "cannot be reached" in capsys.readouterr().err
    assert not huggingface_hub.is_offline_mode(), "the next one asks again"


def test_a_cached_model_is_used_without_a_request_when_the_hub_is_switched_off(hub, monkeypatch, capsys):
    hub.add("models", "me/small", MODEL)
    online = model_folder("me/small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert model_folder("me/small") == online
    assert hub.requests == []
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_model_that_is_half_in_the_cache_counts_as_not_there(hub, monkeypatch):
    hub.add("models", "me/small", MODEL)
    (model_folder("me/small")[0] / "model.safetensors").unlink()
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match="no complete copy"):
        model_folder("me/small")


def test_who_classifies_is_not_advised_to_train_with_flags(hub, monkeypatch):
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match="no complete copy. Give --model-dir the folder of a model that you") as caught:
        find_model_folder("me/pets")
    assert "--model " not in str(caught.value) and "--dataset" not in str(caught.value)


def test_a_name_that_ends_in_a_slash_is_a_folder(hub, monkeypatch):
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match="model nope/: no such folder"):
        model_folder("nope/")


@pytest.mark.parametrize(("name", "why"), [("me/pets!", "this one has '!'"), ("me/-x", "begins or ends with -")])
def test_a_name_that_the_hub_does_not_take_says_why(name, why):
    with pytest.raises(UsageError, match=f"not a valid name on the hub.*{why}.*Expected owner/name"):
        model_folder(name)


def test_a_model_of_which_only_the_config_was_ever_loaded_counts_as_not_there(hub, monkeypatch, tmp_path):
    for path, content in {"refs/main": COMMIT, f"snapshots/{COMMIT}/config.json": "{}"}.items():
        file = tmp_path / "cache/models--me--small" / path
        file.parent.mkdir(parents=True)
        file.write_text(content)
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match="no complete copy"):
        model_folder("me/small")


@pytest.mark.parametrize("load", [model_folder, find_dataset])
def test_a_hub_out_of_reach_and_nothing_cached_is_said_at_once(hub, monkeypatch, load):
    switch_off(monkeypatch)
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"(?s)me/other.*cannot be reached.*--demo"):
        load("me/other")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("load", [model_folder, find_dataset])
def test_a_hub_that_accepts_and_never_answers_is_given_up(hub, monkeypatch, load):
    monkeypatch.setattr(vlm_hub, "REQUEST_SECONDS", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        move(monkeypatch, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(UsageError, match="cannot be reached"):
            load("me/other")


def test_a_request_whose_own_timeout_does_not_hold_is_given_up():
    release = Event()
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 seconds"):
        within(0.1, release.wait)
    assert time.monotonic() - started < 2
    release.set()


@pytest.mark.parametrize("load", [model_folder, find_dataset])
def test_an_unknown_name_is_one_clear_line(hub, load):
    with pytest.raises(
        UsageError, match=r"me/none: not on the hub, not a folder here, or private.*hf auth login"
    ) as caught:
        load("me/none")
    assert "\n" not in str(caught.value)


def test_a_name_that_no_hub_can_have_is_refused(hub):
    with pytest.raises(UsageError, match="Expected owner/name"):
        model_folder("two words")


def test_a_missing_revision_is_named(hub):
    hub.add("models", "me/small", MODEL)
    with pytest.raises(UsageError, match="no revision v9"):
        model_folder("me/small", "v9")


def test_a_gated_model_says_how_to_get_access(hub):
    hub.add("models", "me/gated", MODEL)
    hub.refusals["me/gated"] = "GatedRepo"
    with pytest.raises(UsageError, match=r"access must be asked for.*hf auth login"):
        model_folder("me/gated")


def test_a_download_that_breaks_off_says_to_run_it_again(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("models", "me/small", MODEL)
    hub.failures.append(Failure("model.safetensors", after=0))
    with pytest.raises(RunError, match="the connection to the hub broke off.*Run the command again"):
        model_folder("me/small")


@pytest.mark.parametrize(
    ("missing", "message"), [("config.json", "no config.json"), ("model.safetensors", "no weights in")]
)
def test_a_model_without_config_or_safetensors_is_refused_before_the_download(hub, tmp_path, missing, message):
    files = {name: content for name, content in MODEL.items() if name != missing} | {"pytorch_model.bin": b"x"}
    hub.add("models", "me/odd", files)
    with pytest.raises(UsageError, match=message):
        model_folder("me/odd")
    assert not any("resolve" in request for request in hub.requests)
    with pytest.raises(UsageError, match=message):
        model_folder(str(folder_with(tmp_path, files)))


def test_a_missing_shard_of_the_weights_is_named(tmp_path):
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {"config.json": "{}", "model-1.safetensors": b"x", "model.safetensors.index.json": index}
    with pytest.raises(UsageError, match=r"1 of 2 files of weights are missing, such as model-2\.safetensors"):
        model_folder(str(folder_with(tmp_path, files)))


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none-at-all", "a/b/c", "none\\at\\all"])
def test_a_name_that_is_meant_as_a_path_is_not_looked_for_on_the_hub(name):
    assert looks_like_path(name)
    with pytest.raises(UsageError, match="no such folder"):
        model_folder(name)


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UsageError, match="a file, not a folder"):
        model_folder(str(tmp_path / "a.txt"))


def test_a_dataset_on_the_hub_is_there_with_its_commit(hub):
    hub.add("datasets", "me/set", {"README.md": "x"})
    assert find_dataset("me/set").commit == COMMIT


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_misspelled_folder_is_answered_with_the_one_that_is_like_it(hub, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planets").mkdir()
    load = model_folder if kind == "model" else find_dataset
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match=f"^{kind} planetz: no such folder. Did you mean planets"):
        load("planetz")

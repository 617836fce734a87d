"""What a hub on this machine answers when something is wrong: each is told apart, and tried again where that helps."""

import time

import huggingface_hub.constants
import pytest
from fake_hub import COMMIT, TOKEN, Failure
from published import publish, split_of
from test_data import counts, load
from test_hub import MODEL, hub, move, switch_off  # noqa: F401

from vlm.common.errors import RunError, UsageError
from vlm.data import hub as vlm_hub
from vlm.data import hub_errors
from vlm.data.hub import find_dataset, model_folder

ASK = {"model": model_folder, "dataset": find_dataset}
FILE = {"model": "model.safetensors", "dataset": "data/train-00000-of-00001.parquet"}


@pytest.fixture(autouse=True)
def pauses(tmp_path, monkeypatch):
    """The pauses between tries, which are counted but not waited for."""
    paused = []
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "vlm"))
    monkeypatch.setattr(time, "sleep", paused.append)
    return paused


def fetch(kind):
    return model_folder("me/small") if kind == "model" else load("me/small")


@pytest.fixture(params=["model", "dataset"])
def kind(request, hub):  # noqa: F811
    """A model or dataset me/small on the hub."""
    if request.param == "model":
        hub.add("models", "me/small", MODEL)
    else:
        publish(hub, "me/small", {"train": split_of([0, 1] * 10, ["a", "b"])})
    return request.param


def test_a_refused_token(hub, kind, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.failures.append(Failure("", 401, headers={"X-Error-Message": "Invalid credentials in Authorization header"}))
    with pytest.raises(UsageError, match=rf"{kind} me/small: the hub refuses your token \(401\). Log in again"):
        fetch(kind)


def test_access_must_be_asked_for(hub, kind, monkeypatch):  # noqa: F811
    hub.gated.add("me/small")
    for token in (None, "hf_without_access"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match="me/small: access must be asked for on its page"):
            fetch(kind)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(kind)


def test_a_token_that_may_not_read(hub, kind):  # noqa: F811
    hub.failures.append(Failure("/resolve/", 403))
    with pytest.raises(UsageError, match=r"the hub refuses access \(403\)"):
        fetch(kind)


@pytest.mark.parametrize("part", ["/api/", "/resolve/"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_answer_that_is_another_one_the_next_time(hub, kind, status, part):  # noqa: F811
    hub.failures.append(Failure(part, status, times=1))
    fetch(kind)


def test_too_many_requests_are_made_again_when_the_hub_says_so(hub, kind, pauses, capsys):  # noqa: F811
    hub.failures.append(Failure("/api/", 429, times=1, headers={"Retry-After": "7"}))
    fetch(kind)
    assert pauses[0] == 7
    said = capsys.readouterr().err
    assert "note: the hub answers 429, too many requests, and asks to wait 7 seconds; trying again in 7 s." in said


def test_a_pause_that_is_too_long_ends_the_program(hub, kind, pauses):  # noqa: F811
    hub.failures.append(Failure("/api/", 429, headers={"Retry-After": "300"}))
    with pytest.raises(
        RunError, match=r"asks to wait 300 seconds, and the cache has no complete copy. Wait some minutes"
    ):
        ASK[kind]("me/small")
    assert pauses == []


def test_a_hub_that_fails_is_not_called_out_of_reach(hub, kind, capsys):  # noqa: F811
    hub.failures.append(Failure("", 503))
    with pytest.raises(RunError, match=r"the hub answers 503 \(Service Unavailable\), and the cache.*Try again later"):
        fetch(kind)
    hub.failures.clear()
    fetch(kind)
    hub.failures.append(Failure("", 503))
    fetch(kind)
    said = capsys.readouterr().err
    assert f"note: the hub answers 503 (Service Unavailable): using the cached copy of {kind} me/small." in said
    assert "reached" not in said


def test_a_hub_that_is_slow_works(hub, kind, monkeypatch, capsys):  # noqa: F811
    assert vlm_hub.REQUEST_SECONDS > 2 * 6 and vlm_hub.PATIENCE_SECONDS > 2 * vlm_hub.REQUEST_SECONDS
    monkeypatch.setattr(hub_errors, "SILENT_SECONDS", 0.05)
    hub.delay = 0.2
    ASK[kind]("me/small")
    said = capsys.readouterr().err
    assert "note: the hub has not answered for 0.05 seconds; waiting up to 35." in said
    assert "reached" not in said


def test_a_download_that_breaks_off_goes_on(hub, kind):  # noqa: F811
    content = (hub.root / f"{kind}s/me/small" / FILE[kind]).read_bytes()
    hub.failures.append(Failure(f"resolve/{COMMIT}/{FILE[kind]}", times=2, after=len(content) // 2))
    found = fetch(kind)
    if kind == "model":
        assert (found[0] / FILE[kind]).read_bytes() == content
    else:
        assert sum(counts(found)) == 20


def test_a_name_that_is_not_found(hub, kind, monkeypatch):  # noqa: F811
    move(monkeypatch, "http://hub.invalid")
    with pytest.raises(UsageError, match="the name hub.invalid is not found"):
        fetch(kind)


def test_a_file_that_is_missing(hub, kind, monkeypatch):  # noqa: F811
    hub.failures.append(Failure(FILE[kind], 404, headers={"X-Error-Code": "EntryNotFound"}))
    with pytest.raises(UsageError, match="a file is missing on the hub"):
        fetch(kind)


def test_another_try_in_the_same_process_asks_the_hub_again(hub, kind, monkeypatch, capsys):  # noqa: F811
    fetch(kind)
    with monkeypatch.context() as without:
        switch_off(without)
        fetch(kind)
        assert "cannot be reached" in capsys.readouterr().err
    hub.requests.clear()
    fetch(kind)
    assert hub.requests and not capsys.readouterr().err.count("cached copy")


def test_no_request_is_made_when_the_hub_is_switched_off(hub, kind, monkeypatch, capsys):  # noqa: F811
    fetch(kind)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    fetch(kind)
    assert hub.requests == [] and "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_dataset_that_is_half_in_the_cache_counts_as_not_there(hub, monkeypatch):  # noqa: F811
    publish(hub, "me/half", {"train": split_of([0, 1] * 10, ["a", "b"])}, shards=2)
    load("me/half")
    for path in (hub.root.parent / "cache").rglob("train-00001-of-00002.parquet"):
        path.unlink()
    switch_off(monkeypatch)
    with pytest.raises(UsageError, match="no complete copy"):
        load("me/half")


@pytest.mark.parametrize("name", ["hf://me/small@main", "me/small@main", "https://hub.example/me/small/tree/main"])
def test_a_model_may_be_named_with_its_revision(hub, name):  # noqa: F811
    hub.add("models", "me/small", MODEL)
    assert model_folder(name) == model_folder("me/small")
    with pytest.raises(UsageError, match="this names a dataset. Give it to --dataset"):
        model_folder("hf://datasets/me/small")
    hub.renamed["small"] = "me/small"
    assert model_folder("small") == model_folder("me/small")

"""`inference_vlm.py --serve` as a user has it: the page in a browser, `gradio_client`, and the end of the server."""

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import PATIENCE, TRACEBACK, command, surroundings
from test_page import Page
from tiny import random_image

from inference_vlm import load_model_and_metadata, main, predict_single_image
from vlm import service
from vlm.common import UsageError
from vlm.report import render
from vlm.service import Served, check_packages, find_examples, open_port
from vlm.service import model as model_of_service

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_PAGE = "the packages of requirements-serve.txt are not installed"


@contextlib.contextmanager
def server(model, folder, *arguments):
    """The program, serving a model; gives the process and its address. Its temporary files are in a folder."""
    options = ["--model-dir", model, "--serve", "--port", 0, "--device", "cpu", *arguments]
    process = subprocess.Popen(
        command("inference_vlm.py", *options),
        env=surroundings(TMPDIR=folder),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = ""
        while not (found := re.search(r"Open (http://127\.0\.0\.1:\d+) in a browser", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def in_thread(app, port):
    """The server of an application, in this process; gives its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def address(demo_run, temporary):
    pytest.importorskip("gradio", reason=NO_PAGE)
    with server(demo_run / "best_model", temporary) as (_, address):
        yield address


@pytest.fixture(scope="module")
def loaded(demo_run):
    return load_model_and_metadata(demo_run / "best_model", device="cpu")


@pytest.fixture(scope="module")
def images(demo_run):
    return [demo_run / "demo_images" / f"digit_{i}.png" for i in (3, 7)]


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


@pytest.mark.slow
def test_uploads_are_deleted_when_they_are_old(demo_run, loaded, images, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason=NO_PAGE)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from gradio_client import Client, handle_file

    from vlm.service import page
    from vlm.service.app import create_app
    from vlm.service.batcher import Batcher

    monkeypatch.setattr(page, "UPLOADS_SECONDS", (1, 1))
    served = Served(loaded[0], loaded[2], None)
    with open_port("127.0.0.1", 0) as opened, Batcher(served.classify, 4) as batcher:
        app = create_app(served, batcher, "127.0.0.1", page.page_routes(tmp_path))
        page.mount_page(app, served, batcher, [images[1]])
        with in_thread(app, opened) as address:
            (result,) = Client(address, verbose=False).predict([handle_file(images[0])], api_name="/classify")
            assert result["name"] == "digit_3.png"
            end = time.monotonic() + PATIENCE
            while left := [path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix == ".png"]:
                assert time.monotonic() < end, left
                time.sleep(0.1)
            assert [path.name for path in tmp_path.rglob("*.webp")] == ["image.webp"], "the example is still there"
            assert fetch(address, f"/gradio_api/file={next(tmp_path.rglob('*.webp'))}")[0] == 200


@pytest.mark.slow
def test_gradio_client_gets_what_one_prediction_gives(client, loaded, images, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(20 * 2**20 + 1))
    files = [*images, tmp_path / "notes.txt", tmp_path / "large.png"]
    results = client.predict(list(map(handle_file, files)), api_name="/classify")
    assert [result["name"] for result in results] == [path.name for path in files]
    model, processor, metadata = loaded
    for path, result in zip(images, results, strict=False):
        prediction, confidence, text = predict_single_image(model, processor, path, metadata)
        assert (result["prediction"], result["full_response"]) == (prediction, text)
        assert result["confidence"] == pytest.approx(confidence, abs=1e-5)
    assert results[2]["prediction"] is None and results[2]["error"].startswith("notes.txt: not an image")
    assert results[3]["error"].startswith("large.png: this is larger than the 20 MB that are taken")


@pytest.mark.slow
def test_what_the_page_does_not_take_is_said(client, images):
    from gradio_client import handle_file

    with pytest.raises(Exception, match="These are 17 images. At most 16 are classified at a time."):
        client.predict([handle_file(images[0])] * 17, api_name="/classify")
    with pytest.raises(Exception, match="There is no image. Drop one or several."):
        client.predict([], api_name="/classify")


def fetch(address, path, data=None):
    """(status, text) of a request."""
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"} if data else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
@pytest.mark.parametrize("place", ["file", "address"])
def test_a_request_cannot_name_a_file_of_the_server(address, temporary, tmp_path, meta, place):
    """Gradio itself opens any file of the machine if a page is mounted in another application."""
    (tmp_path / "secret.png").write_text("secret")
    path = {"file": str(tmp_path / "secret.png"), "address": f"{address}/health"}[place]
    functions = json.loads(fetch(address, "/config")[1])["dependencies"]
    for function in (one["id"] for one in functions if one["inputs"]):
        session = f"{place}{len(meta)}{function}"
        asked = {"data": [[{"path": path} | meta]], "fn_index": function, "session_hash": session}
        fetch(address, "/gradio_api/queue/join", json.dumps(asked).encode())
        status, events = fetch(address, f"/gradio_api/queue/data?session_hash={session}")
        assert status == 200 and '"process_completed"' in events and '"success":false' in events, events
        assert "secret" not in events
    assert not [path for path in temporary.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


@pytest.mark.slow
def test_no_file_of_the_server_can_be_read(address, demo_run):
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/file=/etc/passwd",
        f"/gradio_api/file={demo_run}/best_model/config.json",
        "/gradio_api/file=https://example.com/",
        "/gradio_api/proxy=https://example.com/",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/runs",
        "/monitoring",
        "/docs",
    ):
        status, text = fetch(address, path)
        assert status in (403, 404) and "root:" not in text, path


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright to drive a browser with")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_images_that_are_dropped_on_the_page_are_classified_there(address, browser, loaded, images, tmp_path, width):
    name = "<img src=x onerror=alert(1)>.txt"  # names are text, and add nothing to the page
    (tmp_path / name).write_text("no image")
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda answer: faults.append(answer.url) if answer.status >= 400 else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    with page.expect_file_chooser():
        page.click("#images button")
    assert page.get_attribute("#images input[type=file]", "accept") == "image/*", "images are offered first"
    page.set_input_files("#images input[type=file]", [*images, tmp_path / name])
    page.wait_for_selector("#results article")
    cards = page.query_selector_all("#results article")
    model, processor, metadata = loaded
    for path, card in zip(images, cards, strict=False):
        prediction, confidence, text = predict_single_image(model, processor, path, metadata)
        assert card.query_selector("h2").inner_text() == prediction
        assert f"Confidence {confidence:.1%}" in card.inner_text() and path.name in card.inner_text()
        assert len(card.query_selector_all(".bars li")) == 5
        assert card.query_selector("img").get_attribute("alt") == f"The image {path.name}"
        card.query_selector("summary").click()
        assert text in card.inner_text()
    assert "Not classified" in cards[2].inner_text() and f"{name}: not an image" in cards[2].inner_text()
    assert page.get_attribute("#results", "aria-live") == "polite"
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the page"
    assert faults == [] and all(url.startswith((address, "data:", "blob:")) for url in asked), "nothing from elsewhere"
    page.close()


@pytest.mark.slow
def test_an_example_is_classified_with_the_keyboard_and_each_drop_replaces_what_was_shown(address, browser, images):
    page = browser.new_page()
    page.goto(address)
    page.focus("#examples button >> nth=4")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results article")
    assert "digit_4.png" in page.inner_text("#results")
    page.set_input_files("#images input[type=file]", [images[0]])
    page.wait_for_selector("#results article[aria-label='digit_3.png']")
    assert len(page.query_selector_all("#results article")) == 1
    page.set_input_files("#images input[type=file]", [images[0], images[1]])
    page.wait_for_selector("#results article[aria-label='digit_7.png']")
    assert len(page.query_selector_all("#results article")) == 2
    page.set_input_files("#images input[type=file]", images * 9)
    page.wait_for_selector("#results .refused")
    assert page.inner_text("#results").strip().startswith("These are 18 images.")
    page.set_input_files("#images input[type=file]", [images[0]])
    page.wait_for_selector("#results article[aria-label='digit_3.png']")
    page.close()


@pytest.mark.slow
def test_a_model_that_abstains_says_so_and_sigterm_ends_the_server(demo_run, tmp_path, images):
    pytest.importorskip("gradio", reason=NO_PAGE)
    from gradio_client import Client, handle_file

    with server(demo_run / "best_model", tmp_path, "--abstain-below", 1) as (process, address):
        client = Client(address, verbose=False)
        (result,) = client.predict([handle_file(images[0])], api_name="/classify")
        assert result["prediction"] is None and result["abstained"] is True
        with socket.create_connection(address.removeprefix("http://").split(":")) as idle:  # it does not wait for these
            idle.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and said.splitlines()[-1] == "stopped after 1 images." and TRACEBACK not in said
    assert list(tmp_path.glob("vlm_serve_*")) == [], "its folder is gone"


# Without Gradio


def refused(capsys, *arguments):
    """What is said of a command that is wrong usage."""
    code = main(list(map(str, arguments)))
    assert code == 2
    return capsys.readouterr().err.strip()


def test_a_port_that_is_in_use_and_an_address_of_another_machine_are_refused_in_a_line():
    with open_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        words = rf"--port {port} is in use: choose another one, such as --port {port + 1}\.$"
        with pytest.raises(UsageError, match=words), open_port("127.0.0.1", port):
            pass
    for host in ("192.0.2.1", "no.such.host.invalid", "x" * 300, "a\0b"):
        with pytest.raises(UsageError, match="is no address of this machine: expected 127.0.0.1"), open_port(host, 0):
            pass


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "--serve needs the package gradio, which is not installed: python -m pip install 'gradio>="),
        ("4.44.1", "--serve does not work with gradio 4.44.1: python -m pip install 'gradio>="),
    ],
)
def test_a_missing_or_old_gradio_is_said_in_a_line_before_the_model_is_looked_for(monkeypatch, capsys, found, words):
    from importlib import metadata

    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    said = refused(capsys, "--serve", "--model-dir", "no/such/folder")
    assert said.startswith(f"error: {words}") and "\n" not in said


def test_the_range_of_gradio_is_the_one_of_the_requirements(monkeypatch):
    from importlib import metadata

    from packaging.requirements import Requirement

    lines = (Path(__file__).parent.parent / "requirements-serve.txt").read_text().splitlines()
    (wanted,) = (Requirement(line.split("#")[0]) for line in lines if line.startswith("gradio"))
    for version in ("5.50.0", "6.0", "6.30", "6.31", "6.99", "7.0"):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        with contextlib.nullcontext() if version in wanted.specifier else pytest.raises(UsageError):
            check_packages()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--serve", "a.png"], "--serve does not take images"),
        (["--serve", "--output", "a.csv"], "--serve does not take --output"),
        (["--serve", "--feature-cache"], "--serve does not take --feature-cache"),
        (["a.png", "--port", "0"], "--port needs --serve."),
        (["a.png", "--host", "0.0.0.0"], "--host needs --serve."),
        (["a.png", "--examples", "x"], "--examples needs --serve."),
        (["--serve", "--port", "65536"], "--port 65536: expected a whole number from 0 to 65535."),
        (["--serve", "--dataset", "x"], "--serve does not take --dataset"),
        (["--serve", "--resume"], "--serve does not take --resume"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(capsys, arguments, words):
    assert refused(capsys, *arguments).startswith(f"error: {words}")


def test_a_server_is_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(capsys, "--serve") == "error: --serve is one process, and these are 2: leave out VLM_PROCESSES."


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (16, "The model knows 16 classes: class 0, class 1, "),
        (1000, "The model knows 1,000 classes, such as class 0, class 1, "),
    ],
)
def test_the_head_of_the_page_names_the_classes(count, words):
    served = SimpleNamespace(
        classes=[f"class {i}" for i in range(count)], name="a model", base="another", accuracy=None
    )
    page = Page(render("about.html.jinja", Path(service.__file__).parent, title="Fruit", served=served, listed=40))
    assert words in page.text and "class 15" in page.text
    assert len(page.all("details")) == (count > 40)


def test_examples_are_those_that_are_named_or_the_demo_s(demo_run, tmp_path, color_folder, capsys, monkeypatch):
    model = demo_run / "best_model"
    assert [path.name for path in find_examples(None, model)] == [f"digit_{i}.png" for i in range(10)]
    assert len(find_examples(str(color_folder), model)) == 12
    assert find_examples(None, tmp_path / "model") == []
    with pytest.raises(UsageError, match="^--examples: .* does not exist"):
        find_examples(str(tmp_path / "no"), model)
    for name in ("a/1", "a/2", "a/3", "b/1", "b/2", "c/1", "d/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        random_image(1).save(tmp_path / f"{name}.png")
    (tmp_path / "d/1.png").write_text("no image")
    monkeypatch.setattr(model_of_service, "MOST_EXAMPLES", 4)
    found = find_examples(str(tmp_path), model)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a/1.png", "a/2.png", "b/1.png", "c/1.png"]
    assert capsys.readouterr().err.startswith(f"note: --examples: {tmp_path}/d/1.png: not an image")

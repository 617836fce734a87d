"""/predict and /health of --serve: the same as `predict_single_image`, errors as words, and a server that survives."""

import http.client
import io
import json
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from inference_vlm import load_model_and_metadata, predict_single_image
from vlm.classifier import Calibration
from vlm.service import Served, open_port, served_name, test_accuracy

uvicorn = pytest.importorskip("uvicorn", reason="the packages of requirements-serve.txt are not installed")
pytest.importorskip("fastapi", reason="the packages of requirements-serve.txt are not installed")

from vlm.service.app import IMAGE_BYTES, create_app  # noqa: E402
from vlm.service.batcher import Batcher, QueueFull  # noqa: E402

test_accuracy.__test__ = False  # it is no test


@contextmanager
def running(served, **options):
    """A server on a free port; gives the port and its queue."""
    with open_port("127.0.0.1", 0) as opened, Batcher(served.classify, **{"batch_size": 8} | options) as batcher:
        app = create_app(served, batcher, "127.0.0.1")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        try:
            yield opened.getsockname()[1], batcher
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def loaded(demo_run):
    return load_model_and_metadata(demo_run / "best_model", device="cpu")


@pytest.fixture(scope="module")
def served(demo_run, loaded):
    folder = demo_run / "best_model"
    named = served_name(str(demo_run.parent / "elsewhere" / "run" / "best_model"))
    return Served(loaded[0], loaded[2], test_accuracy(folder, loaded[2]), name=named)


@pytest.fixture(scope="module")
def port(served):
    with running(served) as (port, _):
        yield port


@pytest.fixture(scope="module")
def files(demo_run):
    return [path.read_bytes() for path in sorted((demo_run / "demo_images").iterdir())]


def ask(port, body=b"", path="/predict", method="POST", **headers):
    """(status, JSON, headers) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, given, encode_chunked="transfer-encoding" in given)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    return answer.status, json.loads(text), answer.headers


def form(*files):
    """The body and the content type of a form with files of some names."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


def same(result, loaded, data):
    model, processor, metadata = loaded
    prediction, confidence, text = predict_single_image(model, processor, Image.open(io.BytesIO(data)), metadata)
    assert (result["prediction"], result["full_response"]) == (prediction, text)
    assert result["confidence"] == pytest.approx(confidence, abs=1e-5)


def test_the_bytes_of_an_image_and_a_form_give_what_one_prediction_gives(port, loaded, files):
    status, result, _ = ask(port, files[3])
    assert status == 200 and list(result["probabilities"]) == loaded[2]["class_names"]
    assert set(result) == {"prediction", "confidence", "probabilities", "error_bound", "full_response"}
    same(result, loaded, files[3])
    body, kind = form(("7.png", files[7]))
    status, result, _ = ask(port, body, content_type=kind)
    assert status == 200
    same(result, loaded, files[7])
    assert ask(port, files[7], "/predict?explain=false")[1] == result | {"full_response": ""}


def test_health_names_model_and_classes(port, loaded):
    about = {"status": "ok", "model": "run/best_model", "base_model": "demo"}
    expected = about | {"classes": loaded[2]["class_names"]}
    assert ask(port, path="/health", method="GET")[:2] == (200, expected)


def huge():
    """A PNG of a few kilobytes that says that it has 400 million pixels."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("request_of", "status", "words"),
    [
        (lambda good: {"body": b""}, 400, "there is no image: send the bytes of one"),
        (lambda good: {"body": b"hello"}, 400, "the image: not an image, or damaged, or of an unknown format"),
        (lambda good: {"body": good[: len(good) // 2]}, 400, "the image: "),
        (lambda good: {"body": huge()}, 400, "the image: its size"),
        (lambda good: _form_of(("a.png", b"hello")), 400, "a.png: not an image"),
        (lambda good: _form_of(), 400, "the form has no file: send one image"),
        (lambda good: _form_of(("a.png", good), ("b.png", good)), 400, "the form has 2 files"),
        (lambda good: _form_of(*[("a.png", b"a")] * 1001), 400, "the form has too many parts, or cannot be read"),
        (lambda good: {"body": good, "content_type": "multipart/form-data"}, 400, "the form has no boundary"),
        (lambda good: {"body": good, "path": "/predict?explain=maybe"}, 400, "explain=maybe: expected true or false."),
        (lambda good: {"body": bytes(IMAGE_BYTES + 2**16 + 1)}, 413, "this is larger than the 20 MB that are taken"),
        (lambda good: {"body": bytes(IMAGE_BYTES + 1)}, 413, "this is larger than the 20 MB that are taken"),
        (lambda good: {"method": "GET"}, 405, "GET is not answered here: POST an image."),
        (lambda good: {"method": "TRACE"}, 405, "TRACE is not answered here"),
        (lambda good: {"path": "/health"}, 405, "POST is not answered here: GET it."),
        (lambda good: {"body": b"a", "content_type": "Multipart/Form-Data"}, 400, "the form has no boundary"),
        (lambda good: {"path": "/"}, 404, "/ is not here"),
    ],
)
def test_errors_are_words_with_their_status(port, files, request_of, status, words):
    found, answer, _ = ask(port, **request_of(files[0]))
    assert found == status and answer["error"].startswith(words) and "\n" not in answer["error"]
    assert ask(port, files[0])[0] == 200, "and the server goes on"


def _form_of(*files):
    body, kind = form(*files)
    return {"body": body, "content_type": kind}


def test_a_body_that_does_not_say_how_long_it_is_is_bounded_too(port):
    parts = iter([bytes(2**20)] * 30)
    assert ask(port, parts, transfer_encoding="chunked")[0] == 413


def test_an_image_that_does_not_arrive_gives_its_place_back(port, monkeypatch):
    monkeypatch.setattr("vlm.service.app.READ_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        answer = http.client.HTTPResponse(slow)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read()) == {"error": "the image did not arrive within 0.1 seconds."}


def test_an_error_that_nobody_expects_is_a_500_and_the_next_image_is_answered(served, files, monkeypatch, capsys):
    failing = iter([RuntimeError("CUDA error"), MemoryError(), None])
    real = Served.classify

    def classify(self, uploads, explain):
        if error := next(failing):
            raise error
        return real(self, uploads, explain)

    monkeypatch.setattr(Served, "classify", classify)
    with running(served) as (port, _):
        words = "this failed: the server's log says more."
        assert ask(port, files[0])[:2] == (500, {"error": words})
        words = "the memory of this machine is not enough for this image: the server's log says more."
        assert ask(port, files[0])[:2] == (500, {"error": words})
        assert ask(port, files[0])[0] == 200
    assert "error: /predict: RuntimeError: CUDA error" in capsys.readouterr().err


def test_scores_that_are_no_numbers_are_the_server_s_fault(served, loaded, files, monkeypatch):
    monkeypatch.setattr(loaded[0], "calibration", Calibration(temperature=float("nan")))
    with running(served) as (port, _):
        status, answer, _ = ask(port, files[0])
    assert status == 500 and answer["error"].startswith("the model's scores are not finite")


class Waiting:
    """A model that computes until it is told to end."""

    def __init__(self, served, monkeypatch):
        self.seen, self.begun, self.may_go = [], threading.Event(), threading.Event()

        def classify(_, uploads, explain):
            self.seen.append(len(uploads))
            self.begun.set()
            assert self.may_go.wait(20)
            return [{"prediction": "x"} for _ in uploads]

        monkeypatch.setattr(Served, "classify", classify)


def until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def has_room(batcher):
    try:
        with batcher.admitted():
            return True
    except QueueFull:
        return False


def test_a_full_queue_says_so_and_when_to_come_again(served, files, monkeypatch):
    model = Waiting(served, monkeypatch)
    with running(served, places=2) as (port, batcher), ThreadPoolExecutor(2) as clients:
        under_way = [clients.submit(ask, port, files[0]) for _ in range(2)]
        until(model.begun.is_set)
        until(lambda: not has_room(batcher))
        status, answer, headers = ask(port, files[0])
        assert (status, headers["Retry-After"]) == (503, "2")
        assert answer["error"] == "2 images are waiting, and at most 2 may: try again in some seconds."
        model.may_go.set()
        assert [one.result()[0] for one in under_way] == [200, 200]
        assert ask(port, files[0])[0] == 200


def test_an_image_whose_client_has_hung_up_is_not_classified(served, files, monkeypatch):
    model = Waiting(served, monkeypatch)
    with running(served, batch_size=1, places=2) as (port, batcher), ThreadPoolExecutor(1) as clients:
        first = clients.submit(ask, port, files[0])
        until(model.begun.is_set)
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(files[0]))
        client.sendall(files[0])
        until(lambda: not has_room(batcher))
        client.close()
        until(lambda: has_room(batcher))
        half = socket.create_connection(("127.0.0.1", port))  # and one that ends in the middle of its image
        half.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        until(lambda: not has_room(batcher))
        half.close()
        until(lambda: has_room(batcher))
        model.may_go.set()
        assert first.result()[0] == 200
        assert ask(port, files[0])[0] == 200
        assert model.seen == [1, 1] and batcher.answered == 2, "the first and the last"


@pytest.mark.slow
def test_200_requests_of_16_clients_are_answered_as_single_predictions_are(served, loaded, files, monkeypatch):
    model, processor, metadata = loaded
    # After so short a training the calibrated probabilities are nearly the same for every image.
    monkeypatch.setattr(model, "calibration", Calibration())
    images = [Image.open(io.BytesIO(data)) for data in files]
    expected = [predict_single_image(model, processor, image, metadata) for image in images]
    assert len({round(confidence, 4) for _, confidence, _ in expected}) > len(files) / 2, "most have their own"
    damaged = b"\x89PNG not an image"
    with running(served, batch_size=16) as (port, batcher), ThreadPoolExecutor(16) as clients:
        bodies = [damaged if n % 20 == 19 else files[n % len(files)] for n in range(200)]
        answers = list(clients.map(lambda body: ask(port, body), bodies))
        assert batcher.answered == 200 and batcher.batches < 150, "images of several requests go through together"
    for n, (status, result, _) in enumerate(answers):
        assert status == (400 if n % 20 == 19 else 200)
        if status == 200:
            prediction, confidence, text = expected[n % len(files)]
            assert (result["prediction"], result["full_response"]) == (prediction, text)
            assert result["confidence"] == pytest.approx(confidence, abs=1e-5)


def test_the_accuracy_of_the_run_is_known_next_to_it_only(demo_run, loaded, tmp_path):
    results = json.loads((demo_run / "results.json").read_text())
    found = test_accuracy(demo_run / "best_model", loaded[2])
    assert [found.value, found.low, found.high] == results["test"]["calibration"]["after"]["accuracy"]
    assert found.images == results["pictures"]["test"]
    assert test_accuracy(demo_run / "best_model", loaded[2] | {"run_id": "another"}) is None
    assert test_accuracy(demo_run / "final_model", loaded[2]) is None, "it was not tested"
    assert test_accuracy(tmp_path, loaded[2]) is None

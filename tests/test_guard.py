"""What the server of --serve refuses before anything else sees it."""

import asyncio
import json

import pytest

from vlm.service.guard import SMALL, Guard, Route


def ask(path="/predict", method="POST", body=(b"image",), bound="127.0.0.1", **headers):
    """(status, words, bytes that the application got) of one request to a guard whose route /predict takes 10 bytes."""
    sent, got = [], []
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
    parts += [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        while (message := await receive())["more_body"]:
            got.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": null}'})

    def room_for(path):
        return "no room" if path == "/full" else None

    guard = Guard(app, [Route("/predict", 10), Route("/(full|small)")], bound, room_for)
    given = {"host": "localhost:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in given.items()]
    asyncio.run(guard(scope, receive, send))
    text = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], json.loads(text)["error"], b"".join(got)


def test_what_is_in_order_gets_through():
    assert ask(content_length="5") == (200, None, b"image")
    assert ask(origin="http://localhost:7860", sec_fetch_site="same-origin") == (200, None, b"image")
    assert ask("/small", body=[b"x" * SMALL])[0] == 200


@pytest.mark.parametrize("path", ["/", "/predict/", "/predict2", "/file=/etc/passwd", "/predict/../x", "/docs"])
def test_paths_that_are_not_answered(path):
    status, words, got = ask(path)
    assert status == 404 and words.startswith(f"{path} is not here: POST an image to /predict") and got == b""


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "localhost.evil.example", "", "[", "10.0.0.7"])
def test_a_server_for_this_machine_answers_for_no_other_host(host):
    assert ask(host=host) == (421, f"this server does not answer for the host {host!r}.", b"")


@pytest.mark.parametrize(
    ("bound", "host"),
    [
        ("127.0.0.1", "127.0.0.1:7860"),
        ("127.0.0.1", "LOCALHOST"),
        ("::1", "[::1]:7860"),
        ("10.0.0.7", "10.0.0.7:7860"),
        ("0.0.0.0", "my.machine.example"),
    ],
)
def test_hosts_that_a_server_answers_for(bound, host):
    assert ask(bound=bound, host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "http://localhost:1234"}, {"origin": "null"}]
    + [{"sec_fetch_site": "cross-site"}],
)
def test_pages_of_other_sites_cannot_post(headers):
    assert ask(**headers) == (403, "this server does not answer the pages of other sites.", b"")
    assert ask(method="GET", **headers)[0] == 200, "links from elsewhere work"


def test_more_bytes_than_a_route_takes_are_refused_whether_they_are_announced_or_not():
    refused = "this is larger than the 0 MB that are taken: send a smaller image."
    assert ask(content_length="11") == (413, refused, b"")
    assert ask(content_length="-1") == (413, refused, b"")
    assert ask(body=[b"12345"] * 3) == (413, refused, b"1234512345"), "the third part is too much"
    assert ask(body=[b"12345"] * 2)[0] == 200
    assert ask("/small", body=[b"x" * (SMALL + 1)])[:2] == (413, refused.replace("0 MB", "1 MB"))


def test_uploads_wait_if_there_is_no_room():
    assert ask("/full") == (503, "no room", b"")


def test_an_answer_that_fails_after_it_has_begun_is_ended_and_noted_in_a_line(capsys):
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("the answer\nhas begun") from KeyError("session")

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, [Route("/x")], "127.0.0.1")(scope, None, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert capsys.readouterr().err == "error: /x: RuntimeError: 'session'\n"


def test_a_path_that_leaves_its_folder_is_not_answered():
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request"}

    scope = {"type": "http", "method": "GET", "path": "/static/../..", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(None, [Route("/static/.*")], "127.0.0.1")(scope, receive, send))
    assert sent[0]["status"] == 404

"""What the server does not do: answer other sites and hosts, take more than it has room for, open paths that are not
its own. Every request goes through here first."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vlm.common import one_line

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[dict[str, Any]], Any]

LOCAL = {"localhost", "127.0.0.1", "::1"}
EVERYWHERE = {"0.0.0.0", "::"}
DROPPED = 256 * 2**20  # bytes of a refused request that are read
SMALL = 2**20  # bytes of a request that sends no image
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
READING = ("HEAD", "OPTIONS")  # of the page


class Route(NamedTuple):
    """Paths that are answered. path: a regular expression of the whole path; most: bytes of a request to it."""

    path: str
    most: int = SMALL


class TooLarge(Exception):
    """A request has more bytes than its route takes."""


class Guard:
    """ASGI middleware.

    Args:
        app: the application. routes: what is answered; all else is not found.
        host: the address that the server is bound to. If it is this machine's own, only names of this machine are
            answered: the page of another site could give its own name this address (DNS rebinding).
        room_for: path -> why a request has to wait, or None.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Any],
        routes: Iterable[Route],
        host: str,
        room_for: Callable[[str], str | None] = lambda path: None,
    ) -> None:
        self.app, self.room_for = app, room_for
        self.routes = [(re.compile(route.path), route.most) for route in routes]
        self.hosts = None if host in EVERYWHERE else LOCAL | {host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path, headers = scope["path"], {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        most = next((most for pattern, most in self.routes if pattern.fullmatch(path)), None)
        if refused := self._refused(scope["method"], path, headers, most):
            await _say(receive, send, *refused)
            return
        assert most is not None
        await self._limited(scope, receive, send, most)

    def _refused(self, method: str, path: str, headers: dict[bytes, str], most: int | None) -> tuple[int, str] | None:
        """The status and the words with which a request is refused, if it is."""
        host = headers.get(b"host", "")
        if self.hosts is not None and _name_of(host) not in self.hosts:
            return 421, f"this server does not answer for the host {host!r}."
        origin = headers.get(b"origin")
        if method not in ("GET", "HEAD") and (
            (origin and urlsplit(origin).netloc != host) or headers.get(b"sec-fetch-site") == "cross-site"
        ):
            return 403, "this server does not answer the pages of other sites."
        if method not in (*METHODS, *READING):
            return 405, f"{method[:20]} is not answered here: POST an image to /predict, or open / in a browser."
        if most is None or ".." in path.split("/"):
            return 404, f"{path} is not here: POST an image to /predict, or open / in a browser."
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > most:
            return 413, too_large(most)
        if why := self.room_for(path):
            return 503, why
        return None

    async def _limited(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        """Pass a request on, and count the bytes that it sends: it need not have announced them, or not truly.

        An error after the answer has begun is noted in a line; an earlier one is raised, and becomes an answer.
        """
        taken, begun = 0, False

        async def counted() -> dict[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise TooLarge
            return message

        async def noted(message: dict[str, Any]) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not begun:
                await _say(receive, send, 413, too_large(most))
        except Exception as error:
            if not begun:
                raise
            from vlm.common import note  # needs a package, and the flags of --serve are read without any

            note(f"error: {scope['path']}: {type(error).__name__}: {one_line(error.__cause__ or error)}")
            with suppress(Exception):  # it may have ended
                await send({"type": "http.response.body"})


def too_large(most: int) -> str:
    """What is said of a request with more bytes than are taken."""
    return f"this is larger than the {most / 2**20:.0f} MB that are taken: send a smaller image."


def _name_of(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _say(receive: Receive, send: Send, status: int, text: str) -> None:
    """An answer in the form of /predict. Clients that read it only after they have sent all get it too, because what
    they send is read, up to a bound, and dropped."""
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": text}).encode(), "more_body": True})
    dropped, more = 0, True
    while more and dropped < DROPPED:
        message = await receive()
        dropped += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.body"})

"""A hub on this machine, for the hub's real client: serves folders as models and datasets, with one commit each."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


class FakeHub:
    """The files of `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`; `refusals` maps an id to an X-Error-Code
    for its files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refusals: dict[str, str] = {}
        self.requests: list[str] = []
        self.url = ""

    def add(self, kind: str, name: str, files: dict[str, str | bytes]) -> None:
        """Put a repository there. kind: models or datasets."""
        for path, content in files.items():
            target = self.root / kind / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answer requests at `hub.url` until the end of the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        if parts[0] == "api" and len(parts) >= 4:
            self._api(parts[1], "/".join(parts[2:4]), parts[4:], sent)
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[kind == "datasets" :]
            self._file(kind, "/".join(parts[:2]), parts[3:])

    do_HEAD = do_POST = do_GET

    def _api(self, kind: str, name: str, rest: list[str], sent: bytes) -> None:
        folder = self.hub.root / kind / name
        if not folder.is_dir():
            return self._answer(404, error="RepoNotFound")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._answer(404, error="RevisionNotFound")
        paths = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
        if rest and rest[0] == "tree":
            under = Path(*rest[2:])
            inside = [path for path in paths if under in Path(path).parents]
            if "recursive=true" not in self.path.lower():
                inside = [path for path in inside if Path(path).parent == under]
            return self._answer(200, json.dumps([self._entry(folder, path) for path in inside]))
        if rest and rest[0] == "paths-info":
            wanted = parse_qs(sent.decode()).get("paths", [])
            return self._answer(200, json.dumps([self._entry(folder, path) for path in paths if path in wanted]))
        files = [path for path in paths if (folder / path).is_file()]
        siblings = [{"rfilename": file} for file in files]
        self._answer(
            200,
            json.dumps({"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False, "downloads": 0}),
        )

    def _entry(self, folder: Path, path: str) -> dict:
        oid = hashlib.sha1(path.encode()).hexdigest()
        if (folder / path).is_dir():
            return {"type": "directory", "path": path, "oid": oid}
        return {"type": "file", "path": path, "size": (folder / path).stat().st_size, "oid": oid}

    def _file(self, kind: str, name: str, rest: list[str]) -> None:
        path = self.hub.root / kind / name / "/".join(rest[1:])
        if name in self.hub.refusals:
            self._answer(403, error=self.hub.refusals[name])
        elif not path.is_file():
            self._answer(404, error="EntryNotFound")
        else:
            self._answer(200, path.read_bytes(), commit=COMMIT)

    def _answer(self, status: int, body: str | bytes = b"", error: str = "", commit: str = "") -> None:
        body = body.encode() if isinstance(body, str) else body
        if status == 200 and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            body, status = body[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        headers = {
            "Content-Length": len(body),
            "X-Error-Code": error,
            "X-Repo-Commit": commit,
            "ETag": f'"{hash(body)}"' if commit else "",
        }
        for name, value in headers.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

"""A hub on this machine, for the hub's real client: serves folders as models and datasets, with one commit each."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"
TOKEN = "hf_good"


@dataclass
class Failure:
    """An answer in the place of the right one. part: what the path has; times: how often; headers: of the answer;
    after: bytes of the right answer before the connection ends, instead of the status."""

    part: str
    status: int = 500
    times: int = 1000
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None


class FakeHub:
    """The files of `root/models/OWNER/NAME` and `root/datasets/OWNER/NAME`.

    refusals: maps an id to an X-Error-Code for its files; gated: ids whose files need the token `TOKEN`;
    renamed: old ids and the new ones; failures: the first that fits and is left is the answer;
    private: ids that were made private; accounts: whose token it is, by token; large: bytes by their sha256, which came
    before the commit that names them;
    delay: seconds before an answer; requests: those that came; sent: bytes of files that were sent.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refusals: dict[str, str] = {}
        self.gated: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.failures: list[Failure] = []
        self.private: set[str] = set()
        self.accounts: dict[str, dict] = {TOKEN: {"name": "me", "orgs": [{"name": "we"}], "type": "user"}}
        self.large: dict[str, bytes] = {}
        self.delay = 0.0
        self.requests: list[str] = []
        self.sent = 0
        self.url = ""

    def files_sent(self) -> list[str]:
        """The paths of the files of which at least a part was asked for."""
        return sorted(
            {
                line.split("/resolve/")[1].split("/", 1)[1]
                for line in self.requests
                if line[:3] == "GET" and "/resolve/" in line
            }
        )

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


class _Upload:
    """The calls of an upload, by what their paths have."""

    PARTS = {
        "/api/whoami-v2": "whoami",
        "/api/validate-yaml": "yaml",
        "/api/repos/create": "create",
        ".git/info/lfs/objects/batch": "lfs",
        "/preupload/": "preupload",
        "/commit/": "commit",
        "/put/": "put",
    }

    @classmethod
    def of(cls, command: str, path: str) -> str | None:
        if command == "GET" and path != "/api/whoami-v2":
            return None
        return next((what for part, what in cls.PARTS.items() if part in path), None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    break_after: int | None = None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length)
        Event().wait(self.hub.delay)
        if failure := next((one for one in self.hub.failures if one.part in path and one.times), None):
            failure.times -= 1
            if failure.after is None:
                return self._answer(failure.status, headers=failure.headers)
            self.break_after = failure.after
        if uploading := _Upload.of(self.command, path):
            return self._upload(uploading, path, sent)
        if parts[0] == "api":
            kind, parts = parts[1], parts[2:]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[kind == "datasets" :]
        words = 1 if len(parts) < 2 or parts[1] in ("revision", "tree", "paths-info", "resolve") else 2
        name, rest = "/".join(parts[:words]), parts[words:]
        if name in self.hub.renamed:
            return self._answer(307, headers={"Location": self.path.replace(name, self.hub.renamed[name], 1)})
        if path.startswith("/api"):
            self._api(kind, name, rest, sent)
        else:
            self._file(kind, name, rest[1:])

    do_HEAD = do_POST = do_PUT = do_GET

    def _upload(self, what: str, path: str, sent: bytes) -> None:
        """The calls of the real client when it uploads: who asks, a new repository, and the files of a commit."""
        hub, parts = self.hub, path.strip("/").split("/")
        account = hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if what == "put":  # a storage that is no part of the hub's API
            hub.large[parts[-1]] = sent
            return self._answer(200)
        if account is None:
            return self._answer(401)
        body = json.loads(sent) if sent and what != "commit" else {}
        if what == "whoami":
            return self._answer(200, json.dumps(account))
        if what == "yaml":
            return self._answer(200, json.dumps({"errors": [], "warnings": []}))
        if what == "create":
            return self._create(f"{body.get('organization') or account['name']}/{body['name']}", body)
        if what == "lfs":
            places = {one["oid"]: {"upload": {"href": f"{hub.url}/put/{one['oid']}"}} for one in body["objects"]}
            objects = [one | {"actions": places[one["oid"]]} for one in body["objects"]]
            return self._answer(200, json.dumps({"transfer": "basic", "objects": objects}))
        if what == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in body["files"]
            ]
            return self._answer(200, json.dumps({"files": modes}))
        self._commit(hub.root / "models" / "/".join(parts[2:4]), [json.loads(line) for line in sent.splitlines()])

    def _create(self, name: str, body: dict) -> None:
        there = (self.hub.root / "models" / name).is_dir()
        (self.hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
        if not there and (body.get("visibility") == "private" or body.get("private")):
            self.hub.private.add(name)
        self._answer(409 if there else 200, json.dumps({"url": f"{self.hub.url}/{name}", "error": "exists"}))

    def _commit(self, folder: Path, lines: list[dict]) -> None:
        address = f"{self.hub.url}/{folder.parent.name}/{folder.name}/commit/{COMMIT}"
        for line in lines[1:]:
            value = line["value"]
            target = folder / value["path"]
            if line["key"] == "deletedFile":
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            large = line["key"] == "lfsFile"
            target.write_bytes(self.hub.large[value["oid"]] if large else base64.b64decode(value["content"]))
        self._answer(200, json.dumps({"commitUrl": address, "commitOid": COMMIT}))

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
            json.dumps(
                {
                    "id": name,
                    "sha": COMMIT,
                    "siblings": siblings,
                    "tags": [],
                    "private": name in self.hub.private,
                    "downloads": 0,
                }
            ),
        )

    def _entry(self, folder: Path, path: str) -> dict:
        oid = hashlib.sha1(path.encode()).hexdigest()
        if (folder / path).is_dir():
            return {"type": "directory", "path": path, "oid": oid}
        return {"type": "file", "path": path, "size": (folder / path).stat().st_size, "oid": oid}

    def _file(self, kind: str, name: str, rest: list[str]) -> None:
        path = self.hub.root / kind / name / "/".join(rest[1:])
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(403 if self.headers.get("Authorization") else 401, error="GatedRepo")
        elif name in self.hub.refusals:
            self._answer(403, error=self.hub.refusals[name])
        elif not path.is_file():
            self._answer(404, error="EntryNotFound")
        else:
            self._answer(200, path.read_bytes(), commit=COMMIT)

    def _answer(
        self, status: int, body: str | bytes = b"", error: str = "", commit: str = "", headers: dict | None = None
    ) -> None:
        body = body.encode() if isinstance(body, str) else body
        given = {"X-Error-Code": error, "X-Repo-Commit": commit, **(headers or {})}
        if commit:
            given |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        if status == 200 and (wanted := self.headers.get("Range")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            given["Content-Range"] = f"bytes {first}-{last or len(body) - 1}/{len(body)}"
            body, status = body[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **given}.items():
            if value != "":
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(body) if commit else 0
            with suppress(ConnectionError):  # whoever asked did not wait
                self.wfile.write(body[: self.break_after])

    def log_message(self, *_: object) -> None:
        pass

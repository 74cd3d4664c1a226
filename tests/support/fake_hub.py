"""A hub on the loopback device: repositories of files at one commit, as the hub's client asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """Where it listens, and the files it was asked for, as ``org/name/path``."""

    endpoint: str = ""
    sent: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)


@contextlib.contextmanager
def fake_hub(repositories: Mapping[str, Path]) -> Iterator[FakeHub]:
    """Serve folders as repositories ``org/name``."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                name, kind, revision = found.groups()
                if name in repositories:
                    hub.revisions.add(revision or "main")
                    files = sorted(each for each in repositories[name].rglob("*") if each.is_file())
                    names = [str(each.relative_to(repositories[name])) for each in files]
                    answer: Any = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": each} for each in names]}
                    if kind == "tree":
                        answer = [
                            {"type": "file", "path": each, "size": file.stat().st_size, "oid": _sha256(file)[:40]}
                            for each, file in zip(names, files, strict=True)
                        ]
                    return self._send(json.dumps(answer).encode(), "application/json", with_body=with_body)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                name, wanted = found.groups()
                file = repositories[name] / wanted if name in repositories else None
                if file is not None and file.is_file():
                    if with_body:
                        hub.sent.append(f"{name}/{wanted}")
                    return self._send(file.read_bytes(), "application/octet-stream", etag=_sha256(file), with_body=with_body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "/resolve/" not in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def _send(self, body: bytes, kind: str, *, with_body: bool, etag: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if etag is not None:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

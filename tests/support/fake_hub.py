"""A hub on the loopback device: repositories of models and datasets at one commit, as the hub's client asks for them."""

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
from urllib.parse import parse_qs, unquote

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """Where it listens, and the files it was asked for, as ``org/name/path``."""

    endpoint: str = ""
    sent: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)


@contextlib.contextmanager
def fake_hub(
    repositories: Mapping[str, Path], *, datasets: Mapping[str, Path] | None = None, commit: str = COMMIT
) -> Iterator[FakeHub]:
    """Serve folders as repositories ``org/name``, of models and of datasets."""
    hub = FakeHub()
    kinds = {"models": repositories, "datasets": datasets or {}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            """``paths-info``: what a repository knows of some of its paths."""
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/[^/]+", self.path)
            folder = kinds[found[1]].get(found[2]) if found else None
            if folder is None:
                return self._refuse("RepoNotFound")
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            entries = [_entry(folder, folder / path) for path in asked if path and (folder / path).exists()]
            return self._send(json.dumps(entries).encode(), "application/json", with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path):
                kind, name, action, revision, below = found.groups()
                if (folder := kinds[kind].get(name)) is not None:
                    hub.revisions.add(revision or "main")
                    files = sorted((folder / (below or "")).rglob("*"))
                    names = [str(each.relative_to(folder)) for each in files if each.is_file()]
                    answer: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": each} for each in names]}
                    if action == "tree":
                        is_deep = "recursive=true" in self.path.lower()
                        answer = [_entry(folder, each) for each in files if is_deep or each.parent == folder / (below or "")]
                    return self._send(json.dumps(answer).encode(), "application/json", with_body=with_body)
            elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                kind, name, wanted = found.groups()
                folder = kinds["datasets" if kind else "models"].get(name)
                file = folder / wanted if folder is not None else None
                if file is not None and file.is_file():
                    if with_body:
                        hub.sent.append(f"{name}/{wanted}")
                    return self._send(file.read_bytes(), "application/octet-stream", etag=_sha256(file), with_body=with_body)
            return self._refuse("RepoNotFound" if "/resolve/" not in path else "EntryNotFound")

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, body: bytes, kind: str, *, with_body: bool, etag: str | None = None) -> None:
            part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            whole = len(body)
            if part:
                first, last = int(part[1]), min(int(part[2] or whole - 1), whole - 1)
                body = body[first : last + 1]
            self.send_response(206 if part else 200)
            if part:
                self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", commit)
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


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _sha256(path)[:40]}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

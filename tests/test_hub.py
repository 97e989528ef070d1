"""Datasets of the Hugging Face Hub, through its own client and a stand-in for its server."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

FILES = {
    "README.md": b"# Sums",
    "data/train-0.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "data/train-1.jsonl": b'{"text": "three"}\n',
    "data/test-0.jsonl": b'{"text": "four"}\n',
}
SHA = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """The few answers that reading a dataset takes, as the Hub gives them."""

    protocol_version = "HTTP/1.1"
    files = FILES

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path in ("/api/datasets/someone/sums", "/api/datasets/someone/sums/revision/main"):
            self._json({"id": "someone/sums", "sha": SHA, "siblings": []})
        elif path.startswith("/api/datasets/someone/sums/tree/main"):
            folder = {"type": "directory", "path": "data", "size": 0, "oid": "d" * 40}
            self._json([folder, *(self._entry(name) for name in self.files)])
        elif found := re.fullmatch(r"/datasets/someone/sums/resolve/main/(.+)", path):
            self._bytes(self.files[found[1]])
        else:
            self._json({"error": f"no {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = json.loads(asked)["paths"] if asked.startswith("{") else []
        self._json([self._entry(name) for name in names if name in self.files])

    def _entry(self, name: str) -> dict:
        content = self.files[name]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self._finish(body)

    def _bytes(self, content: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), wanted[2]) if wanted else (0, "")
        body = content[start : int(end) + 1 if end else None]
        self.send_response(206 if wanted else 200)
        if wanted:
            last = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("ETag", hashlib.sha1(content).hexdigest())
        self.send_header("X-Repo-Commit", SHA)
        self._finish(body)

    def _finish(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


READ = """
import sys
from bar_ray import storage
from bar_ray.data import formats
from bar_ray.types import UserError
uri = sys.argv[1]
try:
    print(storage.fingerprint_files(uri))
    for part in formats.parts(uri, "data/train-*"):
        for place, row in formats.read_part(part):
            print(part.file, place, row)
    print(formats.where(uri + "/data/train-0.jsonl", 16))
except UserError as error:
    print("refused:", error)
"""


def read(uri: str, endpoint: str) -> list[str]:
    """What a process says that reads a dataset; its client learns at its start where the Hub is."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, uri], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dataset_of_the_hub_is_read_in_parts(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "hf://datasets/someone/sums"
    fingerprint, *rows, where = read(uri, hub)
    assert rows == [
        f'{uri}/data/train-0.jsonl 0 {{"text": "one"}}',
        f'{uri}/data/train-0.jsonl 16 {{"text": "two"}}',
        f'{uri}/data/train-1.jsonl 0 {{"text": "three"}}',
    ]
    assert where == f"{uri}/data/train-0.jsonl line 2"
    assert read(uri, hub)[0] == fingerprint
    monkeypatch.setattr(Hub, "files", {**FILES, "data/train-1.jsonl": b'{"text": "3"}\n'})
    assert read(uri, hub)[0] != fingerprint, "another content"


def test_without_the_hub_it_is_said_what_to_do(hub: str) -> None:
    missing, hint = read("hf://datasets/someone/nothing", hub)
    assert missing.startswith("refused: cannot read hf://datasets/someone/nothing")
    assert "hf download --repo-type dataset" in hint
    offline, hint = read("hf://datasets/someone/sums", "http://127.0.0.1:9")
    assert "refused: cannot read" in offline and "hf download" in hint

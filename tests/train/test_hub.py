"""--push-to-hub, against a server on loopback that answers as the Hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from in_process import RANDOM, train_here

from entropy_masking.errors import RunError, UsageError
from train import hub

FLAGS = [*RANDOM, "--max-steps", 2, "--eval-fraction", 0, "--push-to-hub"]


class Hub(BaseHTTPRequestHandler):
    """Creates a repository, and takes one commit unless ``refuses``; ``asked`` has the requests by path."""

    refuses = False
    asked: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == "Bearer hf_secret"
        self.asked[self.path] = body
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"{huggingface_hub.constants.ENDPOINT}/me/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"]} | kinds for file in json.loads(body)["files"]]}
        elif "/commit/" in self.path:
            oid = "0" * 40
            answer = {"commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/student/commit/{oid}", "commitOid": oid}
        data = json.dumps(answer).encode()
        self.send_response(403 if self.refuses and "/commit/" in self.path else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(Hub, "asked", {}, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield Hub
    server.shutdown()


def test_the_finished_model_is_pushed_and_nothing_else(
    server: type[Hub], scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the Hub refuses, nothing is lost: the same command pushes the model and trains nothing."""
    flags = [*FLAGS, "--hub-model-id", "me/student", "--hub-private-repo"]
    monkeypatch.setattr(server, "refuses", True)
    with pytest.raises(RunError, match=r"out is finished, but was not pushed to me/student \(.*403.*the same command"):
        train_here(scored, tmp_path / "out", *flags)
    written = (tmp_path / "out" / "model.safetensors").stat()
    monkeypatch.setattr(server, "refuses", False)
    train_here(scored, tmp_path / "out", *flags)
    assert (tmp_path / "out" / "model.safetensors").stat() == written
    assert json.loads(server.asked["/api/repos/create"])["visibility"] == "private"
    lines = map(json.loads, server.asked["/api/models/me/student/commit/main"].splitlines())
    files = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    model, tokenizer = {"README.md", "config.json", "model.safetensors"}, (scored / "tokenizer").iterdir()
    assert set(files) == model | {file.name for file in tokenizer}
    assert all((tmp_path / "out" / name).read_bytes() == base64.b64decode(text) for name, text in files.items())


def test_without_a_login_nothing_begins(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match=r"needs a login to the Hub; run `hf auth login`, or set HF_TOKEN"):
        train_here(scored, tmp_path / "out", *FLAGS)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")  # but the Hub is offline
    with pytest.raises(UsageError, match=r"cannot create the model out on the Hub \(.*; check the login"):
        train_here(scored, tmp_path / "out", *FLAGS)
    assert not (tmp_path / "out" / "run.json").exists()

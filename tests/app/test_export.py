"""Exports: plain transformers reads them, hubs get every byte, and nothing half-written stays behind."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoImageProcessor, AutoTokenizer

from blm.app.export import export_dataset, export_vllm, push_to_hub
from blm.backbone import Backbone
from blm.cli import main
from blm.types import BlmError
from tests.support.backbones import tiny_qwen, tiny_smolvlm
from tests.support.episodes import make_episode, write

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""huggingface_hub sends files in a way that its own HTTP library no longer likes."""


class Hub(ThreadingHTTPServer):
    """As much of the hub's protocol as an upload needs: repositories, Git LFS, commits, tags."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: tuple[str, ...] = ("Bearer right",)
        self.broken = False
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.server.large[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply({})

    def do_GET(self) -> None:
        self.reply({"error": "nothing to read here"}, 404)

    def do_POST(self) -> None:
        body = self.body()
        found = re.fullmatch(r"/api/((?:model|dataset)s/[^/]+/[^/]+)/(preupload|commit|tag)/(.+)", self.path)
        if self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") not in self.server.tokens:
            self.reply({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            new = {
                "files": {},
                "tags": [],
                "private": asked.get("private") or asked.get("visibility") == "private",
            }
            self.server.repos.setdefault(name, new)
            self.reply({"url": f"{self.server.address}/{name}"})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}
            self.reply({"transfer": "basic", "objects": objects})
        elif self.server.broken and found and found[2] == "commit":
            self.reply({"error": "out of order"}, 500)
        else:
            assert found, self.path
            self.reply(getattr(self, found[2])(self.server.repos[found[1]], body))

    def preupload(self, repo: dict[str, Any], body: bytes) -> dict[str, Any]:
        small = (".json", ".md", ".jinja")
        modes = [
            {"path": path, "uploadMode": "regular" if path.endswith(small) else "lfs", "shouldIgnore": False}
            for path in (one["path"] for one in json.loads(body)["files"])
        ]
        return {"files": modes}

    def tag(self, repo: dict[str, Any], body: bytes) -> dict[str, Any]:
        repo["tags"].append(json.loads(body)["tag"])
        return {}

    def commit(self, repo: dict[str, Any], body: bytes) -> dict[str, Any]:
        for entry in map(json.loads, body.decode().splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repo["files"][value["path"]] = self.server.large[value["oid"]]
        name = next(name for name, known in self.server.repos.items() if known is repo)
        return {"commitUrl": f"{self.server.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, value: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "right")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data"), [make_episode(seed, 6) for seed in range(2)])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("make", [lambda: tiny_qwen("2.5"), lambda: tiny_qwen("3")], ids=["2.5", "3"])
def test_an_exported_backbone_is_stock_and_complete_for_vllm(make, tmp_path):
    backbone = make()
    backbone.save(tmp_path / "tuned")
    command = export_vllm(str(tmp_path / "tuned"), tmp_path / "out", images=3, context=4096)
    assert command.startswith(f"vllm serve {tmp_path}/out ") and "'{\"image\": 3}'" in command
    assert command in (tmp_path / "out/README.md").read_text()
    again = Backbone.load(tmp_path / "out")
    assert torch.allclose(again.probe_logits(), backbone.probe_logits(), atol=1e-5)
    pictures = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    assert pictures.to_dict()["patch_size"] == backbone.processor.image_processor.patch_size
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert (tmp_path / "out/video_preprocessor_config.json").is_file()


def test_a_model_of_our_own_parts_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(BlmError, match=r"blm_conv_vision.*`blm serve`"):
        export_vllm("nano", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_gives_other_logits_is_not_exported(tmp_path, monkeypatch):
    tiny_smolvlm("smolvlm").save(tmp_path / "tuned")
    monkeypatch.setattr(Backbone, "probe_logits", lambda self: torch.ones(2, self.model.vocab_size))
    with pytest.raises(BlmError, match="differ from ours by"):
        export_vllm(str(tmp_path / "tuned"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]


def test_a_dataset_arrives_whole_with_its_card_and_tag(dataset, hub, tmp_path):
    export_dataset(dataset, tmp_path / "out")
    address = push_to_hub(tmp_path / "out", "lab/panda", private=True, endpoint=hub.address)
    repo = hub.repos["datasets/lab/panda"]
    assert address.endswith("datasets/lab/panda") and repo["private"]
    assert repo["tags"] == ["v3.0"]
    assert repo["files"] == contents(tmp_path / "out")
    assert repo["files"].keys() - contents(dataset).keys() == {"README.md"}
    assert b"tags: [LeRobot]" in repo["files"]["README.md"]


def test_exporting_twice_does_not_overwrite(dataset, tmp_path):
    export_dataset(dataset, tmp_path / "out")
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(BlmError, match="exists"):
        export_dataset(dataset, tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_a_damaged_dataset_is_not_exported(dataset, tmp_path):
    export_dataset(dataset, tmp_path / "copy")
    table = next((tmp_path / "copy/data").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-1] + b"\0")
    with pytest.raises(BlmError, match=table.name):
        export_dataset(tmp_path / "copy", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repo", "token", "broken", "said"),
    [
        ("a/b/c", "right", False, "ORG/NAME"),
        ("lab/panda", "wrong", False, "hf auth login"),
        ("lab/panda", "right", True, "run the same command again"),
    ],
)
def test_a_failed_upload_names_a_remedy(dataset, hub, monkeypatch, repo, token, broken, said):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.broken = broken
    with pytest.raises(BlmError, match=said):
        push_to_hub(dataset, repo, endpoint=hub.address)
    assert not any(repo["files"] for repo in hub.repos.values())


def test_an_unreachable_hub_is_reported(dataset):
    with pytest.raises(BlmError, match="run the same command again"):
        push_to_hub(dataset, "lab/panda", endpoint="http://127.0.0.1:9")


def test_the_commands(dataset, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.address)
    main(["export", "lerobot", str(dataset), str(tmp_path / "out"), "--push", "lab/mine"])
    assert "uploaded: " in capsys.readouterr().out
    assert hub.repos["datasets/lab/mine"]["files"] == contents(tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["export", "checkpoint", str(dataset), str(tmp_path / "none")])
    assert "no checkpoint" in capsys.readouterr().err and not (tmp_path / "none").exists()

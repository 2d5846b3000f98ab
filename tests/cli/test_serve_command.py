"""`blm serve` and `blm chat`: what they take, what they refuse in one line, and how they end."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest

from blm import addresses
from blm.app.chats import load_chat
from blm.app.model import BLM, find_model
from blm.backbone import BACKBONES, Backbone
from blm.baselines.diffusion_policy import DiffusionConfig, DiffusionNetwork, DiffusionPolicy
from blm.cli import main
from blm.cli.serve import Serve, _check_access
from blm.datasets.transforms import Normalize, RobotTransforms
from blm.serving.client import RemotePolicy
from blm.types import BlmError
from tests.support.serving import (
    CONTRACT,
    EchoGenerator,
    EchoPolicy,
    ask,
    body,
    observation,
    running,
    wait_for,
)

START = "import sys; from blm.cli import main; main(sys.argv[1:])"


def blm(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)


@contextmanager
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield str(listening.getsockname()[1])


# --- refused before anything is loaded ---

REFUSED: dict[str, tuple[Sequence[str], str]] = {
    "port": (["--port", "65536"], "--port 65536: a TCP port must be 0 to 65535"),
    "negative port": (["--port", "-1"], "--port -1"),
    "unknown host": (["--host", "no-such-host.invalid"], "'no-such-host.invalid'"),
    "empty host": (["--host", ""], "--host is empty"),
    "foreign address": (["--host", "192.0.2.1", "--api-key", "k"], "no interface of this machine"),
    "open to all": (["--host", "0.0.0.0"], "--allow-unauthenticated"),
    "open to all, IPv6": (["--host", "::"], "--api-key-file"),
    "open to all, mapped": (["--host", "::ffff:0.0.0.0"], "BLM_API_KEY"),
    "open to all, short": (["--host", "0"], "BLM_API_KEY"),
    "open GR00T": (["--host", "0.0.0.0", "--groot-port", "5555"], "--allow-unauthenticated"),
    "empty key": (["--api-key", ""], "the API key is empty"),
    "blank key": (["--api-key", "  "], "the API key is empty"),
    "no key file": (["--api-key-file", "/no/such/file"], "'/no/such/file'"),
    "allowed host": (["--allowed-host", "http://a"], "--allowed-host 'http://a'"),
    "allowed origin": (["--allowed-origin", "a"], "--allowed-origin 'a'"),
    "same port": (["--port", "5555", "--groot-port", "5555"], "--groot-port 5555"),
    "GR00T port": (["--groot-port", "99999"], "--groot-port 99999"),
    "GR00T port 0": (["--groot-port", "0"], "--groot-port 0"),
    "device": (["--device", "tpu"], "device 'tpu'"),
    "no GPU": (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "beside": (["--playground", "--beside", "x"], "NAME=ws://HOST:PORT"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_wrong_flags_end_with_one_line(
    flags: Sequence[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*given: object, **named: object) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(BLM, "from_pretrained", load)
    monkeypatch.delenv("BLM_API_KEY", raising=False)
    if "--port" not in flags:
        flags = [*flags, "--port", "0"]
    with pytest.raises(SystemExit) as ended:
        main(["serve", "blm-nano", *flags])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("warning:")]
    assert ended.value.code == 2 and not out and len(lines) == 1, err
    assert lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize("flag", ["--port", "--groot-port"])
def test_a_taken_port_is_reported_before_loading(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with taken_port() as port, pytest.raises(SystemExit):
        main(["serve", "blm-nano", *([] if flag == "--port" else ["--port", "0"]), flag, port])
    assert f"{flag} {port}: another program has it" in capsys.readouterr().err


def test_who_may_serve_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BLM_API_KEY", raising=False)
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"):
        assert not _check_access(Serve(checkpoint="blm-nano", host=host)).needs_key
    assert not _check_access(
        Serve(checkpoint="blm-nano", host="0.0.0.0", allow_unauthenticated=True)
    ).needs_key
    file = tmp_path / "key"
    file.write_text("k\n")
    file.chmod(0o600)
    assert _check_access(Serve(checkpoint="blm-nano", host="0.0.0.0", api_key_file=file)).accepts("k")
    monkeypatch.setenv("BLM_API_KEY", "from-environment")
    assert _check_access(Serve(checkpoint="blm-nano", host="::")).accepts("from-environment")
    assert _check_access(Serve(checkpoint="blm-nano", host="localhost")).host_policy.knows_host("localhost")


def test_ports_of_all_addresses_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.2", 0))]
    monkeypatch.setattr(addresses, "resolve", lambda host, port: found)
    sockets = addresses.listen("both", 0)
    ports = {one.getsockname()[1] for one in sockets}
    for one in sockets:
        one.close()
    assert len(sockets) == 2 and len(ports) == 1
    assert addresses.to_url("ws", "::1", 80) == "ws://[::1]:80"


# --- models ---


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "stage1/backbone"
    Backbone.load("nano").save(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baseline") / "checkpoint"
    contract = replace(
        CONTRACT, action_spaces={"panda": CONTRACT.action_spaces["panda"]}, image_size=32, horizon=8
    )
    config = DiffusionConfig()
    network = DiffusionNetwork(config, contract.cameras, 1, 8)
    unit = Normalize.from_json({"low": [-3.0] * 8, "high": [3.0] * 8})
    transforms = {
        "panda": RobotTransforms(state=unit, normalize_actions=unit, relative=(True,) * 7 + (False,))
    }
    DiffusionPolicy(network, transforms, contract).save(folder, {})
    return folder


def test_a_stage_one_result_chats_and_refuses_actions(backbone: Path) -> None:
    run = backbone.parents[1]
    for name in (backbone, backbone.parent, run):
        source = find_model(name)
        assert source.where == str(backbone) and source.has_chat and not source.has_policy
    model = source.load()
    with running(model.policy, model.generator()) as address:
        about = httpx.get(f"http://{address}/version").json()
        assert about["serves"] == ["chat"] and about["policy"] is None and about["chat"]
        assert httpx.get(f"http://{address}/v1/models").json()["data"][0]["serves"] == ["chat"]
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
            assert ask(client, "What can you do?", max_tokens=3).usage.completion_tokens >= 1
        for path in ("", "/v1/realtime/robot/openpi"):
            with pytest.raises(BlmError, match="404: this checkpoint has no policy"):
                RemotePolicy(f"ws://{address}{path}")
        with pytest.raises(BlmError, match="404: no such path: /other"):
            RemotePolicy(f"ws://{address}/other")
    assert load_chat(str(run)).chat.answer is not None


def test_a_diffusion_policy_acts_and_refuses_chat(diffusion: Path) -> None:
    source = find_model(diffusion)
    assert source.has_policy and not source.has_chat
    model = source.load()
    assert model.policy is not None and model.generator() is None
    with running(model.policy, None) as address:
        assert httpx.get(f"http://{address}/version").json()["serves"] == ["actions"]
        reply = httpx.post(f"http://{address}/v1/chat/completions", json=body("hi"))
        assert reply.status_code == 404 and "has no chat" in reply.json()["error"]["message"]
        with RemotePolicy(f"ws://{address}") as remote:
            assert remote.act(observation(size=32)).actions.shape == (8, 8)
    for call in (lambda: BLM.from_pretrained(diffusion), lambda: load_chat(str(diffusion))):
        with pytest.raises(BlmError, match="cannot chat"):
            call()


def test_folders_without_a_model_are_described(tmp_path: Path) -> None:
    empty, dataset, file, broken = (tmp_path / name for name in ("empty", "data", "file", "broken"))
    empty.mkdir()
    (dataset / "meta").mkdir(parents=True)
    (dataset / "meta/info.json").write_text("{}")
    file.write_text("x")
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llava"}')
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "manifest.json").write_text("{}")
    (strange / "config.json").write_text('{"kind": "other"}')
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text('{"format": 1}')
    expected = {
        empty: "it is empty",
        dataset: "it is a dataset",
        file: "is a file",
        tmp_path / "none": "unknown checkpoint",
        strange: "of kind 'other'",
        half: "a checkpoint has manifest.json",
    }
    for folder, message in expected.items():
        with pytest.raises(BlmError, match=message) as caught:
            find_model(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(BlmError, match="cannot be loaded"):
        find_model(broken).load()
    for name in BACKBONES:
        assert find_model(name).has_chat
    assert find_model("smol").warning and find_model("nano").warning and not find_model("blm-nano").warning


def test_features_that_need_a_policy_are_refused_without_one(
    backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(backbone), "--port", "0", "--groot-port", "5999"])
    assert "--groot-port needs a policy" in capsys.readouterr().err


def test_chat_takes_lines_or_one_question(
    backbone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()

    def answer(self: Backbone, messages: Sequence, *, max_tokens: int = 128) -> str:
        asked.append([message.text for message in messages if message.role != "system"])
        return f"answer {len(asked)}"

    monkeypatch.setattr(Backbone, "answer", answer)
    main(["chat", str(backbone), "--question", "one"])
    with Path(os.devnull).open() as nothing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", nothing)
        main(["chat", str(backbone)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\n\n three \n"))
    main(["chat", str(backbone)])
    assert capsys.readouterr().out == "answer 1\nanswer 2\nanswer 3\n"
    assert asked == [["one"], ["two"], ["two", "answer 2", "three"]]


# --- the process ---


def test_a_server_from_the_command_line(tmp_path: Path) -> None:
    """On IPv6 and a free port, with a key from the environment that `ps` does not show; Ctrl-C ends it."""
    command = [sys.executable, "-c", START, "serve", "blm-nano", "--host", "::1", "--port", "0"]
    environment = {**os.environ, "BLM_API_KEY": "from-env", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=err, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.split("http://")[1].split("/v1")[0]
        assert address.startswith("[::1]:") and f"ws://{address}/" in line
        with httpx.Client(trust_env=False) as client:
            wait_for(lambda: client.get(f"http://{address}/health").status_code == 200)
            assert client.get(f"http://{address}/version").status_code == 401
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
            patch.setenv("ALL_PROXY", "http://127.0.0.1:9")
            with RemotePolicy(f"ws://{address}", api_key="from-env") as remote:
                assert remote.contract.action_spaces
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        process.stdout.close()
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_interrupting_the_load_leaves_no_traceback(tmp_path: Path) -> None:
    start = START.replace("; main(", "; print('imported', flush=True); main(")
    command = [sys.executable, "-c", start, "serve", "blm-nano", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "imported\n"
    time.sleep(0.8)  # in the midst of importing torch, or of the load
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err and process.returncode in (0, 130), err


def test_the_app_reports_its_abilities() -> None:
    for policy, generator, serves in (
        (EchoPolicy(), EchoGenerator(), ["chat", "actions"]),
        (EchoPolicy(), None, ["actions"]),
        (None, EchoGenerator(), ["chat"]),
    ):
        with running(policy, generator) as address:
            assert httpx.get(f"http://{address}/version").json()["serves"] == serves


# --- names of models ---


def test_a_hub_id_is_a_backbone_and_only_a_policy_acts_alone() -> None:
    source = find_model("Qwen/Qwen2.5-VL-3B-Instruct")
    assert (source.kind, source.has_policy, source.has_chat) == ("backbone", False, True)
    with pytest.raises(BlmError, match="has no policy"):
        source.load(actions_only=True)
    with pytest.raises(BlmError, match="cannot be compiled: it is no checkpoint of Stage II"):
        source.load(compile="default")

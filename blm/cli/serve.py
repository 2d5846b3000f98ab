"""Commands of one model: serving it, asking it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from blm import addresses
from blm.types import BlmError, Message

if TYPE_CHECKING:
    from fastapi import FastAPI

    from blm.app.model import Model, Source
    from blm.serving.access.keys import AccessControl

console = Console()
complaints = Console(stderr=True)


@dataclass(frozen=True)
class Serve:
    """Serve chat (OpenAI protocol) and actions (OpenPI websocket) from one model on one port."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of Stage II, Stage I (chat only) or a Diffusion Policy (actions only); a release, a backbone."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network and needs an API key."""
    port: int = 8000
    """TCP port; 0 for any that is free."""
    name: str = "BLM"
    """Model name that chat clients ask for."""
    api_key: str | None = None
    """Key that clients must send. `ps` shows it to everyone here: better in BLM_API_KEY or a file."""
    api_key_file: Path | None = None
    """File with the API keys, one a line."""
    allowed_host: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Further host name that clients call this server by; give it once per name."""
    allowed_origin: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Origin, such as https://lab.example, whose web pages may use this server; give it once per origin."""
    allow_unauthenticated: bool = False
    """Let everyone who reaches a --host beyond this machine drive the robots, without a key."""
    reasoning: Literal["inline", "separate"] = "inline"
    """Where thoughts go: into the answer's text, or apart as `reasoning_content`."""
    device: str = "cpu"
    """Torch device."""
    playground: bool = False
    """Also serve a page on which the model drives simulated robots and answers questions."""
    beside: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """NAME=ws://HOST:PORT of a server to compare with on that page; give it once per server."""
    groot_port: int | None = None
    """TCP port for clients of Isaac-GR00T, theirs is 5555."""


def serve(command: str, arguments: list[str]) -> None:
    """`blm serve MODEL`: one process, both spaces."""
    chosen = tyro.cli(Serve, args=arguments, prog=f"blm {command}")
    access = _check_access(chosen)
    _check_addresses(chosen)
    with _quiet_interrupt():  # nothing is begun yet that would have to be ended
        from blm.app.model import check_device, find_model

        check_device(chosen.device)
        source = find_model(chosen.checkpoint)
        _check_features(chosen, source)
        if source.warning:
            complaints.print(f"[yellow]note:[/yellow] {source.warning}", highlight=False, soft_wrap=True)
        app = _build(chosen, source.load(chosen.device), access)
        sockets = addresses.listen(chosen.host, chosen.port)
    from blm.serving.app import serve as run_server

    port = sockets[0].getsockname()[1]
    web, socket = (addresses.to_url(scheme, chosen.host, port) for scheme in ("http", "ws"))
    spaces = [f"chat on {web}/v1"] * source.has_chat + [f"actions on {socket}/"] * source.has_policy
    console.print(", ".join(spaces), highlight=False, soft_wrap=True)
    if chosen.playground:
        console.print(f"playground on {web}/playground", highlight=False, soft_wrap=True)
    if chosen.groot_port is not None:
        address = addresses.to_url("tcp", chosen.host, chosen.groot_port)
        console.print(f"GR00T clients on {address}", highlight=False, soft_wrap=True)
    run_server(app, chosen.host, port, sockets)


def _check_access(chosen: Serve) -> AccessControl:
    """Read the keys. Raises BlmError if other machines reach a server without one, unless asked for."""
    from blm.serving.access.keys import AccessControl, HostPolicy, read_keys

    keys, warnings = read_keys(chosen.api_key, chosen.api_key_file, os.environ)
    for warning in warnings:
        complaints.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
    if not keys and not chosen.allow_unauthenticated and addresses.reaches_network(chosen.host):
        raise BlmError(
            f"--host {chosen.host} lets other machines drive the robots, and no API key is set; "
            "set BLM_API_KEY or --api-key-file FILE, or say --allow-unauthenticated if everyone there may"
        )
    own_name = [] if addresses.read_ip(chosen.host.strip("[]")) else [chosen.host]
    return AccessControl(keys, HostPolicy.read([*chosen.allowed_host, *own_name], chosen.allowed_origin))


def _check_addresses(chosen: Serve) -> None:
    """Raise BlmError for what cannot be listened on: now, not after the weights are loaded."""
    addresses.check_free(chosen.host, chosen.port)
    if chosen.groot_port is None:
        return
    if chosen.groot_port in (0, chosen.port):
        raise BlmError(f"--groot-port {chosen.groot_port}: give a port of its own, other than 0 and --port")
    addresses.check_free(chosen.host, chosen.groot_port, "--groot-port")


def _check_features(chosen: Serve, source: Source) -> None:
    if chosen.groot_port is not None and not source.has_policy:
        raise BlmError(f"--groot-port needs a policy, and '{chosen.checkpoint}' has chat only (Stage I)")
    if chosen.playground:
        from blm.serving.playground import read_beside

        read_beside(chosen.beside)


def _build(chosen: Serve, model: Model, access: AccessControl) -> FastAPI:
    from blm.serving.app import create_app
    from blm.serving.scheduler import SchedulerLimits

    # from 4 observations on, a processor takes as long for each; longer passes only keep the others waiting
    limits = SchedulerLimits(max_action_batch=8) if chosen.device == "cpu" else SchedulerLimits()
    app = create_app(
        model.policy,
        model.generator(),
        name=chosen.name,
        access=access,
        scheduler_limits=limits,
        reasoning=chosen.reasoning,
    )
    if chosen.playground:
        from blm.serving.playground import add_playground, read_beside

        contract = model.policy.contract if model.policy is not None else None
        add_playground(app, contract, name=chosen.name, beside=read_beside(chosen.beside))
    if chosen.groot_port is not None:
        from blm.serving.protocols.groot.server import add_groot

        assert model.policy is not None
        add_groot(app, model.policy, host=chosen.host, port=chosen.groot_port)
    return app


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """End at once at Ctrl-C: libraries that are being imported may turn KeyboardInterrupt into errors."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted before the server started\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def chat(command: str, arguments: list[str]) -> None:
    """`blm chat MODEL --image .. --question ..`."""

    def run(
        checkpoint: tyro.conf.Positional[str],
        question: str | None = None,
        image: Annotated[list[Path] | None, tyro.conf.UseAppendAction] = None,
        max_tokens: int = 128,
        device: str = "cpu",
    ) -> None:
        """Ask a model about pictures, or without any.

        Args:
            checkpoint: Folder of Stage II or Stage I, a release, or the name of a backbone.
            question: What to ask; without it one question is read from each line of the standard input.
            image: Picture file; give the flag once per camera, in the checkpoint's camera order.
            max_tokens: Longest answer.
            device: Torch device.
        """
        from blm.app.model import check_device, find_model
        from blm.backbone.prompt import question_prompt
        from blm.media import read_pixels

        check_device(device)
        source = find_model(checkpoint)
        if not source.has_chat:
            raise BlmError(f"'{checkpoint}' is a Diffusion Policy: it has actions and no chat")
        pictures = [read_pixels(path) for path in image or ()]
        if source.warning:
            complaints.print(f"[yellow]note:[/yellow] {source.warning}", highlight=False, soft_wrap=True)
        backbone = source.load(device).chat
        assert backbone is not None
        messages = list[Message]()
        for asked in _questions() if question is None else (question,):
            messages += question_prompt(asked, pictures) if not messages else [Message("user", (asked,))]
            answer = backbone.answer(messages, max_tokens=max_tokens)
            print(answer, flush=True)
            messages.append(Message("assistant", (answer,)))

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def _questions() -> Iterator[str]:
    """Yield the lines of the standard input; at a terminal ask for them, until its end (Ctrl-D)."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

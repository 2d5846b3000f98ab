"""Commands that serve a model or ask it a question."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console

from blm import addresses
from blm.cli.command import CliCommand
from blm.cli.interrupt import exit_on_interrupt
from blm.types import BlmError, Message

if TYPE_CHECKING:
    from fastapi import FastAPI

    from blm.app.exported import ExportSource
    from blm.app.model import ModelSource
    from blm.backbone.precision import LoadOptions
    from blm.serving.access.keys import AccessControl
    from blm.serving.scheduler import TokenGenerator
    from blm.types import Policy

    Source = ModelSource | ExportSource

console = Console()
complaints = Console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Serve(CliCommand):
    """Serve chat (OpenAI protocol) and actions (OpenPI websocket) from one model, on one port.

    Example: blm serve blm-nano --playground
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint folder, folder of an exported policy, name of a release or backbone, or a hub id.
    Stage II serves chat and actions, Stage I chat only, a Diffusion Policy actions only.
    An exported policy serves actions only, without torch."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 opens the server to the network and requires an API key."""
    port: int = 8000
    """TCP port; 0 selects any free port."""
    name: str = "BLM"
    """Model name that chat clients send."""
    api_key: str | None = None
    """API key that clients must send.
    Other users of this machine can see it in `ps`: prefer the variable BLM_API_KEY or a file."""
    api_key_file: Path | None = None
    """File with API keys, one per line."""
    allowed_host: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Additional host name under which clients reach this server. Repeat the flag for each name."""
    allowed_origin: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Origin whose web pages may use this server, such as https://lab.example.
    Repeat the flag for each origin."""
    allow_unauthenticated: bool = False
    """Let anyone on the network use the server, robots included, without an API key."""
    reasoning: Literal["inline", "separate"] = "inline"
    """Where to put the model's reasoning: in the text of the answer, or in `reasoning_content`."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the backbone; by default bfloat16 on CUDA, and the stored precision elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: eager, sdpa, flash_attention_2, ..; by default the
    model's own."""
    compile: Literal["none", "default", "cuda-graphs"] = "none"
    """Compile the tapped blocks, the bridge and the sampler with torch.compile.
    `default` needs a C++ compiler on the CPU and triton on a GPU; `cuda-graphs` needs a GPU."""
    actions_only: bool = False
    """Serve actions without chat.
    The part of the backbone that only answers questions is then not loaded."""
    playground: bool = False
    """Also serve a web page on which the model controls simulated robots and answers questions."""
    beside: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Another server to compare with on that page, as NAME=ws://HOST:PORT.
    Repeat the flag for each server."""
    groot_port: int | None = None
    """TCP port for Isaac-GR00T clients, whose default is 5555; by default, none."""

    def run(self, command_line: Sequence[str]) -> None:
        access = _check_access(self)
        _check_addresses(self)
        with exit_on_interrupt("interrupted before the server started"):
            source, policy, generator = _load(self)
            app = _build(self, policy, generator, access)
            sockets = addresses.listen(self.host, self.port)
        from blm.serving.app import serve

        port = sockets[0].getsockname()[1]
        _print_addresses(self, source, port)
        serve(app, self.host, port, sockets)


def _load(chosen: Serve) -> tuple[Source, Policy | None, TokenGenerator | None]:
    """Find and load the model. For an exported policy, torch is not imported."""
    from blm.app.exported import find_export, load_exported, require_no_torch_flags

    if (export := find_export(chosen.checkpoint)) is not None:
        settings = load_options(chosen)
        given = {name: value not in ("cpu", "none", None) for name, value in settings.items()}
        require_no_torch_flags(chosen.checkpoint, **given)
        _check_features(chosen, export)
        return export, load_exported(Path(chosen.checkpoint)), None
    from blm.app.model import check_device, find_model
    from blm.backbone.compilation import require_compiler

    check_device(chosen.device)
    require_compiler(chosen.compile, chosen.device)
    source = find_model(chosen.checkpoint)
    _check_features(chosen, source)
    _warn(source)
    model = source.load(**load_options(chosen), actions_only=chosen.actions_only)
    return source, model.policy, model.generator()


def load_options(chosen: Serve | AskModel) -> LoadOptions:
    """Return the form in which a model is loaded."""
    return {
        "device": chosen.device,
        "dtype": chosen.dtype,
        "attn_implementation": chosen.attn_implementation,
        "compile": chosen.compile if isinstance(chosen, Serve) else "none",
    }


def _warn(source: Source) -> None:
    if source.warning:
        complaints.print(f"[yellow]note:[/yellow] {source.warning}", highlight=False, soft_wrap=True)


def _print_addresses(chosen: Serve, source: Source, port: int) -> None:
    """Print the addresses; programs parse the first line, the address of chat and actions."""
    web = addresses.to_url("http", chosen.host, port)
    socket = addresses.to_url("ws", chosen.host, port)
    chats = source.has_chat and not chosen.actions_only
    spaces = [f"chat on {web}/v1"] * chats + [f"actions on {socket}/"] * source.has_policy
    console.print(", ".join(spaces), highlight=False, soft_wrap=True)
    if chosen.playground:
        console.print(f"playground on {web}/playground", highlight=False, soft_wrap=True)
    if chosen.groot_port is not None:
        address = addresses.to_url("tcp", chosen.host, chosen.groot_port)
        console.print(f"GR00T clients on {address}", highlight=False, soft_wrap=True)


def _check_access(chosen: Serve) -> AccessControl:
    """Return the access rules. Raises BlmError for a network address without an API key."""
    from blm.serving.access.keys import AccessControl, HostPolicy, read_keys

    keys, warnings = read_keys(chosen.api_key, chosen.api_key_file, os.environ)
    for warning in warnings:
        complaints.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
    if not keys and not chosen.allow_unauthenticated and addresses.reaches_network(chosen.host):
        raise BlmError(
            f"--host {chosen.host} lets other machines drive the robots, and no API key is set; "
            "set BLM_API_KEY or --api-key-file FILE, or --allow-unauthenticated if everyone there may do so"
        )
    own_name = [] if addresses.read_ip(chosen.host.strip("[]")) else [chosen.host]
    return AccessControl(keys, HostPolicy.read([*chosen.allowed_host, *own_name], chosen.allowed_origin))


def _check_addresses(chosen: Serve) -> None:
    """Raise BlmError for an address that is taken or invalid, before the weights are loaded."""
    addresses.check_free(chosen.host, chosen.port)
    if chosen.groot_port is None:
        return
    if chosen.groot_port in (0, chosen.port):
        raise BlmError(f"--groot-port {chosen.groot_port}: give a port other than 0 and that of --port")
    addresses.check_free(chosen.host, chosen.groot_port, "--groot-port")


def _check_features(chosen: Serve, source: Source) -> None:
    if chosen.compile != "none" and source.kind != "blm":
        raise BlmError(f"--compile needs a checkpoint of Stage II, and '{chosen.checkpoint}' is none")
    if chosen.actions_only and not source.has_policy:
        raise BlmError(f"--actions-only needs a policy, and '{chosen.checkpoint}' has chat only (Stage I)")
    if chosen.groot_port is not None and not source.has_policy:
        raise BlmError(f"--groot-port needs a policy, and '{chosen.checkpoint}' has chat only (Stage I)")
    if chosen.playground:
        from blm.serving.playground import read_beside

        read_beside(chosen.beside)


def _build(
    chosen: Serve, policy: Policy | None, generator: TokenGenerator | None, access: AccessControl
) -> FastAPI:
    from blm.serving.app import create_app
    from blm.serving.scheduler import SchedulerLimits

    # on a CPU, batches of more than 4 observations take proportionally longer: they save nothing,
    # and keep other requests waiting
    limits = SchedulerLimits(max_action_batch=8) if chosen.device == "cpu" else SchedulerLimits()
    app = create_app(
        policy,
        generator,
        name=chosen.name,
        access=access,
        scheduler_limits=limits,
        reasoning=chosen.reasoning,
    )
    if chosen.playground:
        from blm.serving.playground import add_playground, read_beside

        contract = policy.contract if policy is not None else None
        add_playground(app, contract, name=chosen.name, beside=read_beside(chosen.beside))
    if chosen.groot_port is not None:
        from blm.serving.protocols.groot.server import add_groot

        assert policy is not None
        add_groot(app, policy, host=chosen.host, port=chosen.groot_port)
    return app


@dataclass(frozen=True, kw_only=True)
class AskModel(CliCommand):
    """Ask a model a question, with or without images.

    Example: blm chat blm-nano --image base.png --image side.png --question "Where is the red cube?"
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Checkpoint folder of Stage I or II, the name of a release or backbone, or a hub id."""
    question: str | None = None
    """Question to ask.
    By default, each line of the standard input is a question of one conversation."""
    image: Annotated[list[Path] | None, tyro.conf.UseAppendAction] = None
    """Image file. Repeat the flag for each camera, in the checkpoint's camera order."""
    max_tokens: int = 128
    """Maximum length of an answer [tokens]."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the backbone; by default bfloat16 on CUDA, and the stored precision elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: eager, sdpa, flash_attention_2, ..; by default the
    model's own."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.model import check_device, find_model
        from blm.backbone.prompt import question_prompt
        from blm.media import read_pixels

        check_device(self.device)
        source = find_model(self.checkpoint)
        if not source.has_chat:
            raise BlmError(f"'{self.checkpoint}' is a Diffusion Policy: it controls robots and cannot chat")
        pictures = [read_pixels(path) for path in self.image or ()]
        _warn(source)
        backbone = source.load(**load_options(self)).chat
        assert backbone is not None
        messages = list[Message]()
        for question in _read_questions() if self.question is None else (self.question,):
            if messages:
                messages.append(Message("user", (question,)))
            else:
                messages += question_prompt(question, pictures)
            answer = backbone.answer(messages, max_tokens=self.max_tokens)
            print(answer, flush=True)
            messages.append(Message("assistant", (answer,)))


def _read_questions() -> Iterator[str]:
    """Yield the lines of the standard input; at a terminal, show a prompt for each until Ctrl-D."""
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()

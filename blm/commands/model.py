"""Commands of one model: serving it, asking it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from blm.types import BlmError, Message

console = Console()


@dataclass(frozen=True)
class Serve:
    """Serve chat (OpenAI protocol) and actions (OpenPI websocket) from one checkpoint on one port."""

    checkpoint: tyro.conf.Positional[str]
    """Folder that Stage II wrote, or the name of a release."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network, set an API key then."""
    port: int = 8000
    """TCP port."""
    name: str = "BLM"
    """Model name that chat clients ask for."""
    api_key: str | None = None
    """If given, clients must send it."""
    reasoning: Literal["inline", "separate"] = "inline"
    """Where thoughts go: into the answer's text, or apart as `reasoning_content`."""
    device: str = "cpu"
    """Torch device."""
    playground: bool = False
    """Also serve a page on which the model drives simulated robots and answers questions."""
    beside: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """NAME=ws://HOST:PORT of a server to compare with on that page; give it once per server."""
    groot_port: int | None = None
    """TCP port for clients of Isaac-GR00T, theirs is 5555; needs the extra `groot`."""


def serve(command: str, arguments: list[str]) -> None:
    """`blm serve CHECKPOINT`: one process, both spaces."""
    chosen = tyro.cli(Serve, args=arguments, prog=f"blm {command}")
    from blm.hub import BLM
    from blm.serving.app import create_app
    from blm.serving.app import serve as run_server
    from blm.serving.engine import Room

    host, port, key = chosen.host, chosen.port, chosen.api_key
    model = BLM.from_pretrained(chosen.checkpoint, device=chosen.device)
    console.print(f"chat on http://{host}:{port}/v1, actions on ws://{host}:{port}/")
    # from 4 observations on, a processor takes as long for each; longer passes only keep the others waiting
    room = Room(actions_together=8) if chosen.device == "cpu" else Room()
    app = create_app(
        model, model.speaker(), name=chosen.name, api_key=key, room=room, reasoning=chosen.reasoning
    )
    if chosen.playground:
        from blm.serving.playground import PATH, add_playground, read_beside

        beside = read_beside(chosen.beside)
        add_playground(app, model.contract, name=chosen.name, api_key=key, beside=beside)
        console.print(f"playground on http://{host}:{port}{PATH}")
    if chosen.groot_port is not None:
        try:
            from blm.serving.groot import add_groot
        except ImportError as error:
            raise BlmError("pyzmq is not installed; run: pip install 'blm[groot]'") from error

        add_groot(app, model, host=host, port=chosen.groot_port, api_key=key)
        console.print(f"GR00T clients on tcp://{host}:{chosen.groot_port}")
    run_server(app, host, port)


def chat(command: str, arguments: list[str]) -> None:
    """`blm chat CHECKPOINT --image .. --question ..`."""

    def run(
        checkpoint: tyro.conf.Positional[Path],
        question: str,
        image: Annotated[list[Path], tyro.conf.UseAppendAction],
        max_tokens: int = 128,
    ) -> None:
        """Ask a checkpoint one question about pictures.

        Args:
            checkpoint: Folder that Stage II wrote.
            question: What to ask.
            image: Picture file; give the flag once per camera, in the checkpoint's camera order.
            max_tokens: Longest answer.
        """
        from blm.backbone.prompt import question_prompt
        from blm.hub import BLM
        from blm.media import read_pixels

        messages: tuple[Message, ...] = question_prompt(question, [read_pixels(path) for path in image])
        print(BLM.from_pretrained(checkpoint).answer(messages, max_tokens=max_tokens))

    tyro.cli(run, args=arguments, prog=f"blm {command}")

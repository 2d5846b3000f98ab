"""Commands of exports: what goes to vLLM, to LeRobot, to others."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console

console = Console()


def vllm(command: str, arguments: list[str]) -> None:
    """`blm export vllm SOURCE OUT`: a stock folder, and the command that serves it."""

    def run(
        source: tyro.conf.Positional[str],
        out: tyro.conf.Positional[Path],
        images: int = 8,
        context: int = 8192,
        push: str | None = None,
        private: bool = False,
    ) -> None:
        """Write the backbone of a checkpoint as a stock transformers folder that vLLM serves.

        Args:
            source: Checkpoint of Stage II, a backbone's folder, or a name of BACKBONES.
            out: Folder to make.
            images: Most pictures of a request.
            context: Most tokens of a request and its answer.
            push: ORG/NAME on the hub to upload it to.
            private: Make that repository private.
        """
        from blm.app.export import export_vllm

        serve = export_vllm(source, out, images=images, context=context)
        console.print(f"plain transformers gives the same logits from {out}", soft_wrap=True)
        console.print(serve, soft_wrap=True, highlight=False, markup=False)
        _push(out, push, private)

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def copied(command: str, arguments: list[str]) -> None:
    """`blm export lerobot SOURCE OUT` and `blm export checkpoint SOURCE OUT`: checked copies with cards."""

    def run(
        source: tyro.conf.Positional[str],
        out: tyro.conf.Positional[Path],
        push: str | None = None,
        private: bool = False,
    ) -> None:
        """Copy a data set or a checkpoint, checked, with its card; upload it if asked to.

        Args:
            source: Folder of one robot's data set, or of a checkpoint.
            out: Folder to make.
            push: ORG/NAME on the hub to upload it to.
            private: Make that repository private.
        """
        from blm.app.export import export_checkpoint, export_dataset

        if command == "export lerobot":
            export_dataset(Path(source), out)
        else:
            export_checkpoint(source, out)
        console.print(f"exported: {out}", soft_wrap=True)
        _push(out, push, private)

    tyro.cli(run, args=arguments, prog=f"blm {command}")


def _push(folder: Path, repo: str | None, private: bool) -> None:
    if repo is not None:
        from blm.app.export import push_to_hub

        console.print(f"uploaded: {push_to_hub(folder, repo, private=private)}", soft_wrap=True)

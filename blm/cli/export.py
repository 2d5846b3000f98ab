"""Commands that export backbones for vLLM, datasets for LeRobot, checkpoints, and graphs for robots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from rich.console import Console

from blm.cli.command import CliCommand, OutFolder
from blm.edge.folder import Runtime

console = Console()


@dataclass(frozen=True, kw_only=True)
class ExportCommand(CliCommand):
    """Base of the commands that write a folder, and upload it if the user names a repository."""

    push: str | None = None
    """Repository ORG/NAME on the Hugging Face hub to upload the folder to."""
    private: bool = False
    """Make that repository private."""

    def upload(self, folder: Path) -> None:
        """Upload the folder, if the user named a repository."""
        if self.push is not None:
            from blm.app.export import push_to_hub

            url = push_to_hub(folder, self.push, private=self.private)
            console.print(f"uploaded: {url}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class ExportVllm(ExportCommand):
    """Export the backbone of a checkpoint as a stock transformers folder that vLLM serves.

    Verifies that plain transformers computes the same logits, and prints the `vllm serve` command.

    Example: blm export vllm runs/qwen/stage2/checkpoint qwen-backbone
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint of Stage II, folder of a backbone, or name of a backbone."""
    out: OutFolder
    """Folder to write; it must not exist."""
    images: int = 8
    """Maximum number of images in a request."""
    context: int = 8192
    """Maximum length of a request and its answer together [tokens]."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.export import export_vllm

        serve = export_vllm(self.source, self.out, images=self.images, context=self.context)
        console.print(f"plain transformers computes the same logits from {self.out}", soft_wrap=True)
        console.print(serve, soft_wrap=True, highlight=False, markup=False)
        self.upload(self.out)


@dataclass(frozen=True, kw_only=True)
class ExportCompact(ExportCommand):
    """Export the backbone of a Stage I with LoRA as changes to its base model, a tenth of its size.

    Loading it needs the base model, and writes the whole backbone to the user's cache folder once.

    Example: blm export compact runs/smol/stage1 smol-backbone
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run of Stage I, with `backbone` and `adapter`."""
    out: OutFolder
    """Folder to write."""
    base: str = "smol"
    """Backbone from which the first run started: a name, or an id of the Hugging Face hub."""
    earlier: tuple[Path, ...] = ()
    """Folders of the earlier runs, if this run started from the backbone of another one."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the changes."""

    def run(self, command_line: Sequence[str]) -> None:
        import torch

        from blm.app.compact import export_compact

        report = export_compact(
            self.source, self.out, base=self.base, earlier=self.earlier, dtype=getattr(torch, self.dtype)
        )
        console.print(
            f"exported: {self.out} ({report.size / 1e6:.1f} MB); its logits differ from those of the run by "
            f"at most {report.difference:.2g} (largest logit {report.largest:.2g})",
            soft_wrap=True,
        )
        self.upload(self.out)


@dataclass(frozen=True, kw_only=True)
class ExportDataset(ExportCommand):
    """Copy a dataset and add a dataset card, for LeRobot and model hubs. The files are checked first.

    Example: blm export lerobot runs/demo/episodes/panda panda-dataset
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """Folder of one robot's dataset."""
    out: OutFolder
    """Folder to write; it must not exist."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.export import export_dataset

        export_dataset(self.source, self.out)
        console.print(f"exported: {self.out}", soft_wrap=True)
        self.upload(self.out)


@dataclass(frozen=True, kw_only=True)
class ExportCheckpoint(ExportCommand):
    """Copy a checkpoint and add a model card. The files are checked first.

    Example: blm export checkpoint runs/demo/stage2/checkpoint my-policy
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a checkpoint, or name of a release."""
    out: OutFolder
    """Folder to write; it must not exist."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.export import export_checkpoint

        export_checkpoint(self.source, self.out)
        console.print(f"exported: {self.out}", soft_wrap=True)
        self.upload(self.out)


@dataclass(frozen=True, kw_only=True)
class ExportGraphs(ExportCommand):
    """Base of the exports that run without torch."""

    runtime: ClassVar[Runtime]

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """Folder of a checkpoint of Stage II, or name of a release."""
    out: OutFolder
    """Folder to write; it must not exist."""
    batch: int | None = None
    """Fixed number of observations in each run; by default any number.
    OpenVINO is about a fifth faster with fixed numbers of observations and tokens."""
    length: int | None = None
    """Fixed number of tokens of a prompt; by default any number."""
    sampler_steps: int | None = None
    """Number of denoising steps; by default that of the checkpoint.
    Fewer are faster, but choose other actions: see docs/edge.md for what was measured."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.app.edge.export import ExportConfig, export_policy

        config = ExportConfig(
            runtime=self.runtime, batch=self.batch, length=self.length, sampler_steps=self.sampler_steps
        )
        report = export_policy(self.source, self.out, config)
        console.print(
            f"exported: {self.out} ({report.size / 1e6:.1f} MB); on {report.observations} observations its "
            f"actions differ from those of torch by at most {report.difference:.1g} rad",
            soft_wrap=True,
        )
        console.print(f"run it without torch: blm serve {self.out}", soft_wrap=True, highlight=False)
        self.upload(self.out)


@dataclass(frozen=True, kw_only=True)
class ExportOnnx(ExportGraphs):
    """Export a policy as ONNX graphs, which a robot's computer runs with onnxruntime, without torch.

    Verifies that the graphs choose the actions of torch.

    Example: blm export onnx blm-nano nano-onnx
    """

    runtime: ClassVar[Runtime] = "onnx"


@dataclass(frozen=True, kw_only=True)
class ExportOpenVino(ExportGraphs):
    """Export a policy as OpenVINO graphs, which run without torch.

    Verifies that the graphs choose the actions of torch.

    Example: blm export openvino blm-nano nano-openvino
    """

    runtime: ClassVar[Runtime] = "openvino"

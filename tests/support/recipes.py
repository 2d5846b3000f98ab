"""The recipes at a tiny size: flags, backbones, corpora, probes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blm.backbone import Backbone
from blm.cli import main
from blm.corpora import Conversation, write_corpus
from blm.training.sft.retention import held_out_texts
from blm.types import Image, Message
from tests.support.backbones import picture, tiny_qwen
from tests.support.smol import tiny_smol

DATA = (
    *("--robots", "panda"),
    *("--tasks", "push_cube"),
    *("--cameras", "base", "wrist"),
    *("--image-size", "64"),
    *("--workers", "0"),
    *("--demonstrations.episodes", "2"),
    *("--demonstrations.held-out-episodes", "1"),
    *("--corpus.scenes", "6"),
    *("--corpus.held-out-scenes", "2"),
    *("--corpus.turns", "3"),
    *("--corpus.frames-per-episode", "2"),
)
TRAINING = (
    *("--stage1.schooling.eye.steps", "2"),
    *("--stage1.schooling.drill.steps", "2"),
    *("--stage1.training.loop.steps", "2"),
    *("--stage1.training.loop.batch-size", "4"),
    *("--stage1.mixture.replay-rows", "20"),
    *("--stage1.mixture.replay-tokens", "64"),
    *("--stage2.loop.steps", "2"),
    *("--stage2.loop.batch-size", "4"),
    *("--stage2.layer", "2"),
    *("--stage2.policy.width", "32"),
    *("--stage2.policy.heads", "2"),
    *("--stage2.policy.blocks", "2"),
    *("--stage2.policy.future-layer", "1"),
    *("--stage2.policy.bridge.width", "32"),
    *("--stage2.policy.bridge.heads", "2"),
    *("--stage2.policy.bridge.latents", "4"),
    *("--evaluation.episodes", "1"),
    *("--evaluation.max-steps", "8"),
    *("--evaluation.max-questions", "6"),
)
TINY: dict[str, Callable[[], Backbone]] = {
    "smol": tiny_smol,
    "qwen2_5_vl_3b": lambda: tiny_qwen("2.5"),
    "qwen2_5_vl_7b": lambda: tiny_qwen("2.5"),
}
"""Recipe -> its tiny backbone; those of the other recipes are small themselves."""


def shrink(replace: Callable[[str, object], None], *, cut: bool) -> None:
    """Shorten the probes of retention by `replace(name, value)`, and with `cut` the replay."""
    replace("blm.evaluation.digital.instructions.MAX_TOKENS", 8)
    if not cut:
        return
    complete = Backbone.complete

    def first_tokens(
        self: Backbone, asked: Any, *, max_tokens: int, seed: int | None = None
    ) -> list[tuple[str, bool]]:
        if seed is None:
            return complete(self, asked, max_tokens=max_tokens)
        answers = complete(self, asked, max_tokens=min(max_tokens, 3), seed=seed)
        return [(text or "yes", True) for text, _ in answers]

    replace("blm.backbone.Backbone.complete", first_tokens)
    texts = held_out_texts()[:16]
    replace("blm.training.sft.retention.held_out_texts", lambda: texts)


def write_public(folder: Path, rows: int) -> None:
    """A corpus of pictures with one question each, in groups of two."""
    write_corpus(
        folder,
        (
            Conversation(
                id=f"{folder.name}/{number}",
                group=f"{folder.name}/{number // 2}",
                source=folder.name,
                kinds=("planning",),
                messages=(
                    Message("user", (Image(picture(number, 64, 64)), f"What comes after step {number}?")),
                    Message("assistant", (f"Step {number + 1} comes next.",)),
                ),
            )
            for number in range(rows)
        ),
    )


def collect_and_ask(run: Path, answers: str) -> Path:
    """Return a run folder with demonstrations and scene questions, whose answers have this form."""
    flags = ["--recipe", "ci", "--run", str(run), *DATA, *TRAINING, "--corpus.answers", answers]
    main(["collect", *flags])
    main(["corpus", "build", *flags])
    return run


def prepare(recipe: str, folder: Path) -> None:
    """Write the tiny backbone of a recipe and, of its public corpora, "general"."""
    if recipe in TINY:
        TINY[recipe]().save(folder / "tiny")
        write_public(folder / "corpora/general", 40)


def flags_of(recipe: str, folder: Path, run: str = "run") -> list[str]:
    """The flags that shrink a recipe and name what `prepare` wrote in `folder`."""
    flags = ["--recipe", recipe, "--run", str(folder / run), *DATA, *TRAINING]
    if recipe in TINY:
        flags += ["--stage1.backbone", str(folder / "tiny")]
        flags += ["--stage1.mixture.corpora-folder", str(folder / "corpora")]
    return flags

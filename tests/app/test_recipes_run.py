"""Every recipe's own settings, on tiny models of its backbone's real class, through the command line.

Flags only shrink: numbers of episodes, scenes and steps, and the sizes of the policy. What the
recipes say about Stage I (what is trained, packing, cached features, LoRA, activation
checkpointing) and about Stage II stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blm.app.pipeline import read_ledger
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES
from blm.backbone import Backbone
from blm.cli import main
from blm.policy.policy import CheckpointPolicy
from tests.support.backbones import tiny_qwen
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with demonstrations and questions, which are the same for every recipe."""
    folder = tmp_path_factory.mktemp("data") / "run"
    for stage in ("collect", "corpus build"):
        main([*stage.split(), "--recipe", "ci", "--run", str(folder), *DATA, *TRAINING])
    return folder


def flags_of(recipe: str, folder: Path) -> list[str]:
    """The flags that shrink a recipe."""
    flags = ["--recipe", recipe, "--run", str(folder / "run"), *DATA, *TRAINING]
    if recipe in TINY:
        TINY[recipe]().save(folder / "tiny")
        flags += ["--stage1.backbone", str(folder / "tiny")]
    return flags


@pytest.mark.parametrize("recipe", RECIPES)
def test_stage_one_and_stage_two_of_every_recipe_run_as_written(
    recipe: str, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "run")
    flags = flags_of(recipe, tmp_path)
    main(["train", "stage1", *flags])
    main(["train", "stage2", *flags])
    assert CheckpointPolicy.load(tmp_path / "run/stage2/checkpoint").contract.cameras == ("base", "wrist")
    own = RECIPES[recipe]().stage1.training
    assert (tmp_path / "run/stage1/adapter").exists() == bool(own.lora.rank)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_whole_loop_of_every_recipe_runs_to_its_report(recipe: str, tmp_path: Path) -> None:
    main(["demo", *flags_of(recipe, tmp_path)])
    assert all(record.done for record in read_ledger(tmp_path / "run").values())
    assert read_ledger(tmp_path / "run").keys() == STAGES.keys()
    assert "not run" not in (tmp_path / "run/report.html").read_text()

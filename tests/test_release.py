"""What ships with the package: it is what its card says, and it answers about scenes it never saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from blm.backbone import Backbone
from blm.backbone.backbone import RELEASED
from blm.corpora import SceneCorpusConfig, build_scene_corpus, read_questions
from blm.evaluation import STAGE1_HELD_OUT_SEEDS, evaluate_digital
from blm.evaluation.digital.runner import Asking
from blm.robots import ROBOTS
from blm.tasks import TASKS

NANO = RELEASED / "blm-nano"


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.load("blm-nano")


def test_the_card_names_the_weights(nano: Backbone) -> None:
    assert f"`{nano.fingerprint()}`" in (NANO / "README.md").read_text()
    assert not [file for file in NANO.rglob("*") if file.suffix in {".bin", ".pt", ".pkl", ".py"}]
    assert sum(file.stat().st_size for file in NANO.rglob("*") if file.is_file()) < 40e6


def test_it_answers_about_new_scenes_of_every_robot_and_task(nano: Backbone, tmp_path: Path) -> None:
    """Random scenes beyond those of the published number, asked about in wordings that were trained on."""
    config = SceneCorpusConfig(
        robots=tuple(ROBOTS),
        tasks=tuple(TASKS),
        cameras=("base", "side", "wrist"),
        image_size=112,
        scenes=24,
        first_seed=STAGE1_HELD_OUT_SEEDS.start + 400_000,
        turns=6,
        pointing=0.15,
        metric=0.1,
        teach=False,
    )
    build_scene_corpus(config, tmp_path / "corpus", workers=0)
    questions = read_questions(tmp_path / "corpus")
    result = evaluate_digital(
        nano, questions, tmp_path / "result", model="blm-nano", asking=Asking(root=tmp_path / "corpus")
    )
    assert result["overall"]["n"] == len(questions) >= 100
    assert result["overall"]["rate"] > 0.75

"""What ships with the package is what its card says; it answers and drives in scenes that it never saw."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blm.backbone import Backbone
from blm.backbone.backbone import RELEASED
from blm.corpora import SceneCorpusConfig, build_scene_corpus, read_questions
from blm.evaluation import STAGE1_HELD_OUT_SEEDS, PhysicalProtocol, evaluate_digital, evaluate_physical
from blm.evaluation.conditions import Condition
from blm.evaluation.digital.runner import DigitalEvalConfig
from blm.policy.checkpoint import checkpoint_folder
from blm.policy.policy import CheckpointPolicy
from blm.robots import ROBOTS
from blm.tasks import SUITE24

NANO = RELEASED / "blm-nano"


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.load("blm-nano")


def test_the_card_names_the_weights(nano: Backbone) -> None:
    assert f"`{nano.fingerprint()}`" in (NANO / "README.md").read_text()
    assert not [file for file in NANO.rglob("*") if file.suffix in {".bin", ".pt", ".pkl", ".py"}]
    assert sum(file.stat().st_size for file in NANO.rglob("*") if file.is_file()) < 40e6


@pytest.fixture(scope="module")
def policy() -> CheckpointPolicy:
    return CheckpointPolicy.load("blm-nano")


def test_the_policy_was_trained_on_the_released_backbone(nano: Backbone, policy: CheckpointPolicy) -> None:
    assert policy.frozen.weights == nano.fingerprint() == policy.backbone.fingerprint()
    assert list(policy.contract.action_spaces) == list(ROBOTS)
    for robot, space in policy.contract.action_spaces.items():
        space.require_same(ROBOTS[robot].action_space, "the suite")


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_it_loads_on_a_processor_with_other_instructions(capability: str, nano: Backbone) -> None:
    """Rotary frequencies, and so logits, then differ in their last bits; the weights do not."""
    program = (
        "import torch; from blm.policy.policy import CheckpointPolicy; "
        "policy = CheckpointPolicy.load('blm-nano'); "
        "print(policy.backbone.fingerprint(), policy.contract.revision); "
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fingerprint, revision, found = done.stdout.split()
    assert found == capability.upper()
    assert fingerprint == nano.fingerprint()
    assert revision == CheckpointPolicy.load("blm-nano").contract.revision


def test_a_local_checkpoint_takes_precedence_over_a_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blm-nano").mkdir()
    assert checkpoint_folder("blm-nano") == NANO
    (tmp_path / "blm-nano/manifest.json").touch()
    assert checkpoint_folder("blm-nano") == Path("blm-nano") and checkpoint_folder("other") == Path("other")


def test_a_name_with_a_number_is_the_same_model(nano: Backbone, policy: CheckpointPolicy) -> None:
    assert checkpoint_folder("blm-nano-1") == NANO
    assert Backbone.load("blm-nano-1").fingerprint() == nano.fingerprint()
    assert CheckpointPolicy.load("blm-nano-1").contract.revision == policy.contract.revision


def test_nano_2_is_the_policy_of_its_card_and_pushes_in_the_dark(tmp_path: Path) -> None:
    """Where `blm-nano`, which saw plain scenes only, solves nothing (docs/LOG.md)."""
    policy = CheckpointPolicy.load("blm-nano-2")
    assert policy.frozen.weights == Backbone.load("blm-nano-2").fingerprint()
    assert f"`{policy.frozen.weights}`" in (RELEASED / "blm-nano-2/README.md").read_text()
    assert policy.contract.training == "randomized" and policy.tap.prompt == "query_last"
    protocol = PhysicalProtocol.for_validation(policy.contract, tasks=["push_cube"], episodes=2)
    dark = replace(protocol, conditions=(Condition(axis="light", level=4),))
    result = evaluate_physical(lambda: policy, dark, tmp_path, workers=0, videos_per_cell=0)
    assert result.summary.overall.success_once.hits >= 4


def test_it_pushes_on_every_robot(policy: CheckpointPolicy, tmp_path: Path) -> None:
    """On seeds for validation; suite24 keeps its own."""
    protocol = PhysicalProtocol.for_validation(policy.contract, tasks=["push_cube"], episodes=2)
    result = evaluate_physical(lambda: policy, protocol, tmp_path, workers=0, videos_per_cell=0)
    assert result.summary.overall.success_once.hits >= 4


def test_it_answers_about_new_scenes_of_every_robot_and_task(nano: Backbone, tmp_path: Path) -> None:
    """Random scenes beyond those of the published number, asked about in wordings that were trained on."""
    config = SceneCorpusConfig(
        robots=tuple(ROBOTS),
        tasks=SUITE24,
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
        nano,
        questions,
        tmp_path / "result",
        model="blm-nano",
        config=DigitalEvalConfig(root=tmp_path / "corpus"),
    )
    assert result.summary.overall.n == len(questions) >= 100
    assert result.summary.overall.rate > 0.75

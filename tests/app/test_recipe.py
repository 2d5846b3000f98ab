"""A recipe's settings reach the configs of its parts, and no field of either side is forgotten."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from blm.app.pipeline import NOT_IN_KEYS, json_of, settings_of, stage_key, to_json
from blm.app.recipe import (
    CorpusSettings,
    DemonstrationSettings,
    EvaluationSettings,
    MixtureSettings,
    Recipe,
    Stage2Settings,
    collect_config,
    corpus_config,
    physical_protocol,
    policy_training_config,
)
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES
from blm.corpora import SceneCorpusConfig
from blm.planner import CollectConfig
from blm.robots import ROBOTS
from blm.seeds import STAGE1_HELD_OUT_SEEDS, TRAINING_SEEDS
from blm.tasks.randomization import DomainRandomization
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.types import BlmError, PolicyContract

CI = RECIPES["ci"]()


@dataclass(frozen=True)
class Conversion:
    """How the fields of a config are filled."""

    settings: type
    config: type
    computed: frozenset[str]
    """Fields of the config that follow from seeds, folders or the function's arguments."""
    defaults: frozenset[str]
    """Fields of the config that keep their default in every recipe."""
    not_in_config: frozenset[str]
    """Fields of the settings that the config does not have by this name."""


CONVERSIONS = {
    "collect": Conversion(
        DemonstrationSettings,
        CollectConfig,
        computed=frozenset({"first_seed"}),
        defaults=frozenset({"simulator", "take_over", "actions"}),
        not_in_config=frozenset({"held_out_episodes"}),
    ),
    "corpus": Conversion(
        CorpusSettings,
        SceneCorpusConfig,
        computed=frozenset({"first_seed", "wording", "teach", "episodes"}),
        defaults=frozenset({"pointing", "metric", "choice", "frame_turns"}),
        not_in_config=frozenset({"held_out_scenes"}),
    ),
    "policy": Conversion(
        Stage2Settings,
        PolicyTrainingConfig,
        computed=frozenset({"datasets", "backbone", "intents", "cache", "weights"}),
        defaults=frozenset({"start", "only_new", "new_backbone", "held_out"})
        | {"validation_batches", "mappings"},
        not_in_config=frozenset({"layer", "stride", "frames", "precision", "dims", "pool", "views", "drive"}),
    ),
    "hidden states": Conversion(
        Stage2Settings,
        HiddenStateConfig,
        computed=frozenset({"frame_steps"}),
        defaults=frozenset({"batch_size", "shard_frames"}),
        not_in_config=frozenset({"loop", "policy", "execute", "drive", "tune", "cotrain"}),
    ),
}


def names(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind))


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_field_of_settings_and_config_is_accounted_for(name: str) -> None:
    """A field that is added to one side only fails here; then state where its value comes from."""
    made = CONVERSIONS[name]
    settings, config = names(made.settings), names(made.config)
    shared = config & (settings | names(Recipe))
    assert shared - made.computed | made.computed | made.defaults == config
    assert not made.defaults & shared
    assert settings - config == made.not_in_config


def test_demonstrations_reach_the_config_of_the_collection() -> None:
    recipe = replace(
        CI,
        robots=("panda",),
        workers=1,
        demonstrations=DemonstrationSettings(
            episodes=7, held_out_episodes=3, noise=(0.5,), disturbed=0.1, random_starts=0.2, hold=12
        ),
    )
    training, held_out = (collect_config(recipe, held_out=flag) for flag in (False, True))
    assert (training.episodes, training.first_seed) == (7, TRAINING_SEEDS.start + 500_000)
    assert (held_out.episodes, held_out.first_seed) == (3, STAGE1_HELD_OUT_SEEDS.start + 500_000)
    assert (training.robots, training.workers, training.noise, training.hold) == (("panda",), 1, (0.5,), 12)
    assert replace(held_out, episodes=7, first_seed=training.first_seed) == training


def test_scene_questions_reach_the_config_of_each_corpus(tmp_path: Path) -> None:
    train = corpus_config(CI, tmp_path, "train")
    seen, other = (corpus_config(CI, tmp_path, name) for name in ("held_out", "held_out_wording"))
    assert (train.scenes, train.first_seed, train.teach) == (40, TRAINING_SEEDS.start, True)
    assert (seen.scenes, seen.first_seed, seen.teach) == (8, STAGE1_HELD_OUT_SEEDS.start, False)
    assert train.episodes == tmp_path / "episodes" and seen.episodes == tmp_path / "episodes_held_out"
    assert (train.wording, seen.wording, other.wording) == ("seen", "seen", "held_out")
    assert replace(other, wording="seen") == seen and seen.turns == CI.corpus.turns
    assert train.prompt == seen.prompt == "pictures_first"
    assert corpus_config(replace(CI, prompt="text_first"), tmp_path, "train").prompt == "text_first"


def test_stage_two_reaches_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dataset:
        tasks = ("pick_cube", "push_cube")

    monkeypatch.setattr("blm.app.recipe.open_dataset", lambda folder: Dataset())
    stage2 = replace(CI.stage2, layer=2, stride=4, execute=3, precision="compact", dims=64, pool=2, views=2)
    recipe = replace(
        CI, workers=5, device="cuda:3", dtype="float32", attn_implementation="eager", stage2=stage2
    )
    one = (("panda",), ("push_cube",))
    config = policy_training_config(recipe, tmp_path, tmp_path / "backbone", tmp_path / "cache", one)
    assert config.datasets == (tmp_path / "episodes/panda",)
    assert (config.backbone, config.cache) == (str(tmp_path / "backbone"), tmp_path / "cache")
    assert (config.loop, config.policy, config.execute) == (CI.stage2.loop, CI.stage2.policy, 3)
    assert (config.intents.layer, config.intents.stride, config.intents.workers) == (2, 4, 5)
    assert (config.intents.precision, config.intents.views) == ("compact", 2)
    assert (config.intents.dims, config.intents.pool) == (64, 2)
    assert (config.device, config.dtype, config.attn_implementation) == ("cuda:3", "float32", "eager")
    assert config.intents.cameras == CI.cameras and config.weights == {"pick_cube": 0.0}
    assert config.intents.prompt == "pictures_first"
    recipe = replace(recipe, prompt="text_first")
    config = policy_training_config(recipe, tmp_path, tmp_path / "backbone", tmp_path / "cache", one)
    assert config.intents.prompt == "text_first", "Stage I and Stage II agree"


def test_evaluation_settings_reach_the_protocol() -> None:
    contract = PolicyContract(
        action_spaces={"panda": ROBOTS["panda"].action_space},
        cameras=("base",),
        image_size=64,
        horizon=16,
        execute=8,
    )
    protocol = physical_protocol(CI, contract, (("panda",), ("push_cube",)))
    assert (protocol.robots, protocol.tasks) == (("panda",), ("push_cube",))
    assert (protocol.episodes, protocol.max_steps) == (CI.evaluation.episodes, CI.evaluation.max_steps)
    assert names(EvaluationSettings) == {"episodes", "max_steps", "max_questions"}  # the last: digital


@pytest.mark.parametrize("change", [{"noise": (2.0,)}, {"hold": 0}, {"episodes": 0}, {"distractors": -1}])
def test_limits_are_those_of_the_configs(change: dict[str, object]) -> None:
    with pytest.raises(BlmError, match=next(iter(change))):
        replace(CI, demonstrations=replace(CI.demonstrations, **change))


def test_keys_of_a_stored_recipe_stay() -> None:
    """Finished stages are compared by these keys: a new one would refuse every existing run folder."""
    stored = json.loads(json.dumps(to_json(CI)))
    assert set(stored) == {
        *("name", "robots", "tasks", "cameras", "image_size", "workers", "engine"),
        *("demonstrations", "corpus", "stage1", "stage2", "evaluation", "prompt"),
        *NOT_IN_KEYS,
    }
    assert all("prompt" not in settings_of(stage, CI) for stage in STAGES.values()), "by default"
    assert set(json_of(CI, "demonstrations")) == {
        *("episodes", "held_out_episodes", "noise", "disturbed", "random_starts", "hold", "distractors"),
        "appearance",
    }
    assert set(json_of(CI, "corpus")) == {
        *("scenes", "held_out_scenes", "turns", "max_distractors", "frames_per_episode"),
    }
    assert set(json_of(CI, "stage1")) == {"backbone", "schooling", "training"}
    assert set(json_of(CI, "stage2")) == {"loop", "policy", "layer", "stride", "execute", "drive"}
    assert set(stored["evaluation"]) == {"episodes", "max_steps", "max_questions"}


def test_only_a_changed_setting_changes_the_key_of_a_stage() -> None:
    stage = STAGES["stage2"]
    key = stage_key(STAGES, stage, CI, {})
    elsewhere = replace(CI, device="cuda", dtype="bfloat16", attn_implementation="eager")
    assert stage_key(STAGES, stage, elsewhere, {}) == key
    stage1, corpus = STAGES["stage1"], STAGES["corpus"]
    for change in ({"epochs": 0.5}, {"mixture": MixtureSettings(scenes=2.0)}):
        changed = replace(CI, stage1=replace(CI.stage1, **change))
        assert stage_key(STAGES, stage1, changed, {}) != stage_key(STAGES, stage1, CI, {})
    for part in ("demonstrations", "corpus"):
        varied = replace(getattr(CI, part), randomization=DomainRandomization(amplitude=0.5))
        assert json_of(replace(CI, **{part: varied}), part) != json_of(CI, part)
    spoken, free = (
        stage_key(STAGES, corpus, replace(CI, corpus=replace(CI.corpus, answers="sentence", free=share)), {})
        for share in (0.0, 0.2)
    )
    assert len({spoken, free, stage_key(STAGES, corpus, CI, {})}) == 3
    changed = replace(CI, corpus=replace(CI.corpus, answers="sentence"))
    assert stage_key(STAGES, corpus, changed, {}) != stage_key(STAGES, corpus, CI, {})
    other = replace(CI, prompt="text_first")
    for name, part in STAGES.items():
        affected = {"corpus", "stage1", "stage2", "digital", "physical"}
        assert (stage_key(STAGES, part, other, {}) != stage_key(STAGES, part, CI, {})) == (name in affected)
    for change in ({"precision": "compact"}, {"views": 1}, {"dims": 64}, {"pool": 2}):
        assert stage_key(STAGES, stage, replace(CI, stage2=replace(CI.stage2, **change)), {}) != key

"""Settings that a backbone cannot fulfil are refused before anything is collected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blm.app.pipeline import run_stages
from blm.app.recipe import Recipe
from blm.app.recipes import RECIPES
from blm.app.stages import STAGES
from blm.backbone import Backbone
from blm.training.sft.lora import Lora
from blm.training.sft.tokenize import TokenizationConfig
from blm.types import BlmError
from tests.support.backbones import tiny_qwen
from tests.support.families import REFUSED_FAMILIES, tiny_gemma3

TRAINING = RECIPES["qwen2_5_vl_3b"]().stage1.training


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_qwen("2.5").save(folder / "qwen")
    tiny_gemma3().save(folder / "gemma")
    (folder / "paligemma").mkdir()
    REFUSED_FAMILIES["PaliGemma"](folder / "paligemma")
    (folder / "empty").mkdir()
    return folder


def recipe(backbone: object, layer: int = 2, **training: Any) -> Recipe:
    base = RECIPES["qwen2_5_vl_3b"]()
    stage1 = replace(base.stage1, backbone=str(backbone), training=replace(TRAINING, **training))
    return replace(base, stage1=stage1, stage2=replace(base.stage2, layer=layer))


@pytest.mark.parametrize(
    ("backbone", "change", "complaint"),
    [
        ("qwen", {"layer": 24}, "stage2.layer is 24, but the backbone has 4 blocks"),
        (
            "qwen",
            {"vision_scale": 1.0, "cache_features": True},
            "cannot be cached, because 'visual.patch_embed.* vision_scale=0",
        ),
        ("qwen", {"lora": Lora(rank=2, targets=("q",))}, "lora.targets .'q'. are not linear layers"),
        ("gemma", {}, "Gemma3.* only full attention takes a mask.* pack_length=0"),
        ("gemma", {"pack_length": 0}, "limits.separate_turns=False"),
        ("paligemma", {}, "'paligemma' cannot be a backbone"),
        ("empty", {}, "empty' cannot be loaded: "),
        ("absent", {}, "unknown backbone"),
    ],
)
def test_a_refused_recipe_collects_nothing(
    folders: Path, tmp_path: Path, backbone: str, change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BlmError, match=complaint):
        run_stages(STAGES, list(STAGES), recipe(folders / backbone, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_only_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 32}')
    with pytest.raises(BlmError, match="'llama' cannot be a backbone: it has no vision tower"):
        Backbone.load(tmp_path)


def test_a_hub_id_is_tried_and_its_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BlmError, match=r"'no/model' is no folder.* hub it cannot be loaded: [^\n]+$"):
        Backbone.load("no/model")


@pytest.mark.parametrize("name", RECIPES)
def test_the_own_settings_of_a_recipe_pass(name: str, folders: Path) -> None:
    own = RECIPES[name]()
    if own.stage1.backbone.startswith("qwen"):
        own = recipe(folders / "qwen")
    elif name == "smol":
        pytest.skip("its parts are a package that need not be installed")
    for stage in ("stage1", "stage2"):
        check = STAGES[stage].check
        assert check is not None
        check(own, folders / "no run")


def test_gemma_passes_without_packing_and_with_turns_together(folders: Path) -> None:
    check = STAGES["stage1"].check
    assert check is not None
    limits = TokenizationConfig(separate_turns=False)
    check(recipe(folders / "gemma", pack_length=0, limits=limits), folders / "no run")

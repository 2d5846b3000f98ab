"""Only the tapped part of a backbone in memory: the same hidden states and the same hash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blm.app.model import BLM
from blm.backbone import Backbone
from blm.backbone.generation.generator import Generation
from blm.types import BlmError
from tests.support.backbones import PROMPTS, tiny_qwen
from tests.support.families import FAMILIES, TEXT

MAKERS = {**FAMILIES, "nano": lambda: Backbone.load("nano")}


@pytest.fixture(scope="module", params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("partial") / "backbone"
    MAKERS[request.param]().save(path)
    return path


def test_the_first_blocks_act_as_in_the_whole_model(folder: Path) -> None:
    whole = Backbone.load(folder)
    for layer in (1, whole.num_layers):
        part = Backbone.load(folder, blocks=layer)
        inputs = whole.read(PROMPTS, side="right")
        assert torch.equal(part.tap(inputs, layer).hidden, whole.tap(inputs, layer).hidden)
        assert part.num_layers == layer and part.fingerprint() == whole.fingerprint()
    loaded = sum(p.numel() for p in part.model.parameters())
    assert loaded <= sum(p.numel() for p in whole.model.parameters())
    assert not any(p.is_meta for p in part.model.parameters())


def test_the_hash_covers_the_part_that_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    changed = Backbone.load(folder)
    with torch.no_grad():
        changed.decoder.layers[-1].mlp.down_proj.weight[0, 0] += 1
    changed.save(tmp_path / "changed")
    assert Backbone.load(tmp_path / "changed", blocks=1).fingerprint() == changed.fingerprint()
    assert changed.fingerprint() != Backbone.load(folder, blocks=1).fingerprint()


def test_precisions_and_shards_hash_alike(tmp_path: Path) -> None:
    whole = tiny_qwen("2.5")
    whole.model.save_pretrained(tmp_path, max_shard_size="50KB")
    whole.processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for dtype in (torch.float32, torch.bfloat16):
        part = Backbone.load(tmp_path, dtype=dtype, blocks=2)
        assert part.fingerprint() == Backbone.load(tmp_path, dtype=dtype).fingerprint()


def test_what_needs_the_rest_is_refused() -> None:
    part = Backbone.load("blm-nano", blocks=2)
    with pytest.raises(BlmError, match=r"layer 3 is outside 1 \.\. 2, the loaded blocks of the 4"):
        part.tap(part.read(PROMPTS, side="right"), 3)
    for use in (part.probe_logits, lambda: part.answer(PROMPTS[1]), lambda: Generation(part)):
        with pytest.raises(BlmError, match="only the part of this model that chooses actions is loaded"):
            use()
    with pytest.raises(BlmError, match="only the part"):
        part.model(**part.encode(PROMPTS[:1]))
    with pytest.raises(BlmError, match="only the part"):
        part.write_into(Path("nowhere"))
    with pytest.raises(BlmError, match=r"layer 5 is outside 1 \.\. 4, the blocks of"):
        Backbone.load("blm-nano", blocks=5)


def test_a_model_that_acts_only_acts_alike() -> None:
    whole, part = (BLM.from_pretrained("blm-nano", actions_only=only) for only in (False, True))
    assert part.contract == whole.contract and part.backbone.absent is not None
    whole.policy.warm_up()
    part.policy.warm_up()
    with pytest.raises(BlmError, match="only the part"):
        part.answer(PROMPTS[1])


MEASURE = """
import sys, threading, time, torch
from blm.backbone import Backbone

def private():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def poll():
    while running:
        peak[0] = max(peak[0], private())
        time.sleep(0.001)

start, peak, running = private(), [0.0], True
thread = threading.Thread(target=poll)
thread.start()
blocks = int(sys.argv[2]) or None
backbone = Backbone.load(sys.argv[1], dtype=getattr(torch, sys.argv[3]), blocks=blocks)
running = False
thread.join()
print(peak[0] - start, private() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_holds_the_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 24 blocks, stored in bfloat16: no float32 copy, and a quarter for a quarter."""
    monkeypatch.setitem(TEXT, "hidden_size", 1024)
    monkeypatch.setitem(TEXT, "intermediate_size", 2048)
    monkeypatch.setitem(TEXT, "num_hidden_layers", 24)
    made = FAMILIES["LLaVA"]()
    made.model.to(torch.bfloat16)
    made.save(tmp_path / "backbone")
    stored = (tmp_path / "backbone/model.safetensors").stat().st_size / 2**20

    def measure(blocks: int) -> float:
        command = [sys.executable, "-c", MEASURE, str(tmp_path / "backbone"), str(blocks), "bfloat16"]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])

    whole, quarter = measure(0), measure(6)
    print(f"{stored:.0f} MiB stored; whole {whole:.0f} MiB, a quarter {quarter:.0f} MiB")
    overhead = 60  # MiB of code and buffers that the first load brings
    assert whole < 1.2 * stored + overhead
    assert quarter < 0.3 * stored + overhead

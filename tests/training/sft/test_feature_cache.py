"""Vision features on disk: computed once, shared by processes, continued after a kill, refused when stale."""

from __future__ import annotations

import json
import os
import signal
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blm.backbone import Backbone
from blm.training.loop.distributed import Processes
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.sft import feature_cache, vision_features
from blm.training.sft.feature_cache import CachedExamples, StoredFeatures, cache_features
from blm.training.sft.tokenize import ProcessorInput, TokenizedExample, concatenate_vision_inputs
from blm.training.sft.vision_features import encode_all, split_pictures, vision_modules
from blm.types import BlmError, Image
from tests.support.backbones import MAKERS, picture

SIDE = 56


def examples(backbone: Backbone, count: int = 11, side: int = SIDE) -> list[TokenizedExample]:
    """Examples with none, one or two pictures, of which every fourth is the same."""
    made = []
    for number in range(count):
        shown = [Image(picture(100 + (number + k) % 4 * (number % 3), side, side)) for k in range(number % 3)]
        text = "".join(backbone.processor.image_token for _ in shown)
        zeros = np.full(3, number)
        source = ProcessorInput(text, tuple(shown), None, None) if shown else None
        made.append(TokenizedExample(zeros, zeros > 0, zeros, zeros[None], source))
    return made


@pytest.fixture(params=["nano", "qwen2.5", "qwen3"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    made = MAKERS[request.param]()
    made.model.requires_grad_(False)
    return made


@pytest.fixture
def qwen() -> Backbone:
    made = MAKERS["qwen2.5"]()
    made.model.requires_grad_(False)
    return made


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "EXAMPLES_PER_SHARD", 2)


def read(backbone: Backbone, cached: CachedExamples) -> list[dict[str, torch.Tensor]]:
    (found,) = cached.examples
    return [concatenate_vision_inputs([one.vision_inputs(backbone)]) for one in found]


def assert_equal(found: list[dict[str, torch.Tensor]], wanted: list[dict[str, torch.Tensor]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], rtol=0, atol=2e-6) for name in one)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of pictures whose features are computed."""
    seen = list[int]()

    def counted(backbone: Backbone, pictures: Any) -> Any:
        seen.append(len(pictures))
        return encode_all(backbone, pictures)

    monkeypatch.setattr(feature_cache, "encode_all", counted)
    return seen


def test_stored_features_are_those_of_single_pictures(
    backbone: Backbone, tmp_path: Path, passes: list[int]
) -> None:
    side = 112 if "Llava" in type(backbone.model).__name__ else SIDE
    some = examples(backbone, side=side)
    cached = cache_features(backbone, [some[:4], some[4:]], tmp_path, ALONE)
    found = [one for source in cached.examples for one in source]
    assert [one.processor_input for one in found] == [None] * len(some)
    for one, example in zip(found, some, strict=True):
        split = split_pictures(example.vision_inputs(backbone))
        assert isinstance(one.features, StoredFeatures) == bool(split)
        alone = [encode_all(backbone, {"": p})[""] for p in split]
        stored = one.vision_inputs(backbone)
        for name, tensors in stored.items():
            for tensor, wanted in zip(tensors, alone, strict=True):
                assert tensor.dtype == torch.float32
                assert torch.allclose(tensor, wanted[name], rtol=0, atol=2e-6)
    assert sum(passes) == cached.distinct < cached.pictures
    again = cache_features(backbone, [some[:4], some[4:]], tmp_path, ALONE)
    assert (again.pictures, again.distinct) == (cached.pictures, cached.distinct)
    assert sum(passes) == cached.distinct, "computed twice"


@pytest.mark.parametrize("grid", [{}, {"patches": 20}])
def test_pictures_share_passes_of_the_tower(
    backbone: Backbone, grid: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if grid:
        monkeypatch.setattr(vision_features, "ROWS_PER_PASS", 2 * 16)
    side = 112 if "Llava" in type(backbone.model).__name__ else SIDE
    pictures = {}
    for number in range(4):
        pixels = picture(number, side, side)
        (inputs,) = split_pictures({k: (v,) for k, v in process(backbone, pixels).items()})
        pictures[str(number)] = inputs
    runs = list[int]()
    hook = vision_modules(backbone)[0].register_forward_hook(lambda *_: runs.append(1))
    together = encode_all(backbone, pictures)
    assert len(runs) == (2 if grid and "image_grid_thw" in pictures["0"] else 1)
    hook.remove()
    for key, inputs in pictures.items():
        alone = encode_all(backbone, {key: inputs})[key]
        assert all(torch.allclose(together[key][n], alone[n], rtol=0, atol=2e-6) for n in alone)


def process(backbone: Backbone, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    made = backbone.process([backbone.processor.image_token], [pixels])
    return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}


def test_bfloat16_features_are_stored_as_they_are(qwen: Backbone, tmp_path: Path) -> None:
    qwen.model.to(torch.bfloat16)
    some = examples(qwen, 5)
    stored = read(qwen, cache_features(qwen, [some], tmp_path, ALONE))
    for one, example in zip(stored, some, strict=True):
        for name, value in one.items():
            alone = [encode_all(qwen, {"": p})[""][name] for p in split_pictures(example.vision_inputs(qwen))]
            assert value.dtype == torch.bfloat16 and torch.allclose(value, torch.cat(alone), atol=0.05)
    size = sum(json.loads((tmp_path / "manifest.json").read_text())[n]["bytes"] for n in ("00000.npy",))
    assert size == (tmp_path / "00000.npy").stat().st_size
    values = np.load(tmp_path / "00000.npy")
    assert values.dtype == np.int16


def test_a_killed_process_continues_behind_its_last_shard(
    qwen: Backbone, tmp_path: Path, passes: list[int]
) -> None:
    some = examples(qwen)
    whole = read(qwen, cache_features(qwen, [some], tmp_path / "whole", ALONE))
    distinct = sum(passes)
    child = os.fork()
    if child == 0:
        describe = feature_cache.describe_file
        done = list[Path]()

        def killed(path: Path) -> dict[str, Any]:
            done.append(path)
            if len(done) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return describe(path)

        feature_cache.describe_file = killed
        try:
            cache_features(qwen, [some], tmp_path / "cut", ALONE)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    journal = (tmp_path / "cut/journal.jsonl").read_text().splitlines()
    assert len(journal) == 2 and not (tmp_path / "cut/manifest.json").exists()
    passes.clear()
    assert_equal(read(qwen, cache_features(qwen, [some], tmp_path / "cut", ALONE)), whole)
    assert sum(passes) == distinct - sum(len(json.loads(line)["result"]["pictures"]) for line in journal)


class Meeting:
    """Processes as threads."""

    def __init__(self, count: int) -> None:
        self.count, self.table = count, list[Any]([None] * count)
        self.barrier = threading.Barrier(count, timeout=60)

    def of(self, rank: int) -> Processes:
        meeting = self

        class Thread(Processes):
            def gather_objects(self, value: Any) -> list[Any]:
                meeting.barrier.wait()
                meeting.table[rank] = value
                meeting.barrier.wait()
                return list(meeting.table)

            def wait(self) -> None:
                meeting.barrier.wait()

        return Thread(rank, self.count, torch.device("cpu"))


def test_all_processes_fill_one_cache_and_read_from_it(tmp_path: Path, qwen: Backbone) -> None:
    some = examples(qwen)
    alone = cache_features(qwen, [some], tmp_path / "alone", ALONE)
    meeting = Meeting(3)
    backbones = [MAKERS["qwen2.5"]() for _ in range(3)]
    for one in backbones:
        one.model.requires_grad_(False)

    def work(rank: int) -> CachedExamples:
        return cache_features(backbones[rank], [some], tmp_path / "three", meeting.of(rank))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    for cached in found:
        assert (cached.pictures, cached.distinct) == (alone.pictures, alone.distinct)
        assert_equal(read(qwen, cached), read(qwen, alone))
    journals = sorted((tmp_path / "three").glob("journal*.jsonl"))
    assert [path.name for path in journals] == ["journal-1.jsonl", "journal-2.jsonl", "journal.jsonl"]
    assert all(path.read_text() for path in journals)


def test_a_cache_of_other_weights_or_examples_is_refused(qwen: Backbone, tmp_path: Path) -> None:
    some = examples(qwen)

    def fill(change: Callable[[], object], rows: list[TokenizedExample] = some) -> None:
        change()
        cache_features(qwen, [rows], tmp_path, ALONE)

    fill(lambda: None)
    visual = qwen.model.base_model.visual
    weight = visual.blocks[1].mlp.up_proj.weight
    with pytest.raises(BlmError, match="is stale: it has another vision_tower"):
        fill(lambda: weight.data.mul_(1.001))
    weight.data.copy_(MAKERS["qwen2.5"]().model.base_model.visual.blocks[1].mlp.up_proj.weight)
    with pytest.raises(BlmError, match="another image_processing"):
        fill(lambda: setattr(qwen.processor.image_processor, "image_mean", [0.1, 0.2, 0.3]))
    qwen.processor.image_processor.image_mean = MAKERS["qwen2.5"]().processor.image_processor.image_mean
    with pytest.raises(BlmError, match="another vision_tower, features"):
        fill(lambda: visual.merger.requires_grad_(True))
    visual.merger.requires_grad_(False)
    smaller = [
        replace(one, processor_input=replace(one.processor_input, max_pixels=9))
        if one.processor_input
        else one
        for one in some
    ]
    with pytest.raises(BlmError, match="another examples"):
        fill(lambda: None, smaller)
    fill(lambda: None)
    shard = tmp_path / "00001.npy"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BlmError, match=r"feature cache .* 00001\.npy is missing or altered"):
        fill(lambda: None)


def test_a_reader_holds_only_what_it_reads(qwen: Backbone, tmp_path: Path) -> None:
    """The files are mapped; their values are copied when an example is used."""
    cached = cache_features(qwen, [examples(qwen, 60)], tmp_path, ALONE)
    (found,) = cached.examples
    files = next(one.features.files for one in found if isinstance(one.features, StoredFeatures))
    assert all(isinstance(file, np.memmap) for file in files._files)
    tracemalloc.start()
    batch = [one.vision_inputs(qwen) for one in found[:6]]
    size = sum(tensor.nbytes for one in batch for tensors in one.values() for tensor in tensors)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size <= held < 3 * size, "all features would be ten times as large"


def test_filling_holds_the_features_of_one_shard(
    qwen: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = list[int]()
    refs = list[weakref.ref[torch.Tensor]]()

    def counted(backbone: Backbone, pictures: Any) -> Any:
        alive.append(sum(value.numel() for ref in refs if (value := ref()) is not None))
        found = encode_all(backbone, pictures)
        refs.extend(weakref.ref(value) for one in found.values() for value in one.values())
        return found

    monkeypatch.setattr(feature_cache, "encode_all", counted)
    cache_features(qwen, [examples(qwen, 40)], tmp_path, ALONE)
    assert len(alive) > 10 and len(refs) > 5
    assert max(alive) <= 4 * 16 * 32, "more than the four pictures of a shard"

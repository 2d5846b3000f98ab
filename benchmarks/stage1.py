"""Speed-up from each optimisation of Stage I, as ratios measured in turn on the same examples.

    python benchmarks/stage1.py [--repeats 5] [--steps 6] [--batch-size 32] [--threads 1]

Examples are generated scene questions, and the same number of texts of different lengths instead of
replay; the model is an untrained nano, whose speed does not depend on its weights. A step is loss,
gradients and AdamW. packing: packed sequences over one padded example per sequence, in tokens/s
without padding. turns: prefix attention over a dense mask. logits: the head on masked tokens over
all tokens, with nano's vocabulary and with one of 49,152. prefix: the questions about an image
after one copy of it over each with its own copy. features: a frozen vision tower run once over once
per step. data_share: time to prepare a batch over time of a step, if they did not run in parallel.
Intervals are 95 % t-intervals of the mean logarithm over the repeats.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from intents import T_975
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from blm.backbone import Backbone, build_nano
from blm.corpora.format.messages import read_corpus
from blm.corpora.format.turns import split_turns
from blm.corpora.scenes.build import SceneCorpusConfig, build_scene_corpus
from blm.evaluation.results import this_machine
from blm.training.policy.hidden_state_cache import ALONE
from blm.training.sft.feature_cache import cache_features
from blm.training.sft.loss import MaskedLossModel
from blm.training.sft.mixture_sampler import MixtureSampler, TokenizedSource
from blm.training.sft.pack import ExampleBatch, pack
from blm.training.sft.prefix_attention import use_prefix_attention
from blm.training.sft.tokenize import (
    Messages,
    TokenizationConfig,
    TokenizedExample,
    tokenize_conversation,
)
from blm.training.sft.vision_features import vision_modules
from blm.types import Message

Loss = Callable[[ExampleBatch], torch.Tensor]
LARGE_VOCABULARY = 49_152
"""Size of SmolLM2's vocabulary; Qwen's is three times as large."""
WORDS = ("the", "robot", "moves", "its", "gripper", "over", "a", "table", "with", "cubes", "and", "asks")


def scene_talks(folder: Path, scenes: int) -> list[Messages]:
    """Write a corpus of questions about random scenes and return its conversations."""
    config = SceneCorpusConfig(
        robots=("panda",),
        tasks=("pick_cube",),
        cameras=("base", "side"),
        image_size=112,
        scenes=scenes,
        first_seed=0,
    )
    build_scene_corpus(config, folder, workers=0)
    return [conversation.messages for conversation in read_corpus(folder)]


def text_talks(count: int, rng: np.random.Generator) -> list[Messages]:
    """Return texts of 10 to 1000 words, half of them below 120, as in instruction data."""
    lengths = np.clip(rng.lognormal(np.log(120), 1.0, count), 10, 1000).astype(int)
    texts = [" ".join(rng.choice(WORDS, length)) for length in lengths]
    return [(Message("user", ("Go on, please.",)), Message("assistant", (text,))) for text in texts]


def rows_of(
    backbone: Backbone, talks: Sequence[Messages], root: Path, *, share: bool = True
) -> list[TokenizedExample]:
    limits = TokenizationConfig(max_length=4096)
    parts = talks if share else [turn for talk in talks for turn in split_turns(talk)]
    rows = [
        tokenize_conversation(backbone, talk, limits, root, Counter(), independent=True) for talk in parts
    ]
    return [row for row in rows if row is not None]


@dataclass(frozen=True, kw_only=True)
class Options:
    repeats: int = 5
    steps: int = 6
    """Number of batches per measurement."""
    batch_size: int = 32
    pack_length: int = 1024
    threads: int = 1
    scenes: int = 96


@dataclass(frozen=True)
class Way:
    """One variant of training: its model and its batches."""

    loss: Loss
    parameters: Sequence[torch.nn.Parameter]
    batches: Sequence[ExampleBatch]
    work: Sequence[float]
    """Amount of work in a batch, counted equally in both variants of a pair."""

    def speed(self) -> float:
        """Return work per second over all batches."""
        optimizer = torch.optim.AdamW(self.parameters, 1e-5, fused=True)
        begin = time.perf_counter()
        for batch in self.batches:
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()
        return sum(self.work) / (time.perf_counter() - begin)


def way(
    backbone: Backbone, batches: Sequence[ExampleBatch], *, loss: Loss | None = None, cached: bool = False
) -> Way:
    model = MaskedLossModel(backbone, cached=cached).train()
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    work = [float(batch.tokens) for batch in batches]
    return Way(loss or (lambda batch: model(batch).loss_sum), trained, batches, work)


def full_logits(backbone: Backbone) -> Loss:
    def loss(batch: ExampleBatch) -> torch.Tensor:
        inputs = backbone.place(batch.inputs)
        logits = backbone.model(**inputs, use_cache=False).logits.float()
        labels = inputs["input_ids"].masked_fill(~batch.loss_mask, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")

    return loss


def batches_of(
    backbone: Backbone, sources: Sequence[TokenizedSource], size: int, length: int, steps: int
) -> list[ExampleBatch]:
    sampler = MixtureSampler(sources, examples_per_step=size, pack_length=length, seed=0)
    made = []
    for step in range(steps):
        groups = [[sources[s].examples[row] for s, row in group] for group in sampler.sequences(step)]
        made.append(pack(backbone, groups, ()))
    return made


def compare(name: str, fast: Way, slow: Way, repeats: int) -> dict[str, object]:
    """Return the ratio of speeds, its interval, and both speeds."""
    fast.speed(), slow.speed()
    times = track(range(repeats), name, console=Console(stderr=True))
    pairs = np.array([(fast.speed(), slow.speed()) for _ in times])
    logs = np.log(pairs[:, 0] / pairs[:, 1])
    half = T_975[repeats] * logs.std(ddof=1) / repeats**0.5
    interval = [float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))]
    return {
        "ratio": float(np.exp(logs.mean())),
        "interval_95": interval,
        "tokens_per_s": pairs.mean(0).tolist(),
    }


def measure(
    backbone: Backbone, folder: Path, talks: list[Messages], texts: list[Messages], options: Options
) -> dict[str, object]:
    size, length, repeats = options.batch_size, options.pack_length, options.repeats
    scene, text = rows_of(backbone, talks, folder), rows_of(backbone, texts, folder)
    mixture = [TokenizedSource(name="scene", examples=scene), TokenizedSource(name="text", examples=text)]
    begin = time.perf_counter()
    packed = batches_of(backbone, mixture, size, length, options.steps)
    making = time.perf_counter() - begin
    padded = batches_of(backbone, mixture, size, 0, options.steps)
    fast = way(backbone, packed)
    found: dict[str, object] = {"packing": compare("packing", fast, way(backbone, padded), repeats)}
    found["padding"] = {"packed": packed[0].padding, "padded": padded[0].padding}
    found["data_share"] = making / (sum(fast.work) / fast.speed())

    dense = MaskedLossModel(backbone).train()
    blind = way(backbone, packed, loss=lambda batch: dense(replace(batch, prefix_layout=None)).loss_sum)
    found["turns"] = compare("turns", fast, blind, repeats)

    found["logits"] = compare("logits", fast, way(backbone, packed, loss=full_logits(backbone)), repeats)
    large = Backbone(copy.deepcopy(backbone.model), backbone.processor)
    large.model.resize_token_embeddings(LARGE_VOCABULARY)
    slow = way(large, packed, loss=full_logits(large))
    found["logits of 49,152"] = compare("logits of 49,152", way(large, packed), slow, repeats)

    few = max(1, size // 4)
    alone = rows_of(backbone, talks[:few], folder, share=False)
    sources = [[TokenizedSource(name="scene", examples=rows)] for rows in (scene[:few], alone)]
    shared, apart = (batches_of(backbone, one, len(one[0].examples), length, 1) for one in sources)
    work = [float(batch.loss_mask.sum()) for batch in shared]
    together, each = (replace(way(backbone, batches), work=work) for batches in (shared, apart))
    found["prefix"] = compare("prefix", together, each, repeats)

    for part in vision_modules(backbone):
        part.requires_grad_(False)
    (stored,) = cache_features(backbone, [scene], folder / "features", ALONE).examples
    seen = [TokenizedSource(name="scene", examples=stored)]
    kept = way(backbone, batches_of(backbone, seen, size, length, options.steps), cached=True)
    live = way(backbone, batches_of(backbone, mixture[:1], size, length, options.steps))
    found["features"] = compare("features", kept, live, repeats)
    return found


def main(options: Options) -> None:
    """Print one JSON object."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "scenes"
        talks = scene_talks(folder, options.scenes)
        texts = text_talks(options.scenes, np.random.default_rng(0))
        backbone = build_nano([message.text for talk in talks + texts for message in talk])
        with use_prefix_attention(backbone):
            result = measure(backbone, folder, talks, texts, options)
    result |= {
        "options": asdict(options),
        "machine": this_machine().to_json() | {"load": os.getloadavg()[0]},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Options))

"""Speed-up from batching in the digital evaluation: questions/s with and without batches.

    python benchmarks/digital.py [--repeats 3] [--questions 32] [--batch 16] [--threads 1]

It runs all of `evaluate_digital` (images from disk, journal, scoring) with the untrained nano
backbone on generated images; the speed depends on neither weights nor images. Each repeat times
both variants, one after the other. Both must give the same answers.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import tyro

from blm.backbone.backbone import Backbone, build_nano
from blm.evaluation.digital.runner import DigitalEvalConfig, evaluate_digital
from blm.types import Chat, Image, Message, Question


class OneByOne:
    """The backbone without its batch methods."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 64) -> str:
        return self.backbone.answer(messages, max_tokens=max_tokens)


def make_questions(folder: Path, count: int) -> list[Question]:
    """Return questions of different lengths about noise images on disk."""
    rng, made = np.random.default_rng(0), []
    for index in range(count):
        path = f"{index}.png"
        PIL.Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(folder / path)
        text = "What is in the picture?" + " Look closely." * (index % 4)
        messages = (Message("user", (Image(path=path), text)),)
        made.append(Question(id=path, kind="k", messages=messages, answer="red", group=path))
    return made


def main(repeats: int = 3, questions: int = 32, batch: int = 16, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    backbone = build_nano()
    ratios, rates, same = [], {"batched": 0.0, "one by one": 0.0}, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = make_questions(folder, questions)
        config = DigitalEvalConfig(root=folder, batch=batch)
        chats: dict[str, Chat] = {"batched": backbone, "one by one": OneByOne(backbone)}
        for repeat in range(repeats + 1):  # the first repeat warms up
            raw = {}
            for way, chat in chats.items():
                start = time.perf_counter()
                result = evaluate_digital(chat, asked, folder / f"{way}{repeat}", model=way, config=config)
                rates[way] = questions / (time.perf_counter() - start)
                raw[way] = [p.raw for p in result.predictions]
            same = same and raw["batched"] == raw["one by one"]
            ratios += [rates["batched"] / rates["one by one"]] * (repeat > 0)
    report = {
        "ratio": float(np.exp(np.log(ratios).mean())),
        "ratios": ratios,
        "questions_per_second": rates,
        "same_answers": same,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    tyro.cli(main)

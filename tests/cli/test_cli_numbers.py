"""Every numeric flag of every command: bad values end with one plain line that names it, before any work."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from blm.app.recipes import RECIPES
from blm.app.studies import with_field
from blm.baselines.diffusion_policy import BaselineConfig
from blm.cli import corpus, digital, main, physical, training
from blm.corpora import ConverterConfig, CurationConfig, SceneCorpusConfig
from blm.evaluation.digital.benchmarks.sharerobot_split import SplitConfig
from blm.planner import CollectConfig
from blm.training.loop.loop import LoopConfig
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.hidden_states import HiddenStateConfig
from blm.training.sft.train import Stage1Config
from blm.types import BlmError

BAD = {int: (-7_000_000_000, 10**24, math.nan), float: (-1e30, math.nan, math.inf)}
LOOP = LoopConfig(steps=1, batch_size=1)
CONFIGS: dict[str, Any] = {
    "collect": CollectConfig(),
    "corpus build": SceneCorpusConfig(
        robots=("panda",), tasks=("push_cube",), cameras=("base",), image_size=64, scenes=1, first_seed=10_000
    ),
    "corpus validate": corpus.ValidateCorpus(folder=Path("in")),
    "corpus convert": ConverterConfig(),
    "corpus curate": CurationConfig(),
    "corpus sharerobot": SplitConfig(),
    "train stage1": training.TrainStage1(out=Path("out"), corpus=("in",), config=Stage1Config(loop=LOOP)),
    "train stage2": training.TrainStage2(
        out=Path("out"),
        config=PolicyTrainingConfig(
            datasets=(),
            backbone="nano",
            intents=HiddenStateConfig(layer=1, cameras=("base",)),
            loop=LOOP,
        ),
    ),
    "train baseline": BaselineConfig(datasets=(), cameras=("base",), loop=LOOP),
    "eval physical": physical.EvaluatePhysical(model="zero", out=Path("out")),
    "eval digital": digital.EvaluateDigital(
        benchmark="scene", data=Path("in"), model="nano", out=Path("out")
    ),
    "demo": RECIPES["demo"](),
}
"""Command -> its settings; every number in them is a flag."""
SCENES = "--robots=panda --tasks=push_cube --cameras=base --image-size=64 --scenes=1 --first-seed=1"
STEPS = "--loop.steps=1 --loop.batch-size=1"
COMMANDS = {
    "collect out": ("episodes", "first-seed", "image-size", "workers", "hold", "distractors", "noise"),
    f"corpus build out {SCENES}": ("workers", "turns"),
    "corpus convert llava in out": ("frames",),
    "corpus group out in": ("turns", "workers"),
    "corpus curate out in": ("max-length", "hash-distance", "seed"),
    "corpus validate in": ("max-tokens", "shown"),
    "corpus sharerobot in": ("episodes", "templates", "seed"),
    "corpus replay out --backbone=nano": ("count", "seed"),
    f"train stage1 out --corpus=in {STEPS}": ("held-out-rows", "loop.accumulate", "sample"),
    f"train stage2 out --datasets=in --backbone=nano --intents.layer=1 --intents.cameras=base {STEPS}": (
        "execute",
        "drive",
    ),
    "eval physical --model=zero --out=out": (
        "episodes",
        "workers",
        "max-batch",
        "image-size",
        "execute",
        "videos",
    ),
    "eval digital --benchmark=scene --data=in --model=nano --out=out": ("limit", "batch", "concurrency"),
    "demo --run=out": ("workers", "image-size", "stage2.loop.batch-size", "evaluation.episodes"),
    "export vllm nano out": ("images", "context"),
}
"""Command lines, and flags to try on them."""


def numbers(config: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Flag and type of every number in a configuration, however deep."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if typing.get_origin(kind) in (typing.Union, types.UnionType):
            kinds = [one for one in typing.get_args(kind) if one in (int, float)]
            kind = kinds[0] if kinds else kind
        if typing.get_origin(kind) is tuple and typing.get_args(kind)[0] in (int, float):
            kind = typing.get_args(kind)[0]
        name = f"{prefix}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(kind):
            yield from numbers(kind, f"{name}.")
        elif kind in (int, float):
            yield name, kind


@pytest.mark.parametrize("command", CONFIGS)
def test_every_number_of_every_command_has_limits(command):
    """Too small, too large and not-a-number are refused by name, however deep the setting lies."""
    wrong, cases = [], list(numbers(type(CONFIGS[command])))
    for name, kind in cases:
        for value in BAD[kind]:
            path = name.replace("-", "_")
            old = attrgetter(path)(CONFIGS[command])
            try:
                with_field(
                    CONFIGS[command], path, (value,) * max(1, len(old)) if isinstance(old, tuple) else value
                )
                wrong.append(f"{name}={value} was accepted")
            except BlmError as error:
                if path.rpartition(".")[2] not in str(error):
                    wrong.append(f"{name}={value}: {error}")
    assert cases and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_flags_end_with_one_line_before_anything_is_written(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for name in COMMANDS[command]:
        for value in ("-7000000000", "1000000000000000000000000", "nan"):
            try:
                main([*command.split(" "), f"--{name}={value}"])
                outcome = "it ran"
            except SystemExit as end:
                said = "".join(capsys.readouterr())
                words = {name, name.rpartition(".")[2].replace("-", "_")}
                outcome = (
                    "" if end.code == 2 and any(word in said for word in words) else f"{end.code}: {said}"
                )
            except Exception as error:
                outcome = repr(error)
            if outcome:
                wrong.append(f"--{name}={value}: {outcome[:300]}")
    assert not wrong, "\n".join(wrong)
    assert list(tmp_path.iterdir()) == [], "something was written before the refusal"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("eval physical --model zero --out out --horizon 4 --execute 8", "execute is 8; it must be 1 to 4"),
        ("eval physical --model random --out out --episodes 0", "episodes is 0; it must be 1 to"),
        ("eval physical --model zero --out out --execute 0", "execute is 0"),
        ("demo --run out --stage2.execute 17", "stage2.execute 17 must lie in 1..horizon = 16"),
        ("demo --run out --image-size 113", "even side"),
        ("collect out --noise nan", "noise is"),
        ("collect out --episodes 0", "episodes is 0"),
        ("train stage2 out --datasets in --backbone nano --intents.layer 1 --intents.cameras base "
         "--loop.steps 1 --loop.batch-size 1 --execute 99", "execute 99 must lie in 1..horizon"),
        ("train baseline out --datasets in --cameras base --loop.steps 1 --loop.batch-size 1 --execute 99",
         "execute 99 must lie in 1..horizon"),
        ("view in --episode -1", "in"),
    ],
)  # fmt: skip
def test_numbers_that_do_not_fit_together(tmp_path: Path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments.split(" "))
    assert end.value.code == 2 and said in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []

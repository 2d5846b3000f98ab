"""Speed and memory of 3B and 7B backbones on a GPU, in at most 8 minutes, as one JSON object.

    python benchmarks/gpu.py [--device cuda] [--seconds 480] [--out gpu.json]
    python benchmarks/gpu.py --tiny --device cpu

Weights are random, in the shapes of published backbones, and nothing is downloaded. Parts: an
action by its parts, eager, compiled and with CUDA graphs; cache filling; Stage II from a cache, from
a compact cache and live; Stage I packed and padded; peak memory beside the estimate of `blm memory`.
A part that fails is reported as {"error": ..} and does not stop the others. The file `--out` is
replaced after each part, and a part whose time has run out ends with fewer repeats, or is reported
as skipped. With --tiny, all of it runs with tiny models, to test this script.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_action
import gpu_training
import torch
import tyro
from gpu_setting import Clock, Numbers, Setting, full_setting, shown, tiny_setting

from blm.evaluation.results import this_machine
from blm.io import write_json

PARTS: dict[str, tuple[Callable[[Setting, Clock, Numbers], None], float]] = {
    "action": (gpu_action.action, 0.36),
    "cache fill": (gpu_training.cache_fill, 0.1),
    "stage2": (gpu_training.stage2, 0.27),
    "stage1": (gpu_training.stage1, 0.27),
}
"""Name -> function, and its share of the time of one backbone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str = "cuda"
    """Torch device: cuda, cuda:N or cpu."""
    shapes: tuple[str, ...] = ("qwen2_5_vl_3b", "qwen2_5_vl_7b")
    """Recipes whose backbone and policy are measured."""
    cameras: tuple[int, ...] = (2, 3)
    """Numbers of cameras."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Parts to measure."""
    batches: tuple[int, ...] = ()
    """Numbers of observations in a batch; by default 1, 8 and 32, or with --tiny 1 and 2."""
    tiny: bool = False
    """Measure tiny models, in seconds."""
    repeats: int = 2
    """Number of repeats of a measurement with --tiny."""
    seconds: float = 480.0
    """Time for everything [s]."""
    seed: int = 0
    """Seed of weights, images and texts."""
    out: Path | None = None
    """File that is replaced after each part."""


class Results:
    """The JSON object, written after each part."""

    def __init__(self, options: Options) -> None:
        on_gpu = torch.device(options.device).type == "cuda"
        self.out = options.out
        self.values: dict[str, Any] = {
            "device": torch.cuda.get_device_name(options.device) if on_gpu else this_machine().processor,
            "torch": torch.__version__,
            "machine": this_machine().to_json(),
            "options": {**asdict(options), "out": None},
            "complete": False,
            "backbones": {},
        }
        self.write()

    def write(self) -> None:
        if self.out is not None:
            write_json(self.out, self.values)

    @contextmanager
    def part(self, place: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
        """Collect the numbers of a part; an exception becomes {"error": ..} beside them."""
        begin = time.perf_counter()
        found = place.setdefault(name, {})
        try:
            yield found
        except Exception as error:
            found["error"] = shown(error)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found["seconds"] = round(time.perf_counter() - begin, 2)
        self.write()


def main(options: Options) -> None:
    """Print one JSON object."""
    torch.manual_seed(options.seed)
    if torch.device(options.device).type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    results, end = Results(options), time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for index, shape in enumerate(options.shapes):
            share = (end - time.monotonic()) / (len(options.shapes) - index)
            _measure_shape(shape, Path(folder) / shape, options, results, time.monotonic() + share)
    results.values["complete"] = True
    results.write()
    print(json.dumps(results.values, indent=1))


def _measure_shape(shape: str, folder: Path, options: Options, results: Results, end: float) -> None:
    place: dict[str, Any] = results.values["backbones"].setdefault(shape, {})
    how = (shape, folder, options.device, options.cameras, options.seed)
    setting = None
    with results.part(place, "load") as found:
        setting = tiny_setting(*how, options.repeats) if options.tiny else full_setting(*how)
        setting.batches = options.batches or setting.batches
        found |= {"parameters": sum(p.numel() for p in setting.backbone.model.parameters())}
    if setting is None:
        return
    begin, used = time.monotonic(), 0.0
    total = end - begin
    total /= sum(PARTS[name][1] for name in options.parts)
    for name in options.parts:
        function, share = PARTS[name]
        used += share
        with results.part(place, name) as found:
            function(setting, Clock(begin + used * total), found)
    setting.free()


if __name__ == "__main__":
    main(tyro.cli(Options))

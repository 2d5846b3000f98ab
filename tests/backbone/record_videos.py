"""Record what the official video processors of transformers return, as tests/backbone/videos.json.

They need torchvision, which the project's environment does not have. Run this in another one:

    python -m venv .venv-torchvision && .venv-torchvision/bin/pip install -e . torchvision
    .venv-torchvision/bin/python -m tests.backbone.record_videos
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

OUT = Path(__file__).with_name("videos.json")
KINDS = ("qwen2_5_vl", "qwen3_vl")
SMALL = {"shortest_edge": 2 * 32 * 32, "longest_edge": 10**7}
CASES: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "no resize": ((4, 224, 224), {"size": SMALL}),
    "no resize, odd count": ((5, 224, 448), {"size": SMALL}),
    "no resize asked for": ((2, 224, 224), {"do_resize": False}),
    "rounded to patches": ((3, 100, 75), {"size": SMALL}),
    "enlarged": ((2, 60, 90), {}),
    "shrunk": ((4, 300, 400), {"size": {"shortest_edge": 1024, "longest_edge": 100_000}}),
    "shrunk by the cap": (
        (8, 240, 320),
        {"size": {"shortest_edge": 1024, "longest_edge": 400_000}, "cap_pixels_per_frame": True},
    ),
    "shrunk by the tokens": (
        (6, 240, 320),
        {"size": SMALL, "cap_pixels_per_frame": True, "max_video_tokens": 40},
    ),
    "bilinear": ((2, 130, 170), {"size": SMALL, "resample": 2}),
    "other scale": ((2, 64, 96), {"size": SMALL, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6]}),
}
"""Name -> frames, height and width, and the settings that differ from the class's."""
CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "hub, qwen2.5": {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "hub, qwen3": {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}
"""Files as on the hub."""
TIMES = {"even": (0.25, 0.75, 1.25, 1.75), "uneven, odd": (0.0, 0.4, 1.0, 1.2, 3.0)}
PROMPT = "<|vision_start|><|video_pad|><|vision_end|>What happens?"


def frames(count: int, height: int, width: int) -> np.ndarray:
    """Return smooth waves with noise, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(7)
    time, row, column, channel = np.ogrid[:count, :height, :width, :3]
    waves = 100 + 60 * np.sin(row / 7 + time) + 60 * np.cos(column / 11 - channel)
    return (waves + rng.integers(0, 30, (count, height, width, 3))).astype(np.uint8)


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def sample(values: torch.Tensor) -> list[float]:
    """Return 12 values from all over a tensor."""
    flat = values.flatten()
    return [float(flat[place]) for place in np.linspace(0, len(flat) - 1, 12).round().astype(int)]


def record(kind: str, make: Any, processor: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"pixels": {}, "prompts": {}}
    for name, (shape, settings) in CASES.items():
        out = make(**settings)(videos=[frames(*shape)], do_sample_frames=False, return_tensors="pt")
        values = out["pixel_values_videos"]
        found["pixels"][name] = {
            "grid": out["video_grid_thw"].tolist(),
            "shape": list(values.shape),
            "sha256": digest(values),
            "sample": sample(values),
        }
    found["settings"] = {name: make.from_dict(config).to_dict() for name, config in CONFIGS.items()}
    for name, times in TIMES.items():
        # a video of 20 Hz of which these frames were sampled; its length is what even sampling would need
        interval = (times[-1] - times[0]) / (len(times) - 1)
        metadata = VideoMetadata(
            total_num_frames=round(interval * len(times) * 20),
            fps=20.0,
            frames_indices=[round(time * 20) for time in times],
        )
        out = processor(
            text=[PROMPT],
            videos=[frames(len(times), 64, 96)],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        found["prompts"][name] = {
            "text": processor.tokenizer.decode(out["input_ids"][0]),
            "token_types": out["mm_token_type_ids"][0].tolist(),
            "second_per_grid_ts": [float(value) for value in out.get("second_per_grid_ts", [])],
        }
    return found


def main() -> None:
    with suppress(ImportError):  # for a torchvision that was built for another torch (scripts/lerobot.sh)
        import torchvision_operators  # noqa: F401
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    from tests.support.backbones import tiny_qwen

    result: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers")}
        | {"python": sys.version.split()[0]}
    }
    classes = {
        "qwen2_5_vl": (Qwen2VLVideoProcessor, Qwen2_5_VLProcessor, "2.5"),
        "qwen3_vl": (Qwen3VLVideoProcessor, Qwen3VLProcessor, "3"),
    }
    for kind, (make, whole, name) in classes.items():
        tiny = tiny_qwen(name).processor
        processor = whole(tiny.image_processor, tiny.tokenizer, make(size=SMALL))
        result[kind] = record(kind, make, processor)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{OUT}: {OUT.stat().st_size} bytes, {result['versions']}")


if __name__ == "__main__":
    main()

"""The memory that torch allocates on the CPU, as its profiler records it, and models to measure it on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from blm.backbone import Backbone
from blm.backbone.published_shapes import shape_of
from blm.backbone.stand_in import stand_in


def allocated_peak(run: Callable[[], object]) -> int:
    """Return the largest number of bytes that torch's allocator held more than before, while `run` ran.

    It counts what the allocator gives out, so it knows nothing of tensors, operators or autograd.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler warns of its own settings
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
            run()
    held = peak = 0
    assert record.profiler is not None
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def small_qwen(device: str = "cpu", **text: Any) -> Backbone:
    """A Qwen2.5-VL of a few million parameters, in the real classes, on a device."""
    config = shape_of("qwen2_5_vl_3b")
    changes = {
        "vocab_size": 4096,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {**config.text_config.rope_parameters, "mrope_section": [4, 6, 6]},
    }
    for name, value in {**changes, **text}.items():
        setattr(config.text_config, name, value)
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 128, 4
    vision.out_hidden_size, vision.fullatt_block_indexes = 128, [1]
    return stand_in(config, device=device)

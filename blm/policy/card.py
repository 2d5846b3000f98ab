"""The model card of a checkpoint: robots, training, proof of the frozen backbone, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

HEADER = """---
library_name: blm
pipeline_tag: robotics
tags: [robotics, vision-language-action, flow-matching]
---
"""
TITLES = {"blm": "BLM: bridge and policy on a frozen backbone", "diffusion_policy": "Diffusion Policy"}


def model_card(config: Mapping[str, Any]) -> str:
    """Return README.md for a checkpoint with this config.json."""
    contract, provenance = config["contract"], config["provenance"]
    loop = provenance.get("loop") or {}
    lines = [
        HEADER,
        f"# {TITLES[config['kind']]}",
        "",
        f"Cameras {', '.join(contract['cameras'])}, {contract['image_size']} px; {contract['rate_hz']:g} Hz; "
        f"chunks of {contract['horizon']} actions, of which {contract['execute']} are executed.",
        "",
        "| robot | state and action, in order |",
        "|---|---|",
    ]
    for robot, space in contract["action_spaces"].items():
        names = (f"{name} [{unit}]" for name, unit in zip(space["names"], space["units"], strict=True))
        lines.append(f"| {robot} | {', '.join(names)} |")
    if loop:
        lines += [
            "",
            f"Trained for {loop['steps']:,} steps of {loop['batch_size']} samples, seed {loop['seed']}.",
        ]
    if reserved := provenance.get("reserved_seeds"):
        counts = [f"{n} episodes for {what}" for of in reserved.values() for what, n in of.items()]
        lines += [
            "",
            "**Trained on reserved scenes** (" + ", ".join(counts) + "): scores on them are not valid.",
        ]
    if frozen := config.get("frozen"):
        lines += [
            "",
            "## Frozen backbone",
            "",
            "The backbone was hashed, and its logits on fixed prompts kept, before Stage II. The hash was "
            "the same after it, and is compared at every load; the logits are compared, too, and a "
            "difference beyond rounding gives a warning.",
            "",
            f"sha256 of all parameters: `{frozen.get('weights') or frozen['fingerprint']}`; "
            f"{len(frozen['logits'])} logits in config.json; tapped after block {config['layer']}.",
        ]
    lines += ["", "## Provenance", "", "```json", json.dumps(provenance, indent=1), "```", ""]
    return "\n".join(lines)

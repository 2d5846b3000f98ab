"""The model card of a checkpoint: robots, training, proof of the frozen backbone, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from blm.policy.tuning import TuningRecord

HEADER = """---
library_name: blm
pipeline_tag: robotics
tags: [robotics, vision-language-action, flow-matching]
---
"""
TITLES = {"blm": "BLM: bridge and policy on a frozen backbone", "diffusion_policy": "Diffusion Policy"}
TUNED_TITLE = "BLM: bridge and policy on a tuned backbone"


def _dimensions(space: Mapping[str, Any]) -> str:
    """Return names and units of an action space or a state space."""
    return ", ".join(f"{name} [{unit}]" for name, unit in zip(space["names"], space["units"], strict=True))


def model_card(config: Mapping[str, Any]) -> str:
    """Return README.md for a checkpoint with this config.json."""
    contract, provenance = config["contract"], config["provenance"]
    loop = provenance.get("loop") or {}
    lines = [
        HEADER,
        f"# {TUNED_TITLE if config.get('tuning') else TITLES[config['kind']]}",
        "",
        f"Cameras {', '.join(contract['cameras'])}, {contract['image_size']} px; {contract['rate_hz']:g} Hz; "
        f"chunks of {contract['horizon']} actions, of which {contract['execute']} are executed.",
        "",
        "| robot | state and action, in order |",
        "|---|---|",
    ]
    for robot, space in contract["action_spaces"].items():
        state = space.get("state")
        told = _dimensions(space) if state is None else f"{_dimensions(state)}; action: {_dimensions(space)}"
        lines.append(f"| {robot} | {told} |")
    if fit := contract.get("picture_fit"):
        lines += ["", f"Pictures of any size become squares by {fit}."]
    if loop:
        lines += [
            "",
            f"Trained for {loop['steps']:,} steps of {loop['batch_size']} samples, seed {loop['seed']}.",
        ]
    if training := contract.get("training"):
        lines += ["", f"Training scenes: {training}."]
    if reserved := provenance.get("reserved_seeds"):
        counts = [f"{n} episodes for {what}" for of in reserved.values() for what, n in of.items()]
        lines += [
            "",
            "**Trained on reserved scenes** (" + ", ".join(counts) + "): scores on them are not valid.",
        ]
    if frozen := config.get("frozen"):
        lines += _proof(frozen, config.get("tuning"))
        lines.append(
            f"sha256 of all parameters: `{frozen.get('weights') or frozen['fingerprint']}`; "
            f"{len(frozen['logits'])} logits in config.json; tapped after block {config['layer']}."
        )
    lines += ["", "## Provenance", "", "```json", json.dumps(provenance, indent=1), "```", ""]
    return "\n".join(lines)


def _proof(frozen: Mapping[str, Any], tuning: Mapping[str, Any] | None) -> list[str]:
    """Return the lines on how the backbone relates to the one before Stage II."""
    if tuning is None:
        return [
            "",
            "## Frozen backbone",
            "",
            "The backbone was hashed, and its logits on fixed prompts kept, before Stage II. The hash was "
            "the same after it, and is compared at every load; the logits are compared, too, and a "
            "difference beyond rounding gives a warning.",
            "",
        ]
    record = TuningRecord.from_json(tuning)
    return [
        "",
        "## Tuned backbone",
        "",
        f"**Not frozen**: the backbone was {record.describe()}. The tuned weights are stored here; their "
        "hash was taken after Stage II, and is compared at every load. All other weights of the backbone "
        "were the same after Stage II as before it.",
        "",
        f"sha256 before Stage II: `{record.before}`.",
        "",
    ]

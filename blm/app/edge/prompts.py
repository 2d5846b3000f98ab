"""The template of a policy's control prompts, taken from its processor and checked against it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blm.backbone.prompt import control_prompt
from blm.chunks import view_names
from blm.edge.folder import PictureSettings, PromptTemplate
from blm.edge.prompts import PromptEncoder
from blm.policy.policy import CheckpointPolicy
from blm.types import BlmError, Message, Observation

ROBOT, TASK = "\ue000", "\ue001"
"""Characters of Unicode's private area that stand for the robot's name and the instruction."""
INSTRUCTIONS = ("Pick up the red cube.", "put 12 Bälle in the bin, then wait", "push  it", "")
"""Instructions for which tokens are compared."""


def write_tokenizer(policy: CheckpointPolicy, folder: Path) -> PromptTemplate:
    """Write tokenizer.json and return the template of control prompts.

    Raises BlmError if the two do not give the tokens of the policy's own processor.
    """
    template, file = _template(policy), folder / "tokenizer.json"
    tokenizer: Any = policy.backbone.processor.tokenizer
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    file.write_text(json.dumps({**stored, "padding": None, "truncation": None}, ensure_ascii=False), "utf-8")
    encode = PromptEncoder(template, file)
    for robot in policy.contract.action_spaces:
        for instruction in INSTRUCTIONS:
            expected = _read(policy, robot, instruction)
            found = encode([Observation(images={}, state=np.zeros(1), instruction=instruction, robot=robot)])
            if found.ids[0].tolist() != expected:
                raise BlmError(
                    f"the prompt for '{robot}' and {instruction!r} has other tokens without transformers; a "
                    "policy with this tokenizer or processor cannot be exported"
                )
    return template


def picture_settings(policy: CheckpointPolicy) -> PictureSettings:
    """Return the squares that the processor makes of the contract's pictures. Raises BlmError if it
    makes none."""
    size = policy.contract.image_size
    images: Any = policy.backbone.processor.image_processor
    blank = policy.backbone.process(
        [policy.backbone.render(example_prompt(policy, ROBOT, TASK), prompt=True)], _blanks(policy)
    )["pixel_values"]
    height, width = blank.shape[-2:]
    if blank.ndim != 4 or height != width:
        raise BlmError(f"pictures of {size} px become {tuple(blank.shape)}; only squares can be exported")
    return PictureSettings(side=int(height), resample=int(images.resample))


def _template(policy: CheckpointPolicy) -> PromptTemplate:
    backbone = policy.backbone
    tokenizer: Any = backbone.processor.tokenizer
    text = backbone.render(example_prompt(policy, ROBOT, TASK), prompt=True)
    before, robot, rest = text.partition(ROBOT)
    between, task, after = rest.partition(TASK)
    if not robot or not task or ROBOT in rest or TASK in after:
        raise BlmError("the chat template repeats or moves the instruction; this policy cannot be exported")
    special = backbone.special_token_arguments(text).get("add_special_tokens", True)
    picture = backbone.processor.image_token
    reserved = [picture, getattr(backbone.processor, "video_token", None)]
    return PromptTemplate(
        parts=(before, between, after),
        picture=picture,
        picture_tokens=_picture_tokens(policy, text, special),
        feature_token=backbone.placeholder_id,
        pad_token=int(tokenizer.pad_token_id),
        special_tokens=special,
        reserved=tuple(token for token in reserved if token is not None),
        context=int(backbone.decoder.config.max_position_embeddings),
    )


def _picture_tokens(policy: CheckpointPolicy, text: str, special: bool) -> tuple[int, ...]:
    """Return the tokens that the processor writes for one picture."""
    backbone = policy.backbone
    tokenizer: Any = backbone.processor.tokenizer
    short: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    picture = tokenizer.convert_tokens_to_ids(backbone.processor.image_token)
    long = backbone.process([text], _blanks(policy))["input_ids"][0].tolist()
    count = short.count(picture)
    size = (len(long) - len(short) + count) // count
    start = short.index(picture)
    return tuple(long[start : start + size])


def _read(policy: CheckpointPolicy, robot: str, instruction: str) -> list[int]:
    inputs = policy.backbone.read([example_prompt(policy, robot, instruction)])
    ids: list[int] = inputs["input_ids"][0].tolist()
    return ids


def example_prompt(policy: CheckpointPolicy, robot: str, instruction: str) -> Sequence[Message]:
    """Return the control prompt of a policy about black pictures."""
    views = dict(zip(_views(policy), _blanks(policy), strict=True))
    return control_prompt(instruction, robot, views, order=policy.tap.prompt)


def _views(policy: CheckpointPolicy) -> list[str]:
    contract = policy.contract
    return view_names(contract.cameras, contract.frames, contract.execute)


def _blanks(policy: CheckpointPolicy) -> list[Any]:
    side = policy.contract.image_size
    return [np.zeros((side, side, 3), np.uint8) for _ in _views(policy)]

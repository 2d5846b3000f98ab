"""Hidden states, generation and actions on a pretended GPU: the results of the CPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from blm.backbone import Backbone
from blm.backbone.generation.generator import Generation
from blm.datasets.transforms import Normalize, RobotTransforms
from blm.policy.frozen import FrozenProof
from blm.policy.network import PolicyNetwork
from blm.policy.policy import CheckpointPolicy
from blm.policy.tap import TapConfig
from blm.types import ActionSpace, Observation, PolicyContract, Sampling
from tests.support.backbones import PROMPTS, picture
from tests.support.policy_training import POLICY
from tests.support.pretended_gpu import PretendedGpu, on_gpu, table
from tests.support.pretended_gpu.comparison import GPU, assert_same, every_family, moved, of_the_package, twin


@every_family
def test_hidden_states_answers_and_logits(gpu: PretendedGpu, backbone: Backbone) -> None:
    other = moved(twin(backbone))
    a, b = (one.tap(one.encode(PROMPTS, side="right"), 2) for one in (backbone, other))
    assert_same([b.hidden, b.mask], [a.hidden, a.mask])
    assert torch.equal(other.probe_logits(), backbone.probe_logits())
    assert other.complete(PROMPTS, max_tokens=4) == backbone.complete(PROMPTS, max_tokens=4)
    assert other.complete(PROMPTS[:2], max_tokens=3, seed=1) == backbone.complete(
        PROMPTS[:2], max_tokens=3, seed=1
    )


@pytest.mark.parametrize("backbone", ["nano", "qwen3"], indirect=True)
def test_answers_read_in_pieces(gpu: PretendedGpu, backbone: Backbone) -> None:
    tokens = []
    for one in (backbone, moved(twin(backbone))):
        generation = Generation(one, piece_tokens=8, step_tokens=4096)
        sampling = Sampling(max_tokens=5, temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=3)
        prefill = generation.begin(generation.prepare(PROMPTS[0], [sampling, Sampling(max_tokens=3)]))
        while (answers := generation.advance(prefill)) is None:
            pass
        while generation.running:
            generation.step()
        tokens.append([answer.tokens for answer in answers])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("backbone", ["nano"], indirect=True)
def test_waits_for_a_token(gpu: PretendedGpu, backbone: Backbone) -> None:
    """The token is read, and sent back with its position; transformers inspects padding masks."""
    generation = Generation(moved(backbone))
    generation.start(PROMPTS, [Sampling(max_tokens=8)] * len(PROMPTS))
    with gpu.counting() as syncs:
        generation.step()
    assert len(of_the_package(syncs)) == 2 and len(syncs) <= 4, table(syncs)


def make_policy(backbone: Backbone) -> CheckpointPolicy:
    spaces = {
        robot: ActionSpace(
            robot=robot,
            names=(*(f"j{i}" for i in range(joints)), "gripper"),
            units=("rad",) * joints + ("opening",),
            low=(-2.0,) * joints + (0.0,),
            high=(2.0,) * joints + (1.0,),
        )
        for robot, joints in (("arm", 2), ("leg", 3))
    }
    torch.manual_seed(0)
    network = PolicyNetwork(POLICY, backbone.hidden_size, len(spaces))
    ranges = {robot: Normalize(-np.ones(space.dim), np.ones(space.dim)) for robot, space in spaces.items()}
    return CheckpointPolicy(
        backbone=backbone,
        frozen=FrozenProof("0" * 64, (0.0,)),
        tap=TapConfig(layer=2),
        network=network,
        transforms={
            robot: RobotTransforms(state=one, normalize_actions=one, relative=spaces[robot].offsets_allowed)
            for robot, one in ranges.items()
        },
        contract=PolicyContract(
            action_spaces=spaces, cameras=("base",), image_size=56, horizon=POLICY.horizon, execute=3
        ),
    )


WAITS = {"qwen2_5_vl": 11, "qwen3_vl": 15, "llava": 11, "idefics3": 13, "smolvlm": 13}
"""`model_type` -> the host's waits for an action; positions and grids of Qwen alone once made 49."""


@every_family
def test_actions(gpu: PretendedGpu, backbone: Backbone) -> None:
    other = twin(backbone)
    here, there = make_policy(backbone), make_policy(other)
    moved(other)
    on_gpu(there.network, GPU)
    assert there.device == GPU
    seen = [
        Observation(
            robot=robot,
            instruction="push the cube",
            images={"base": picture(i, 56, 56)},
            state=np.full(dim, 0.1 * i, np.float32),
            seed=i,
        )
        for i, (robot, dim) in enumerate((("arm", 3), ("leg", 4)))
    ]
    wanted = here.act_batch(seen)
    there.act_batch(seen)  # the first images of a size are also counted, to check placeholders
    with gpu.counting() as syncs:
        found = there.act_batch(seen)
    for one, other_chunk in zip(found, wanted, strict=True):
        assert np.array_equal(one.actions, other_chunk.actions)
    in_progress = replace(seen[0], chunk=wanted[0].actions[3:])
    assert np.array_equal(there.act(in_progress).actions, here.act(in_progress).actions)
    assert len(syncs) <= WAITS[backbone.model.config.model_type], table(syncs)
    kinds = Counter(sync.kind for sync in of_the_package(syncs))
    assert set(kinds) == {"copy to the device", "copy to the host"}, table(syncs)
    # copies: four vectors, and at most five inputs of the backbone
    assert kinds["copy to the host"] == 1 and kinds["copy to the device"] <= 9, table(syncs)

"""LeRobot itself trains on our data, runs on our suite, and runs our environments.

Needs `sh scripts/lerobot.sh` once. A few steps of training: nothing here is about quality.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from blm.app.lerobot_policies import lerobot_process
from blm.cli import main
from blm.evaluation import load_result
from blm.planner import CollectConfig, collect
from blm.tasks import Env
from blm.types import decision_seed

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lerobot/bin/python"
SIDE, STEPS = 64, 6
SMALL = {
    "act": "--policy.chunk_size=16 --policy.n_action_steps=8 --policy.dim_model=64 --policy.n_heads=4 "
    "--policy.dim_feedforward=128 --policy.n_encoder_layers=1 --policy.n_vae_encoder_layers=1 "
    "--policy.pretrained_backbone_weights=null",
    "diffusion": "--policy.n_obs_steps=2 --policy.horizon=8 --policy.n_action_steps=4 "
    "--policy.down_dims=[32,64] --policy.crop_shape=null --policy.num_inference_steps=2",
}
"""Type of a policy -> flags that make it small."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no .venv-lerobot: run 'sh scripts/lerobot.sh' to install the official LeRobot there",
    ),
]

OWN_LOOP = """
import sys, numpy as np, torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies import factory
folder, file, out = sys.argv[1:]
data = np.load(file)
config = PreTrainedConfig.from_pretrained(folder)
policy = factory.get_policy_class(config.type).from_pretrained(folder, config=config)
before, after = factory.make_pre_post_processors(config, pretrained_path=folder)
policy.reset()
actions = []
for step in range(len(data["state"])):
    torch.manual_seed(int(data["seed"][step]))
    batch = {"observation.state": torch.from_numpy(data["state"][step : step + 1]), "task": ["push"]}
    for camera in ("base", "side", "wrist"):
        picture = torch.from_numpy(data[camera][step : step + 1]).permute(0, 3, 1, 2).float() / 255
        batch[f"observation.images.{camera}"] = picture
    with torch.inference_mode():
        actions.append(after(policy.select_action(before(batch)))[0].numpy())
np.save(out, np.stack(actions))
"""
ATTRIBUTES = """
import json, sys
from lerobot.envs.factory import make_env
from lerobot.envs.utils import add_envs_task, preprocess_observation
from blm.evaluation.lerobot import BlmEnv
env = make_env(BlmEnv(task="PickCubePlus-Panda-v0", image_size=32, axis="light", level=3))["blm"][0]
seen, _ = env.reset(seed=[7])
batch = add_envs_task(env, preprocess_observation(seen))
print(json.dumps({k: v if k == "task" else list(v.shape) for k, v in batch.items()}))
"""


def official(*words: object) -> str:
    """Run a program of LeRobot's environment; return what it printed last."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON.parent / str(words[0])), *map(str, words[1:])]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return result.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    collect(
        CollectConfig(robots=("panda",), tasks=("push_cube",), episodes=2, image_size=SIDE, workers=0), folder
    )
    return folder / "panda"


@pytest.fixture(scope="module", params=[*SMALL])
def policy(request, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / request.param
    official(
        "lerobot-train", f"--policy.type={request.param}", "--policy.device=cpu",
        "--policy.push_to_hub=false", *SMALL[request.param].split(),
        "--dataset.repo_id=local/panda", f"--dataset.root={data}",
        "--dataset.use_imagenet_stats=false", "--steps=3", "--batch_size=2", "--num_workers=0",
        "--save_freq=3", "--eval_freq=0", f"--output_dir={out}",
    )  # fmt: skip
    return out


def test_our_chunks_are_the_actions_of_lerobots_own_loop(policy, tmp_path):
    env = Env("panda", "push_cube", cameras=("base", "side", "wrist"), image_size=SIDE)
    env.reset(seed=3)
    seen = [env.observation(seed=decision_seed(3, 0))]
    for step in range(1, STEPS):
        env.step(env.state() + 0.02)
        seen.append(env.observation(seed=decision_seed(3, step)))
    env.close()
    arrays = {camera: np.stack([one.images[camera] for one in seen]) for camera in env.cameras}
    states, seeds = np.stack([one.state for one in seen]), [one.seed for one in seen]
    np.savez(tmp_path / "seen.npz", state=states, seed=seeds, **arrays)
    folder = policy / "checkpoints/last/pretrained_model"
    official("python", "-c", OWN_LOOP, folder, tmp_path / "seen.npz", tmp_path / "actions.npy")
    expected = np.load(tmp_path / "actions.npy")
    process = lerobot_process(
        f"lerobot:{policy}", robots=("panda",), mapping=None, python=PYTHON, device="cpu"
    )
    with process:
        remote, other = process.make_policy(), process.make_policy()
        if remote.contract.execute > 1:
            actions = remote.act(seen[0]).actions[: len(seen)]
        else:
            actions = []
            for one in seen:
                actions.append(remote.act(one).actions[0])
                other.act(seen[0])  # another episode at the same time changes nothing
        remote.close()
        other.close()
    np.testing.assert_allclose(actions, expected, atol=1e-5)


def test_blm_evaluates_a_lerobot_policy(policy, tmp_path):
    line = (
        f"eval physical --model lerobot:{policy} --lerobot-python {PYTHON} --robots panda --tasks push_cube"
    )
    main([*line.split(), *f"--episodes 1 --workers 1 --out {tmp_path / 'out'}".split()])
    result = load_result(tmp_path / "out")
    assert result.model.startswith(f"lerobot {policy.name} ")
    assert (result.protocol.image_size, result.protocol.cameras) == (SIDE, ("base", "side", "wrist"))
    assert result.protocol.execute == {"act": 8, "diffusion": 1}[policy.name]
    assert len(result.episodes) == 1


def test_lerobot_evaluates_its_policy_in_our_environments(policy, tmp_path):
    printed = official(
        "lerobot-eval", "--env.discover_packages_path=blm.evaluation.lerobot", "--env.type=blm",
        "--env.task=PushCube-Panda-v0", f"--env.image_size={SIDE}", "--env.episode_length=8",
        f"--policy.path={policy}/checkpoints/last/pretrained_model", "--policy.device=cpu",
        "--eval.n_episodes=2", "--eval.batch_size=2", "--seed=0", f"--output_dir={tmp_path}",
    )  # fmt: skip
    assert "'n_episodes': 2" in printed


def test_instructions_and_perturbed_scenes_reach_lerobot():
    printed = official("python", "-c", ATTRIBUTES)
    env = Env("panda", "pick_cube", cameras=("base",), image_size=32)
    env.reset(seed=7)
    env.close()
    assert f'"task": ["{env.task_description}"]' in printed
    assert '"observation.images.side": [1, 3, 32, 32]' in printed and '"observation.state": [1, 8]' in printed

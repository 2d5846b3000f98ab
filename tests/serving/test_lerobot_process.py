"""A LeRobot policy in a process of its own: the way there and back, memory of episodes, and all ends."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from blm.robots import ROBOTS
from blm.serving.client import RemotePolicy
from blm.serving.lerobot.features import FeatureMap, Place
from blm.serving.lerobot.process import LeRobotProcess
from blm.types import BlmError, Observation
from tests.support.pretended_lerobot import EXECUTE, HORIZON, ROOT, policy_folder, pretended_python

SPACE = ROBOTS["panda"].action_space
STATE = np.linspace(-0.4, 0.3, SPACE.dim).astype(np.float32)
DEGREES = math.pi / 180


def features(scale: float = 1.0, **changes) -> FeatureMap:
    state = tuple(Place(feature="observation.state", index=i, scale=scale) for i in range(SPACE.dim))
    action = tuple(Place(feature="action", index=i, scale=scale) for i in range(SPACE.dim))
    values = {
        "action_spaces": {"panda": SPACE},
        "cameras": {"base": "observation.images.base", "wrist": "observation.images.hand"},
        "sides": {"base": 32, "wrist": 16},
        "state": state,
        "action": action,
        "revision": "pretended",
    }
    return FeatureMap(**{**values, **changes})


def observation(policy, seed: int = 5) -> Observation:
    side = policy.contract.image_size
    images = {c: np.full((side, side, 3), 10 + 90 * i, np.uint8) for i, c in enumerate(("base", "wrist"))}
    return Observation(images=images, state=STATE, instruction="push it", robot="panda", seed=seed)


@pytest.fixture
def start(tmp_path):
    def make(mapped: FeatureMap | None = None, python: Path | None = None, **options) -> LeRobotProcess:
        timing = {name: options.pop(name) for name in [*options] if name.endswith("timeout_s")}
        folder = policy_folder(tmp_path / "policy", **options)
        python = pretended_python(tmp_path) if python is None else python
        return LeRobotProcess(folder, mapped or features(), python=python, **timing)

    return make


def pid(process: LeRobotProcess) -> int:
    return int((process._folder / "pid").read_text())


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def test_feature_maps_survive_json_and_invert_themselves():
    mapped = features(DEGREES, state=tuple(
        Place(feature="joints", index=7 - i, scale=DEGREES, zero=3.0 * i) for i in range(8)
    ))  # fmt: skip
    assert FeatureMap.from_json(mapped.to_json()) == mapped
    vector = mapped.vectors(STATE)["joints"]
    np.testing.assert_allclose(vector[7], STATE[0] / DEGREES, rtol=1e-6)
    back = features(DEGREES, action=mapped.state).actions(np.stack([vector, vector]))
    np.testing.assert_allclose(back, [STATE, STATE], atol=1e-6)


def test_pictures_state_words_and_seeds_arrive_and_actions_come_back(start):
    with start(fault="facts") as process:
        policy = process.make_policy()
        assert policy.contract == process.contract
        assert (policy.contract.horizon, policy.contract.execute) == (HORIZON, EXECUTE)
        assert (policy.contract.image_size, policy.contract.cameras) == (32, ("base", "wrist"))
        actions = policy.act(observation(policy, seed=41)).actions
        np.testing.assert_array_equal(actions[0], STATE)
        np.testing.assert_allclose(actions[1, :7], [1, 41, len("push it"), 32, 16, 10, 100])
        policy.close()


def test_units_of_the_policy_are_converted_both_ways(start):
    with start(features(DEGREES)) as process:
        policy = process.make_policy()
        np.testing.assert_allclose(policy.act(observation(policy)).actions[2], STATE, atol=1e-6)
        policy.close()


def test_episodes_and_clients_do_not_share_what_a_policy_remembers(start):
    with start(fault="facts") as process:
        policy, other = process.make_policy(), process.make_policy()
        calls = [policy.act(observation(policy)).actions[1, 0] for _ in range(3)]
        assert (calls, other.act(observation(policy)).actions[1, 0]) == ([1, 2, 3], 1)
        policy.reset()
        assert policy.act(observation(policy)).actions[1, 0] == 1
        assert other.act(observation(policy)).actions[1, 0] == 2
        policy.close()
        other.close()


def test_the_process_ends_with_the_block_and_needs_its_key(start):
    with start() as process:
        number = pid(process)
        assert is_running(number)
        with pytest.raises(BlmError, match="401"):
            RemotePolicy(process._uri, api_key="guessed")
    assert not is_running(number)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"fault": "raises"}, "the policy failed: RuntimeError: shapes cannot be multiplied"),
        ({"fault": "nan"}, "the policy's actions are not finite"),
        ({"fault": "short"}, r"actions have the shape \(6, 7\); needed: \(steps, 8\)"),
        ({"fault": "slow", "reply_timeout_s": 0.5}, "no reply from .* within 0.5 s"),
    ],
)
def test_a_fault_during_an_episode_is_named_and_the_process_goes_on(start, options, complaint):
    with start(**options) as process:
        policy = process.make_policy()
        with pytest.raises(BlmError, match=complaint):
            policy.act(observation(policy))
        policy.close()
        assert is_running(pid(process))
        process.make_policy().close()


def test_the_death_of_the_process_shows_what_it_printed(start):
    with (
        pytest.raises(BlmError, match=r"(?s)exit status 9; the end of its output:.*out of memory, says"),
        start(fault="dies") as process,
    ):
        policy = process.make_policy()
        policy.act(observation(policy))
        policy.act(observation(policy))


def test_other_errors_are_not_blamed_on_the_process(start):
    with pytest.raises(BlmError, match=r"^mine$"), start():
        raise BlmError("mine")


def test_a_policy_that_does_not_load_or_fit_is_refused_with_its_output(start):
    with pytest.raises(BlmError, match=r"(?s)cannot load.*exit status 1.*RuntimeError: no such weights"):
        start(load_error="no such weights").__enter__()
    with pytest.raises(BlmError, match=r"(?s)exit status 2.*error: the policy's actions have the shape"):
        start(wrong_shape=True).__enter__()
    with pytest.raises(BlmError, match=r"(?s)was not ready after 0.5 s.*loading on cpu|printed nothing"):
        start(load_s=30, start_timeout_s=0.5).__enter__()


def test_a_missing_environment_names_the_script(start, tmp_path):
    with pytest.raises(BlmError, match=r"no Python of LeRobot at .*scripts/lerobot.sh"):
        start(python=tmp_path / "nothing")


def test_the_process_ends_when_the_program_that_started_it_is_killed(tmp_path):
    folder, python = policy_folder(tmp_path / "policy"), pretended_python(tmp_path)
    code = (
        "import time; from pathlib import Path; from tests.serving.test_lerobot_process import features\n"
        "from blm.serving.lerobot.process import LeRobotProcess\n"
        f"with LeRobotProcess(Path({str(folder)!r}), features(), python=Path({str(python)!r})):\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as program:
        assert program.stdout is not None and program.stdout.readline() == b"ready\n"
        number = int((folder / "pid").read_text())
        assert is_running(number)
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while is_running(number) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(number)

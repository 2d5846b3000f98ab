"""What a LeRobot policy's folder says, how a mapping completes it, and refusals that name the fault."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from blm.app.lerobot_policies import map_features, read_folder
from blm.cli import main
from blm.datasets.mapping import DataMapping, Dimension
from blm.evaluation import load_result
from blm.robots import ROBOTS
from blm.types import BlmError
from tests.support.pretended_lerobot import EXECUTE, HORIZON, policy_folder, pretended_python

SPACE = ROBOTS["panda"].action_space
BASE, WRIST = "observation.images.base", "observation.images.wrist"


def mapping(**changes) -> DataMapping:
    """A dataset of a Panda with degrees, its gripper first, and other names of cameras."""

    def part(feature: str) -> tuple[Dimension, ...]:
        joints = [
            Dimension(
                name=name, feature=feature, index=i + 1, kind="absolute_joint_position", unit="deg",
                zero=10.0, origin=name if feature == "action" else "",
            )
            for i, name in enumerate(SPACE.names[:-1])
        ]  # fmt: skip
        gripper = Dimension(
            name="gripper", feature=feature, kind="gripper", unit="opening", zero=100.0, one=20.0
        )
        return (gripper, *joints)

    values = {
        "robot": "panda",
        "rate_hz": 20.0,
        "cameras": {"base": "observation.images.top"},
        "state": part("observation.joints"),
        "action": part("action"),
    }
    return DataMapping(**{**values, **changes})


def foreign(folder, **changes):
    settings = {"pictures": {"observation.images.top": (48, 48)}, "state": "observation.joints"}
    return read_folder(policy_folder(folder, **{**settings, **changes}))


def test_our_own_names_need_no_mapping(tmp_path):
    folder = policy_folder(
        tmp_path / "checkpoints/last/pretrained_model", pictures={BASE: (64, 64), WRIST: (32, 32)}
    )
    found = map_features(read_folder(tmp_path), ("panda", "xarm7"))
    assert {*found.action_spaces} == {"panda", "xarm7"}
    assert (found.cameras, found.sides) == ({"base": BASE, "wrist": WRIST}, {"base": 64, "wrist": 32})
    assert found.image_size == 64
    state = np.arange(8, dtype=np.float32)
    np.testing.assert_array_equal(found.vectors(state)["observation.state"], state)
    assert found.revision == read_folder(folder).revision


def test_the_revision_is_that_of_the_files_and_the_mapping(tmp_path):
    first, second = (policy_folder(tmp_path / name) for name in ("a", "b"))
    assert read_folder(first).revision == read_folder(second).revision
    (second / "model.safetensors").write_bytes(b"other weights")
    assert read_folder(first).revision != read_folder(second).revision
    one = foreign(tmp_path / "c")
    turned = mapping(action=tuple(replace(d, zero=11.0) for d in mapping().action))
    assert len({map_features(one, (), m).revision for m in (mapping(), turned)}) == 2


def test_a_mapping_gives_places_units_and_cameras(tmp_path):
    found = map_features(foreign(tmp_path), (), mapping())
    assert found.cameras == {"base": "observation.images.top"}
    state = np.array([0.1, 0.2, 0.3, -0.4, 0.5, 0.6, 0.7, 0.25])
    vector = found.vectors(state)["observation.joints"]
    np.testing.assert_allclose(vector[1:], state[:7] / (math.pi / 180) + 10, rtol=1e-5)
    assert vector[0] == 80  # 20 is open, 100 is closed
    np.testing.assert_allclose(found.actions(vector[None])[0], state, atol=1e-5)
    (action,), (expected,) = (
        found.actions(np.full((1, 8), 40.0)), mapping().read({
            name: np.full((1, 8), 40.0) for name in ("observation.joints", "action")
        })[1],
    )  # fmt: skip
    np.testing.assert_allclose(action, np.roll(expected, -1), rtol=1e-6)


def test_names_that_lerobot_renames_and_lengths_of_pretrained_configurations(tmp_path):
    folder = policy_folder(
        tmp_path,
        dim=6,
        pictures={f"observation.images.camera{i}": (64, 64) for i in (1, 2, 3)},
        renamed={BASE: "observation.images.camera1", WRIST: "observation.images.camera2"},
        statistics={"observation.state.mean": [0.0] * 8, "action.min": [-0.1] * 8, "action.max": [0.1] * 8},
    )
    found = map_features(read_folder(folder), ("panda",))
    assert found.cameras == {"base": BASE, "wrist": WRIST}
    assert len(found.state) == len(found.action) == 8


def test_policies_that_do_not_fit_are_refused_by_name(tmp_path):
    def refused(complaint, robots=("panda",), mapped=None, read=read_folder, **changes):
        folder = policy_folder(tmp_path / "policy", **changes)
        with pytest.raises(BlmError, match=complaint):
            map_features(read(folder), robots, mapped)

    refused(r"does not say which robot it is for; its 8 actions fit panda, xarm7: name it", robots=())
    refused(r"8 actions, 'xarm6' needs joint1, .* fit panda, xarm7", robots=("xarm6",))
    refused(r"no camera of the suite for the policy's 'observation.images.top'; cameras: base, side, wrist",
            pictures={"observation.images.top": (32, 32)})  # fmt: skip
    refused(r"'observation.images.base' with 48 x 64 px", pictures={BASE: (48, 64)})
    refused(r"number 0 of 'observation.joints' in the state: the policy has it", state="observation.joints")
    low, high = [-120.0] * 8, [120.0] * 8
    refused(r"training actions of 'joint1' are -120 to 120, .* another unit\?",
            statistics={"action.min": low, "action.max": high})  # fmt: skip
    shared = {"pictures": {"observation.images.top": (32, 32)}, "state": "observation.joints"}
    refused("mapping is of the robot 'panda', not of xarm7", ("xarm7",), mapping(), **shared)
    refused("the mapping has 10 Hz, the suite controls at 20 Hz", (), mapping(rate_hz=10.0), **shared)
    deltas = tuple(
        d if d.kind == "gripper" else replace(d, kind="delta_joint_position", origin="")
        for d in mapping().action
    )
    refused(r"'joint1' of the mapping's action is \('delta_joint_position', 'rad'\)",
            (), mapping(action=deltas), **shared)  # fmt: skip
    refused(r"number 8 of 'action' in the action: the policy has it", (), mapping(), **shared,
            statistics={"action.mean": [0.0] * 9})  # fmt: skip


def test_folders_of_other_things_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(BlmError, match=r"no LeRobot policy in .*config\.json and model\.safetensors"):
        read_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BlmError, match="is not of a LeRobot policy"):
        read_folder(tmp_path)
    folder = policy_folder(tmp_path / "old")
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(BlmError, match=r"before 0\.4; .*migrate_policy_normalization"):
        read_folder(folder)
    policy_folder(folder, state="observation.environment_state")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"STATE"', '"ENV"'))
    with pytest.raises(BlmError, match=r"needs 'observation.environment_state'"):
        read_folder(folder)


def evaluate(model, out, *flags):
    line = ["eval", "physical", "--model", str(model), "--out", str(out), "--robots", "panda"]
    line += ["--tasks", "push_cube", "--episodes", "1", "--videos", "0", "--workers", "1"]
    main([*line, *map(str, flags)])
    return load_result(out)


def test_a_policy_that_holds_still_gets_the_result_of_the_zero_policy(tmp_path):
    folder = policy_folder(tmp_path / "policy", pictures={BASE: (112, 112), WRIST: (112, 112)})
    python = pretended_python(tmp_path)
    theirs = evaluate(f"lerobot:{folder}", tmp_path / "theirs", "--lerobot-python", python)
    ours = evaluate("zero", tmp_path / "ours", "--horizon", HORIZON, "--execute", EXECUTE)
    assert theirs.protocol == ours.protocol
    assert theirs.model.startswith("lerobot act ")
    (one,), (other,) = theirs.episodes, ours.episodes
    assert (one.scene, one.steps, one.success_once) == (other.scene, other.steps, other.success_once)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--dtype", "bfloat16", "--continued"), "a LeRobot policy has no --continued, --dtype"),
        (
            ("--lerobot-python", "no/python"),
            "no Python of LeRobot at 'no/python': run 'sh scripts/lerobot.sh'",
        ),
        (("--mapping", "no/mapping.json"), "'no/mapping.json' cannot be read"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, flags, complaint):
    with pytest.raises(SystemExit):
        evaluate(f"lerobot:{policy_folder(tmp_path / 'policy')}", tmp_path / "out", *flags)
    assert complaint in " ".join(capsys.readouterr().err.split())
